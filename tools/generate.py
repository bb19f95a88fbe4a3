"""`latentrelay generate`: one picture from a bundle, alone or with a cloud. Imports the runtime and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from latentrelay.runtime import Bundle, CloudClient, DeviceState, Session, StepEvent
from latentrelay.runtime import generate as generate_picture
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.preview import Preview
from latentrelay.tools.console import counting, emit, err, printable, table

WIRE_DTYPES = ("float16", "float32")


def run(
    bundle: Path,
    prompt: str,
    output: Path,
    *,
    cloud: str | None,
    split: int | None,
    seed: int,
    negative_prompt: str,
    guidance: float | None,
    token: str | None,
    wire_dtype: str,
    fallback: bool,
    as_json: bool,
    backend: str | None = None,
    predict: bool = True,
    cloud_deadline_s: float | None = None,
    thermal: str = "nominal",
    free_mib: float | None = None,
    previews: Path | None = None,
    public_key: Path | None = None,
    insecure: bool = False,
    ca_file: Path | None = None,
) -> None:
    """Verify the bundle, make the picture, write it, print what happened. `backend` stands for the bundle's own;
    `predict` False computes every step of a bundle that predicts some. `thermal` and `free_mib` say how the device is,
    `previews` is a folder for a small picture of every step, `public_key` whose signature the bundle must have;
    `insecure` allows plain HTTP off loopback,
    `ca_file` holds the certificates that the cloud's is checked against."""
    state = DeviceState(thermal, free_mib)
    if wire_dtype not in WIRE_DTYPES:
        raise RequestError("unknown wire dtype", got=wire_dtype, expected=" or ".join(WIRE_DTYPES))
    if not output.absolute().parent.is_dir():
        raise RequestError("the picture's folder does not exist", got=str(output), do="Make it first.")
    if output.is_dir():
        raise RequestError("the picture's path is a folder", got=str(output), do="Give the name of a PNG file.")
    opened = Bundle.open(bundle, public_key=public_key)
    steps = opened.manifest.schedule.num_steps
    with (
        CloudClient(cloud, token=token, insecure=insecure, ca_file=ca_file) if cloud else nullcontext() as client,
        Session(opened, backend=backend) as session,
        counting("generating", steps) as advance,
    ):
        for words, text in (("prompt", prompt), ("negative prompt", negative_prompt)):
            if session.tokenizer.is_cut(text):
                limit = opened.manifest.tokenizer.max_length
                err.print(f"[yellow]the {words} is cut:[/] the model reads {limit} tokens, start and end included")

        def stepped(event: StepEvent) -> None:
            advance(f"step {event.step + 1} of {event.num_steps}", 1)

        result = generate_picture(
            session,
            prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            guidance=guidance,
            split=split,
            cloud=client,
            on_step=stepped,
            fallback=fallback,
            wire_dtype=wire_dtype,
            predict=predict,
            cloud_deadline_s=cloud_deadline_s,
            device_state=lambda: state,
            on_preview=_writer(previews) if previews is not None else None,
        )
        ran = {name: list(each) for name, each in session.providers_by_component.items()}
    result.save_png(output)
    document: dict[str, Any] = {
        "image": str(output),
        "path_taken": result.path_taken,
        "steps": dict(result.steps),
        "step_kinds": dict(result.kinds),
        "handoff_bytes": result.handoff_bytes,
        "ms": {name: round(value, 2) for name, value in result.ms.items()},
        "providers": list(result.providers),
        "providers_by_component": ran,
        "seed": result.seed,
        "guidance": result.guidance,
        "bundle_digest": result.digest,
        "fallback_reason": result.fallback_reason,
        "attempts": result.attempts,
        "degraded": [{"what": each.what, "why": each.why, "detail": each.detail} for each in result.degraded],
    }

    def show(console: Any) -> None:
        console.print(table(["stage", "ms"], [[name, f"{value:.0f}"] for name, value in result.ms.items()]))
        where = f"{result.steps['cloud']} steps in the cloud, {result.steps['device']} here"
        if result.predicted_steps:
            where += f" ({result.computed_steps} computed, {result.predicted_steps} predicted)"
        console.print(
            f"[bold]{printable(output)}[/]: {result.path_taken}, {where}, {result.handoff_bytes} bytes handed over"
        )
        for each in result.degraded:
            console.print(f"[yellow]{each.what}[/] ({each.why}): {printable(each.detail)}")

    emit(document, as_json, show)


def _writer(folder: Path) -> Callable[[Preview], None]:
    """Writes the small pictures of a run into `folder`, one a step, where the step was made in its name."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(preview: Preview) -> None:
        from PIL import Image

        Image.fromarray(preview.rgb).save(folder / f"{preview.step:04}-{preview.where}.png")

    return write
