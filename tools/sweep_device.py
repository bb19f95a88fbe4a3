"""The device's part of a sweep: deployed graphs from the teacher's handoffs to judged pictures, kept as it goes.

In: a session, a batch of captions and the teacher's float16 states. Out: scores by split, a row a caption. One picture
at a time through ONNX Runtime, as on a device; nothing here runs torch but the judge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from latentrelay.reference import judge as judging
from latentrelay.reference.pipeline import reference_path
from latentrelay.runtime import Session
from latentrelay.tools.array_cache import Arrays
from latentrelay.tools.console import counting
from latentrelay.tools.picture_scores import Scored, score_pictures
from latentrelay.tools.teacher_runs import Teacher, TeacherBatch, as_bytes

_SCORING = 1  # raised when pictures are scored another way, so that kept scores are made again


@dataclass(frozen=True)
class Captions:
    """What is drawn: (scene, caption) pairs and seeds, row by row."""

    pairs: tuple[tuple[Any, Any], ...]
    seeds: tuple[int, ...]

    @property
    def prompts(self) -> list[str]:
        """The texts."""
        return [caption.text for _, caption in self.pairs]

    def batches(self, size: int) -> Iterator[Captions]:
        """Consecutive parts of at most `size` rows."""
        for i in range(0, len(self.pairs), size):
            yield Captions(self.pairs[i : i + size], self.seeds[i : i + size])


class Scorer:
    """The judge and what its scores depend on."""

    def __init__(self) -> None:
        self._judge = judging.load_judge(reference_path())
        weights = (reference_path() / "judge.safetensors").read_bytes()
        self.made_from = {"judge": hashlib.sha256(weights).hexdigest(), "scoring": _SCORING}

    def __call__(self, pictures: Any, references: Any, part: Captions) -> Scored:
        """Scores of pictures (B, H, W, 3) uint8 against the references, B captions."""
        return score_pictures(self._judge, pictures, references, [caption for _, caption in part.pairs])


def device_scores(
    name: str, session: Session, teacher: Teacher, parts: Sequence[Captions], splits: Sequence[int], scorer: Scorer
) -> dict[int, Scored]:
    """One student's scores by split, from the cache where it has them. Split N only decodes."""
    words = f"{name}: {sum(len(part.pairs) for part in parts)} captions, {len(splits)} splits"
    found: dict[int, list[Scored]] = {split: [] for split in splits}
    with counting(words, len(splits) * sum(len(part.pairs) for part in parts)) as advance:
        for part in parts:
            device = _Device(session, teacher, part, scorer)
            for split in splits:
                found[split].append(device.scores(split))
                advance(words, len(part.pairs))
    return {split: Scored.joined(values) for split, values in found.items()}


class _Device:
    """One batch of captions on the device; the teacher's states are read and prompts encoded when first needed."""

    def __init__(self, session: Session, teacher: Teacher, part: Captions, scorer: Scorer) -> None:
        self.session, self.teacher, self.part, self.scorer = session, teacher, part, scorer
        self._batch: TeacherBatch | None = None
        self._embeds: dict[int, Any] = {}

    def scores(self, split: int) -> Scored:
        made_from = {
            "teacher": self.teacher.made_from(self.part.prompts, self.part.seeds),
            "bundle": self.session.bundle.digest,
            "device_split": split,
            **self.scorer.made_from,
        }
        return Scored(**self.teacher.cache.get("device", made_from, lambda: self._run(split)))

    def _run(self, split: int) -> Arrays:
        if self._batch is None:
            self._batch = self.teacher.batch(self.part.prompts, self.part.seeds)
        pictures = [as_bytes(self._picture(self._batch, row, split)) for row in range(len(self.part.seeds))]
        return dict(self.scorer(np.stack(pictures), self._batch.pictures, self.part).arrays())

    def _picture(self, batch: TeacherBatch, row: int, split: int) -> Any:
        latents, memory = batch.handoff(row, split) if split else (None, None)
        start = self.session.initial_latents(self.part.seeds[row]) if latents is None else latents
        return self.session.decode(
            run_device(self.session, self._prompt(row, split), start, memory, split, self.teacher)
        )

    def _prompt(self, row: int, split: int) -> Any:
        if row not in self._embeds and split < self.teacher.num_steps:
            self._embeds[row] = self.session.encode(self.part.prompts[row])
        return self._embeds.get(row)


def run_device(session: Session, prompt_embeds: Any, latents: Any, x0_prev: Any, split: int, teacher: Teacher) -> Any:
    """Steps split .. N-1 on the device: (1, C, h, w) float32, from what crossed; at split N nothing is done."""
    state = np.asarray(latents, np.float32)
    if split == teacher.num_steps:
        return state
    memory = None if x0_prev is None else np.asarray(x0_prev, np.float32)
    for event in session.run_steps(state, memory, split, prompt_embeds, teacher.guidance):
        state = event.latents
    return state
