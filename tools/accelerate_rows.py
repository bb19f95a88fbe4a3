"""Which methods an evaluation runs, by family, and which pairs of them the ablation compares.

Rows are chosen so that near each of the equal device times (a quarter, a third and a half of the whole segment) every
family has one that fits. `predicted` numbers of computed steps follow from what a shallow step costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from latentrelay.tools import accelerate_calibration as calibration
from latentrelay.tools import accelerate_rivals as rivals
from latentrelay.tools.accelerate_methods import Method
from latentrelay.tools.accelerate_networks import BRANCH
from latentrelay.tools.accelerate_ours import OurSettings, Workshop

SHARES = (0.25, 0.37, 0.5)  # of the whole segment's device time: where the frontier is judged
_CALIBRATION_RUNS = 12
_FEWEST = 2


@dataclass(frozen=True)
class Pair:
    """One part of ours: the method with it and the method without it, and at which share of the device time."""

    part: str
    share: float
    with_it: Method
    without_it: Method


@dataclass(frozen=True, eq=False)
class Bench:
    """Makes methods. `costs`: milliseconds by kind of call."""

    workshop: Workshop
    costs: Mapping[str, float]

    def affordable(self, share: float, computed: str, predicted: str | None) -> int:
        """The most computed steps within a share of the segment's time, by what the two kinds of step call."""
        steps, whole = len(self.workshop.lab.device_steps), self.costs["full"] + self.costs["tail"]
        full, reused = self.costs[computed], 0.0 if predicted is None else self.costs[predicted]
        left = steps * (share * whole - self.costs["tail"] - reused)
        return max(_FEWEST, min(steps, int(left / (full - reused) + 1e-9)))

    def whole(self, share: float) -> OurSettings:
        """The whole output, uniform, order 1, at a share of the time."""
        return OurSettings("whole_output", self.affordable(share, "full", None))

    def deep(self, share: float) -> OurSettings:
        """The deep feature, uniform, order 1, at a share of the time."""
        return OurSettings("deep_feature", self.affordable(share, "full_deep", "shallow_probe"))

    def ours(self) -> list[Method]:
        """Ours, without the planner's own choices."""
        asked: dict[OurSettings, None] = {}
        for share in SHARES:
            for base in (self.whole(share), self.deep(share)):
                for changes in _OURS:
                    asked[replace(base, **changes)] = None
            asked |= dict.fromkeys(replace(self.whole(share), **changes) for changes in _WHOLE_OUTPUT)
            if self.deep(share).computed > _FEWEST:
                asked |= dict.fromkeys(replace(self.deep(share), **changes) for changes in _CHOICES)
        spread = sorted({settings.computed for settings in asked if settings.target == "whole_output"})
        for computed in range(max(_FEWEST, spread[0] - 1), spread[-1] + 3):
            asked[OurSettings("whole_output", computed, rectifier="all")] = None
        return [self.workshop.method(settings) for settings in asked]

    def pairs(self) -> list[Pair]:
        """The ablation, at every share."""
        make, found = self.workshop.method, []
        for share in SHARES:
            whole, deep = self.whole(share), self.deep(share)
            rectified = replace(whole, rectifier="all")
            tokens = replace(deep, **_TOKENS)
            compared: list[tuple[str, Method, Method]] = [
                ("policy: dynamic programme over uniform", make(replace(rectified, policy="dp")), make(rectified)),
                ("log-SNR over the step index", make(replace(rectified, abscissa="logsnr")), make(rectified)),
                ("adjusted grid, nominal timesteps", make(replace(whole, grid="nominal")), make(whole)),
                ("adjusted grid, actual timesteps", make(replace(whole, grid="actual")), make(whole)),
                ("rectifier, predicted steps", make(replace(whole, rectifier="predicted")), make(whole)),
                (
                    "rectifier, computed steps too",
                    make(rectified),
                    make(replace(whole, rectifier="predicted")),
                ),
                ("order 1 over order 0, whole output", make(whole), make(replace(whole, orders=(0,)))),
                ("rectifier on the deep feature", make(replace(deep, rectifier="all")), make(deep)),
            ]
            if deep.computed > _FEWEST:  # with two computed steps, the last among them, there is no order 1
                compared += [
                    ("order 1 over order 0, deep feature", make(deep), make(replace(deep, orders=(0,)))),
                    ("per-token choice of orders 0-1 over order 1", make(replace(deep, orders=(0, 1))), make(deep)),
                    ("per-token choice over order 1", make(tokens), make(deep)),
                    ("per-token choice over order 0", make(tokens), make(replace(deep, orders=(0,)))),
                    ("per-token choice over chance", make(tokens), self.random(share)),
                ]
            found += [Pair(part, share, *two) for part, *two in compared]
        return found

    def random(self, share: float) -> Method:
        """The per-token rows, chosen by chance."""
        settings = replace(self.deep(share), **_TOKENS)
        chosen = self.workshop.method(settings)
        return rivals.random_choice(self.workshop.lab, chosen.prediction, settings.to_json())

    def methods(self, family: str) -> list[Method]:
        """One family's methods."""
        return list(_FAMILIES[family](self))


def _fewer(bench: Bench) -> Sequence[Method]:
    lab, scheduler = bench.workshop.lab, bench.workshop.scheduler
    most = len(lab.device_steps)
    kept = [rivals.fewer_steps(lab, scheduler, n, "kept") for n in (3, 4, 5, 6, 7, 8, 9, 11) if n <= most]
    return [*kept, *(rivals.fewer_steps(lab, scheduler, n, "natural") for n in (4, 6, 8) if n <= most)]


def _taylor(bench: Bench) -> Sequence[Method]:
    lab = bench.workshop.lab
    deep = [rivals.taylor_seer(lab, "deep_feature", n, order) for n in (3, 4, 5) for order in (1, 2)]
    whole = [rivals.taylor_seer(lab, "whole_output", n, order) for n in (3, 4, 5) for order in (1, 2)]
    modules = [rivals.taylor_seer(lab, "modules", n, 1) for n in (3,)] if lab.networks.modules else []
    return [*deep, *whole, *modules]


def _thresholds(fit: Callable[..., Any], rule: Callable[..., Method], counts: Sequence[int]) -> Any:
    def make(bench: Bench) -> Sequence[Method]:
        seen = bench.workshop.seen(_CALIBRATION_RUNS)
        return [rule(bench.workshop.lab, fit(seen, count)) for count in counts]

    return make


def _guidance(bench: Bench) -> Sequence[Method]:
    lab = bench.workshop.lab
    if BRANCH not in lab.networks.kinds:
        return []
    n = len(lab.device_steps)
    alone = [rivals.guidance_interval(lab, guided) for guided in (0, n // 3)]
    mixed = [(computed, guided) for computed, guided in ((5, 3), (8, 4)) if computed <= n]
    return [*alone, *(rivals.predicted_with_guidance_interval(lab, *each) for each in mixed)]


_OURS: tuple[dict[str, Any], ...] = (
    {},
    {"orders": (0,)},
    {"rectifier": "predicted"},
    {"rectifier": "all"},
    {"rectifier": "all", "policy": "dp"},
)
_WHOLE_OUTPUT: tuple[dict[str, Any], ...] = (
    {"grid": "nominal"},
    {"grid": "actual"},
    {"abscissa": "logsnr", "rectifier": "all"},
)
_TOKENS: dict[str, Any] = {"orders": (0, 1, 2), "horizon": 4}  # every row that a token may choose
_CHOICES: tuple[dict[str, Any], ...] = ({"orders": (0, 1)}, _TOKENS, {**_TOKENS, "rectifier": "all"})
_FAMILIES: Mapping[str, Callable[[Bench], Sequence[Method]]] = {
    "ours": Bench.ours,
    "fewer-steps": _fewer,
    "deepcache": lambda bench: [rivals.deep_cache(bench.workshop.lab, n) for n in (2, 3, 4, 5, 6)],
    "fora": lambda bench: [rivals.fora(bench.workshop.lab, n) for n in (3, 5) if bench.workshop.lab.networks.modules],
    "taylorseer": _taylor,
    "teacache": _thresholds(calibration.tea_threshold, rivals.tea_cache, (4, 6, 8)),
    "first-block": _thresholds(calibration.block_threshold, rivals.first_block_cache, (3, 5, 7)),
    "output-cache": _thresholds(calibration.output_threshold, rivals.output_cache, (4, 6, 8)),
    "random": lambda bench: [bench.random(share) for share in SHARES if bench.deep(share).computed > _FEWEST],
    "guidance-interval": _guidance,
}
