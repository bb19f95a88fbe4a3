"""One precision's runs for `evaluate --precision`: deployed graphs from the teacher's handoffs to latents and pictures.

In: a bundle, a batch of captions and the teacher's float16 states at the split. Out: final latents (B, C, h, w) of
every variant of the compensation, and the pictures of the bundle as it ships. Variants run on the same deployed U-Net
through the step chain in NumPy, which the parity gate holds equal to the step graph, and all from the float bundle's
prompt states; the shipped pictures come from the bundle's own text encoder, step graph and decoder. Everything is kept
by content, so that a killed evaluation goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
from latentrelay.compress.denoising_chain import Denoiser, Start, chain, final_latents
from latentrelay.compress.plan import Plan
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.export.compensation_file import TableCorrection
from latentrelay.export.deployed import OnnxDenoiser
from latentrelay.runtime import Bundle, Session
from latentrelay.tools.array_cache import ArrayCache, Arrays
from latentrelay.tools.sweep_device import Captions
from latentrelay.tools.teacher_runs import Teacher, TeacherBatch, as_bytes
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Tables = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Variant:
    """A network and a set of tables: `digest` of the network, `open` opens it, empty `tables` correct nothing."""

    digest: str
    open: Callable[[], Denoiser]
    table: SolverTable
    tables: Tables = field(default_factory=dict)

    def key(self) -> dict[str, str]:
        """What identifies it."""
        blob = b"".join(name.encode() + array.tobytes() for name, array in sorted(self.tables.items()))
        return {"network": self.digest, "tables": sha256(blob).hexdigest()}


def deployed(bundle: Bundle, threads: int) -> Variant:
    """A bundle's U-Net in its session, without tables."""
    plan, latent = Plan.load(bundle.path), bundle.manifest.latent
    tokens, width = bundle.manifest.components["text_encoder"].outputs[0].shape[1:]
    table = plan.recipe.solver_table
    graphs = {entry.path: entry.sha256 for entry in bundle.files if entry.path.startswith("unet/model.onnx")}

    def open_it() -> Denoiser:
        return OnnxDenoiser(
            bundle.file("unet/model.onnx"),
            table,
            bundle.manifest.backend,
            (latent.channels, latent.height, latent.width),
            (int(tokens), int(width)),
            threads=threads,
        )

    return Variant(repr(sorted(graphs.items())), open_it, table)


@dataclass
class Experiment:
    """What all precisions share: the teacher, the split, and the float bundle's session whose prompt states all use."""

    teacher: Teacher
    split: int
    states: Session
    threads: int

    @property
    def cache(self) -> ArrayCache:
        """Where results are kept."""
        return self.teacher.cache

    def latents(self, variants: Mapping[str, Variant], part: Captions) -> dict[str, Floats]:
        """{name: final latents (B, C, h, w)} of one batch; variants of one network share a session."""
        opened: dict[str, Denoiser] = {}
        starts: list[Start] = []

        def run(variant: Variant) -> Arrays:
            if variant.digest not in opened:
                opened[variant.digest] = variant.open()
            starts.extend(self.starts(part) if not starts else [])
            correction = TableCorrection(variant.tables) if variant.tables else None
            denoiser, guidance = opened[variant.digest], self.teacher.guidance
            rows = [final_latents(chain(denoiser, variant.table, s, guidance, correction), s) for s in starts]
            return {"latents": np.concatenate(rows)}

        found = {}
        for name, variant in variants.items():
            made_from = {**self.made_from(part), **variant.key()}
            found[name] = self.cache.get("latents", made_from, lambda chosen=variant: run(chosen))["latents"]  # type: ignore[misc]
        return found

    def pictures(self, bundle: Bundle, part: Captions) -> NDArray[np.uint8]:
        """The pictures (B, H, W, 3) that a bundle itself makes."""

        def run() -> Arrays:
            batch = self._batch(part) if self.split else None
            with Session(bundle, threads=self.threads) as session:
                rows = [as_bytes(self._picture(session, batch, part, row)) for row in range(len(part.seeds))]
            return {"pictures": np.stack(rows)}

        made_from = {**self.made_from(part), "bundle": bundle.digest}
        result: NDArray[np.uint8] = self.cache.get("pictures", made_from, run)["pictures"]
        return result

    def decoded(self, latents: Floats) -> NDArray[np.uint8]:
        """Pictures (B, H, W, 3) of final latents, by the float bundle's decoder."""
        return np.stack([as_bytes(self.states.decode(row[None])) for row in latents])

    def starts(self, part: Captions) -> list[Start]:
        """Where the device's part of each run begins, from what crosses the wire."""
        batch = self._batch(part) if self.split else None
        return [
            Start(self.split, *self._state(self.states, batch, part, row), self.states.encode(prompt))
            for row, prompt in enumerate(part.prompts)
        ]

    def _batch(self, part: Captions) -> TeacherBatch:
        return self.teacher.batch(part.prompts, part.seeds)

    def _state(
        self, session: Session, batch: TeacherBatch | None, part: Captions, row: int
    ) -> tuple[Floats, Floats | None]:
        """Where the device begins, from what crosses the wire."""
        if batch is None:
            return session.initial_latents(part.seeds[row]), None
        latents, memory = batch.handoff(row, self.split)
        return latents.astype(np.float32), None if memory is None else memory.astype(np.float32)

    def _picture(self, session: Session, batch: TeacherBatch | None, part: Captions, row: int) -> Floats:
        state, memory = self._state(session, batch, part, row)
        embeds = session.encode(part.prompts[row])
        for event in session.run_steps(state, memory, self.split, embeds, self.teacher.guidance):
            state = event.latents
        return session.decode(state)

    def made_from(self, part: Captions) -> dict[str, Any]:
        """What every kept result depends on."""
        return {
            "teacher": self.teacher.made_from(part.prompts, part.seeds),
            "states": self.states.bundle.digest,
            "split": self.split,
        }


def latent_psnr_db(reference: Floats, got: Floats) -> NDArray[np.float64]:
    """(B,) decibels of latents (B, C, h, w): 10 log10(max |ref|^2 / mean squared error) by row, 200 at most."""
    error = np.square(got.astype(np.float64) - reference).mean((1, 2, 3))
    peak = np.abs(reference.astype(np.float64)).max((1, 2, 3))
    result: NDArray[np.float64] = 10 * np.log10(np.square(peak) / np.maximum(error, 1e-20))
    return np.minimum(result, 200.0)
