"""What each method gives on the evaluation's captions: final latents, calls, scores; kept by content.

In: a `Method`, batches of captions with their handoffs. Out: `Result`, row i being caption i: PSNR of the final latents
to the uncached run's, what was called at every step, and what the judge reads. Pictures are decoded by the bundle's own
decoder, once a method. A killed evaluation goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from latentrelay.compress.denoising_chain import Start
from latentrelay.tools.accelerate_methods import Method, Settings, computed_steps, device_ms
from latentrelay.tools.array_cache import Arrays
from latentrelay.tools.console import counting
from latentrelay.tools.picture_scores import Scored
from latentrelay.tools.precision_runs import Experiment, latent_psnr_db
from latentrelay.tools.sweep_device import Captions, Scorer
from numpy.typing import NDArray

_DEFAULTS = {"policy": "uniform", "abscissa": "step", "horizon": 0}
_PLAIN = ("policy", "target")
Kinds = tuple[tuple[str, ...], ...]  # a run's steps, a run a caption
Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Result:
    """One method on all captions. `float_psnr_db`: to the float network's uncached run, None where that is the same."""

    name: str
    settings: Settings
    ours: bool
    kinds: Kinds
    psnr_db: Doubles
    float_psnr_db: Doubles | None
    scored: Scored

    def device_ms(self, costs: Mapping[str, float]) -> float:
        """Mean milliseconds of the segment."""
        return float(np.mean([device_ms(run, costs) for run in self.kinds]))

    @property
    def computed(self) -> float:
        """Mean number of computed steps."""
        return float(np.mean([computed_steps(run) for run in self.kinds]))

    @property
    def label(self) -> str:
        """Name and settings in one line; what is said by default is left out."""
        told = [_told(key, value) for key, value in self.settings.items() if _DEFAULTS.get(key) != value]
        return f"{self.name}: {', '.join(told)}" if told else self.name


@dataclass(frozen=True, eq=False)
class Runner:
    """The captions, the uncached runs that all are compared with, and the judge. `reference` and `exact` are methods
    that compute every step, the latter in float (None: the same)."""

    experiment: Experiment
    parts: Sequence[Captions]
    scorer: Scorer
    reference: Method
    exact: Method | None
    _starts: dict[int, list[Start]] = field(default_factory=dict)

    def result(self, method: Method) -> Result:
        """Run, or read what was kept."""
        return self.scored(
            method.name, method.settings, method.ours, lambda part: self._ran(method, part), method.key()
        )

    def scored(
        self,
        name: str,
        settings: Settings,
        ours: bool,
        make: Callable[[Captions], tuple[Floats, Kinds]],
        key: Mapping[str, Any],
    ) -> Result:
        """Score what `make` gives for each part: latents (B, C, h, w) and calls. `key` identifies it."""
        words = name
        kinds: list[tuple[str, ...]] = []
        psnr: list[Doubles] = []
        exact: list[Doubles] = []
        scores: list[Scored] = []
        with counting(words, sum(len(part.seeds) for part in self.parts)) as advance:
            for i, part in enumerate(self.parts):
                latents, called = make(part)
                kinds += called
                psnr.append(latent_psnr_db(self.references[i], latents))
                if self.floats is not None:
                    exact.append(latent_psnr_db(self.floats[i], latents))
                scores.append(self._judged(latents, key, i))
                advance(words, len(part.seeds))
        floats = np.concatenate(exact) if exact else None
        return Result(name, settings, ours, tuple(kinds), np.concatenate(psnr), floats, Scored.joined(scores))

    @cached_property
    def references(self) -> list[Any]:
        """(B, C, h, w) a part: every step computed."""
        return [self._ran(self.reference, part)[0] for part in self.parts]

    @cached_property
    def floats(self) -> list[Any] | None:
        """The same of the float network; None where the bundle's is that."""
        if self.exact is None:
            return None
        return [self._ran(self.exact, part)[0] for part in self.parts]

    @cached_property
    def pictures(self) -> list[Any]:
        """(B, H, W, 3) uint8 a part, of the uncached runs."""
        return [self._pictures(latents) for latents in self.references]

    def _pictures(self, latents: Any) -> Any:
        return self.experiment.decoded(latents)

    def _ran(self, method: Method, part: Captions) -> tuple[Floats, Kinds]:
        def run() -> Arrays:
            runs = [method.run(start) for start in self.starts(part)]
            words = json.dumps([list(each.kinds) for each in runs]).encode()
            return {
                "latents": np.concatenate([each.latents for each in runs]),
                "kinds": np.frombuffer(words, np.uint8).copy(),
            }

        made_from = {**self.experiment.made_from(part), "method": dict(method.key())}
        found = self.experiment.cache.get("accelerated", made_from, run)
        return found["latents"], tuple(tuple(each) for each in json.loads(found["kinds"].tobytes()))

    def _judged(self, latents: Any, key: Mapping[str, Any], i: int) -> Scored:
        part = self.parts[i]
        made_from = {
            **self.experiment.made_from(part),
            "method": dict(key),
            "reference": dict(self.reference.key()),
            **self.scorer.made_from,
        }
        arrays = self.experiment.cache.get(
            "accelerated-scores",
            made_from,
            lambda: dict(self.scorer(self._pictures(latents), self.pictures[i], part).arrays()),
        )
        return Scored(**arrays)

    def starts(self, part: Captions) -> list[Start]:
        """Handoffs and prompt states, made once a part."""
        if part.seeds[0] not in self._starts:
            self._starts[part.seeds[0]] = self.experiment.starts(part)
        return self._starts[part.seeds[0]]


def _told(key: str, value: Any) -> str:
    if isinstance(value, list):
        return f"{key} {'+'.join(map(str, value))}"
    words = str(value).replace("_", " ")
    return words if key in _PLAIN else f"{key.replace('_', ' ')} {words}"
