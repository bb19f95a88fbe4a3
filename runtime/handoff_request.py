"""What a device asks the cloud for: the JSON body of POST /v1/handoffs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentrelay.runtime.manifest import Manifest


@dataclass(frozen=True)
class HandoffRequest:
    """Run steps 0 .. split-1 of num_steps and hand over. Sizes are pixels; dtype is the wire's, "float16" | "float32".

    sampler and the digests are what the device's bundle was built from; a cloud that serves something else refuses
    (409). What follows them is optional and left out of the body at its default, as clouds of version 1.0 refuse it:
    `wire_versions` handoff schemas that the device reads (None: the client fills in its own), `accept_splits` smaller
    splits at which the cloud may hand over early to meet `deadline_ms` (milliseconds from when it read the request),
    `deterministic` a result that does not depend on who shared the batch, `preview` pictures with the progress,
    `step_cache` the cloud's own cached steps, `schema_version` of the body itself.
    """

    prompt: str
    height: int
    width: int
    num_steps: int
    split: int
    negative_prompt: str = ""
    seed: int = 0
    guidance: float = 7.5
    dtype: str = "float16"
    sampler: str | None = None
    model_digest: str | None = None
    scheduler_digest: str | None = None
    wire_versions: tuple[str, ...] | None = None
    accept_splits: tuple[int, ...] | None = None
    deadline_ms: int | None = None
    deterministic: bool = False
    preview: bool = False
    step_cache: bool = False
    schema_version: str | None = None

    @classmethod
    def for_bundle(
        cls,
        manifest: Manifest,
        prompt: str,
        *,
        split: int,
        negative_prompt: str = "",
        seed: int = 0,
        guidance: float | None = None,
        dtype: str = "float16",
        accept_splits: tuple[int, ...] | None = None,
    ) -> HandoffRequest:
        """The request whose answer fits the bundle: size, steps, sampler and digests from its manifest."""
        return cls(
            prompt=prompt,
            height=manifest.image.height,
            width=manifest.image.width,
            num_steps=manifest.schedule.num_steps,
            split=split,
            negative_prompt=negative_prompt,
            seed=seed,
            guidance=manifest.guidance.default if guidance is None else guidance,
            dtype=dtype,
            sampler=manifest.schedule.sampler,
            model_digest=manifest.source.digest,
            scheduler_digest=manifest.schedule.scheduler_digest,
            accept_splits=accept_splits,
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON body; absent fields are left out, and the optional switches where they are off."""
        document = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        return {key: value for key, value in document.items() if value is not None and value is not False}
