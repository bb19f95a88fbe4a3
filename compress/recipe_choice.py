"""Which layers a recipe spares: the worst ones, until the bytes, the milliseconds and the float share are spent.

In: a recipe, the error that each layer adds alone, what sparing a layer costs, and the budget. Out: the recipe with the
spared layers' rules raised, each with its reason. A layer of 4-bit weights is raised to 8 bits and stays integer; any
other becomes float. The order is by error taken away per share of the budget spent. `pareto_front` picks the points
(bytes, ms, dB) that no other point beats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from latentrelay.compress.errors import PrecisionError
from latentrelay.compress.layer_sensitivity import LayerSensitivity
from latentrelay.compress.precision import Layer, LayerRule, PrecisionRecipe

FLOAT_SHARE = 0.05  # of the multiply-adds at most in float
_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Budget:
    """What sparing layers may add: bytes, milliseconds a call, and the share of the multiply-adds in float in all."""

    extra_bytes: int
    extra_ms: float
    float_share: float = FLOAT_SHARE


@dataclass(frozen=True)
class ParetoPoint:
    """One recipe as measured. `spared`: how many layers it raises; `ms` one call; `psnr_db` of the final latents."""

    name: str
    spared: int
    bytes: int
    ms: float
    psnr_db: float


def weight_bytes(layer: Layer, rule: LayerRule) -> int:
    """Bytes of one layer's weights and scales in the file, low-rank branch included; biases and graph not."""
    out, columns = layer.shape[0], _product(layer.shape[1:])
    scales = 0 if rule.weights.startswith("float") else 4 * out * (-(-columns // rule.group) if rule.group else 1)
    return int(_BYTES[rule.weights] * out * columns) + scales + 2 * rule.rank * (out + columns)


def raised(rule: LayerRule) -> LayerRule:
    """What sparing a layer makes of its rule."""
    if rule.weights == "int4":
        return dataclasses.replace(rule, weights="int8", rank=0, reason="8 bits by measurement")
    return LayerRule(reason="kept in float by measurement")


def spare(recipe: PrecisionRecipe, names: Iterable[str]) -> PrecisionRecipe:
    """The recipe with the rules of `names` raised; raises PrecisionError for a layer that it does not have."""
    rules = dict(recipe.rules)
    for name in names:
        if name not in rules:
            raise PrecisionError("a layer to spare is unknown", got=name, expected="a layer of the recipe")
        rules[name] = raised(rules[name])
    return dataclasses.replace(recipe, rules=rules)


def spare_worst(
    recipe: PrecisionRecipe,
    layers: Iterable[Layer],
    sensitivities: Sequence[LayerSensitivity],
    budget: Budget,
    ms_per_mac: float = 0.0,
) -> PrecisionRecipe:
    """Raise layers while the budget lasts; one that does not fit is passed over and the next is tried.

    `ms_per_mac`: what one multiply-add costs more in float than in integers. Raises PrecisionError for a layer that the
    recipe does not have.
    """
    known = {layer.name: layer for layer in layers}
    total = max(1, sum(layer.macs for layer in known.values()))
    left_macs = max(0.0, budget.float_share * total - sum(known[name].macs for name in recipe.float_list.names))
    left = {"bytes": float(budget.extra_bytes), "ms": budget.extra_ms, "macs": left_macs}
    chosen: list[str] = []
    for _, name, cost in sorted(_candidates(recipe, known, sensitivities, left, ms_per_mac), key=lambda each: -each[0]):
        if all(cost[kind] <= left[kind] for kind in left):
            chosen.append(name)
            left = {kind: left[kind] - cost[kind] for kind in left}
    return spare(recipe, chosen)


def _candidates(
    recipe: PrecisionRecipe,
    known: Mapping[str, Layer],
    sensitivities: Sequence[LayerSensitivity],
    left: Mapping[str, float],
    ms_per_mac: float,
) -> list[tuple[float, str, dict[str, float]]]:
    """(error per share of the budget, layer, its cost) of every layer that is measured and quantised."""
    found = []
    for each in sensitivities:
        if each.name not in known or each.name not in recipe.rules:
            raise PrecisionError("sensitivity of an unknown layer", got=each.name, expected="a layer of the recipe")
        layer, rule = known[each.name], recipe.rules[each.name]
        if rule == raised(rule) or rule.weights == "float32":
            continue
        leaves_integer = rule.integer and not raised(rule).integer
        cost = {
            "bytes": float(weight_bytes(layer, raised(rule)) - weight_bytes(layer, rule)),
            "ms": ms_per_mac * layer.macs if leaves_integer else 0.0,
            "macs": float(layer.macs) if leaves_integer else 0.0,
        }
        share = max(cost[kind] / left[kind] if left[kind] > 0 else (1e9 if cost[kind] > 0 else 0.0) for kind in left)
        found.append((each.error / max(share, 1e-12), each.name, cost))
    return found


def pareto_front(points: Iterable[ParetoPoint]) -> tuple[ParetoPoint, ...]:
    """The points that no other beats: none has at most their bytes and ms and at least their dB, one of them better.
    Fewest bytes first."""
    every = tuple(points)

    def beats(a: ParetoPoint, b: ParetoPoint) -> bool:
        no_worse = a.bytes <= b.bytes and a.ms <= b.ms and a.psnr_db >= b.psnr_db
        return no_worse and (a.bytes, a.ms, a.psnr_db) != (b.bytes, b.ms, b.psnr_db)

    kept = [point for point in every if not any(beats(other, point) for other in every)]
    return tuple(sorted(kept, key=lambda point: (point.bytes, point.ms)))


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
