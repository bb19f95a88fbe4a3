"""Do a manifest's predicted steps fit its graphs: masks, rows, and the ports of both step graphs.

In: a `Manifest`. Raises ValueError, which the manifest turns into a ManifestError, so a bundle whose masks and graphs
disagree is refused when it is opened. `check_plan` does the same for the bundle's plan.json, from which the graphs'
tables were made. That the graphs are what the manifest declares is checked when they are loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentrelay.runtime.manifest import Component, Manifest, Port, PredictionSpec, StepMask

FULL, PREDICTED = "full", "predicted"
NORMAL, HOT = "normal", "hot"
LEVELS = (NORMAL, HOT)
STEP_FULL, STEP_PREDICTED = "step_full", "step_predicted"
_TARGETS, _METRICS, _DTYPES = ("whole_output", "deep_feature"), ("l2", "cosine"), ("float32", "float16")
LADDER_ROLES = ("feature_ladder", "probe_ladder")
_SELECTION = ("choices", "probe_error")


def check_predicted_steps(manifest: Manifest) -> None:
    """Raise ValueError where `manifest.prediction` and the step graphs' ports contradict each other."""
    spec, full = manifest.prediction, manifest.components[STEP_FULL]
    if spec is None:
        stray = [port.role for port in full.inputs + full.outputs if port.role in LADDER_ROLES]
        if stray:
            raise ValueError(f"components.{STEP_FULL} has the role {stray[0]}, but there is no prediction")
        return
    _check_settings(manifest, spec)
    for mask in spec.masks:
        _check_mask(mask, manifest.schedule.num_steps)
    rows = [mask.row for mask in spec.masks]
    if sorted(rows) != list(range(1, len(rows) + 1)):
        raise ValueError(
            f"prediction.masks: got rows {rows}, expected 1 .. {len(rows)}, each once; row 0 predicts none"
        )
    for level in LEVELS:
        splits = [mask.split for mask in spec.masks if mask.level == level]
        if len(set(splits)) != len(splits):
            raise ValueError(f"prediction.masks: level {level} got splits {splits}, expected each once")
    for mask in spec.masks:
        _check_hot(mask, spec)
    _check_full(full, spec)
    predicted = manifest.components.get(STEP_PREDICTED)
    if predicted is not None:
        _check_predicted(predicted, full, spec)
    elif any(PREDICTED in mask.mask for mask in spec.masks):
        raise ValueError(f"prediction.masks names predicted steps, but components has no {STEP_PREDICTED}")


def check_plan(manifest: Manifest, text: bytes) -> None:
    """Raise ValueError where the masks and rows of `text`, a bundle's plan.json, are not the manifest's."""
    try:
        recipe = json.loads(text)["recipe"]
        masks = {_key(each): tuple(each["mask"]) for each in recipe["splits"] if PREDICTED in each["mask"]}
        rows = {_named(name): row for name, row in recipe.get("prediction", {}).get("rows", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is not a plan: {type(error).__name__} {error}") from error
    declared = manifest.prediction.masks if manifest.prediction is not None else ()
    ours = {(mask.split, mask.level): mask for mask in declared if PREDICTED in mask.mask}
    for key in sorted(set(masks) | set(ours)):
        got, planned = ours.get(key), masks.get(key)
        where = f"prediction.masks: {_place(*key)}"
        if got is None or got.mask != planned:
            shown = "no predicted step" if got is None else ", ".join(got.mask)
            wanted = "no predicted step" if planned is None else ", ".join(planned)
            raise ValueError(f"{where} has {shown}, expected what the plan has: {wanted}")
        if got.row != rows.get(key):
            raise ValueError(f"{where} has row {got.row}, expected the plan's {rows.get(key)}")


def _key(planned: dict[str, Any]) -> tuple[int, str]:
    """A plan's split and level; plans before 1.4 have no level."""
    return int(planned["split"]), str(planned.get("level", NORMAL))


def _named(name: str) -> tuple[int, str]:
    """ "8" and "8 hot", as a plan names its rows."""
    split, _, level = name.partition(" ")
    return int(split), level or NORMAL


def _place(split: int, level: str) -> str:
    return f"split {split}" if level == NORMAL else f"split {split}, level {level},"


def _check_settings(manifest: Manifest, spec: PredictionSpec) -> None:
    for key, got, allowed in (("target", spec.target, _TARGETS), ("ladder_dtype", spec.ladder_dtype, _DTYPES)):
        if got not in allowed:
            raise ValueError(f"prediction.{key}: got {got}, expected {' | '.join(allowed)}")
    if manifest.guidance.branches != 2:
        raise ValueError("prediction: the ladders hold two guidance branches, and the bundle has one")
    choice = (spec.probe, spec.metric, spec.probe_shape)
    if any(item is None for item in choice) and any(item is not None for item in choice):
        raise ValueError("prediction: probe, metric and probe_shape belong together, got some without the others")
    if spec.metric is not None and spec.metric not in _METRICS:
        raise ValueError(f"prediction.metric: got {spec.metric}, expected {' | '.join(_METRICS)}")
    for key, shape in (("feature_shape", spec.feature_shape), ("probe_shape", spec.probe_shape)):
        if shape is not None and (len(shape) != 5 or shape[1] != 2 or min(shape) < 1):
            raise ValueError(f"prediction.{key}: got {list(shape)}, expected (rungs, 2, channels, rows, columns)")
    if spec.probe_shape is not None and spec.probe_shape[0] != spec.feature_shape[0]:
        raise ValueError("prediction: feature_shape and probe_shape differ in rungs, expected as many")
    latent = (manifest.latent.channels, manifest.latent.height, manifest.latent.width)
    if spec.target == "whole_output" and spec.feature_shape[2:] != latent:
        raise ValueError(f"prediction.feature_shape: got {list(spec.feature_shape)}, expected the latents' {latent}")
    limit = spec.fallback_threshold
    if limit is not None and not (math.isfinite(limit) and limit >= 0):
        raise ValueError(f"prediction.fallback_threshold: got {limit}, expected a finite number >= 0")
    if limit is not None and spec.probe is None:
        raise ValueError("prediction.fallback_threshold needs a probe, whose error it is about")


def _check_mask(mask: StepMask, num_steps: int) -> None:
    where = f"prediction.masks: {_place(mask.split, mask.level)}"
    if mask.level not in LEVELS:
        raise ValueError(f"prediction.masks: split {mask.split} has level {mask.level}, expected {' | '.join(LEVELS)}")
    if not 0 <= mask.split < num_steps:
        raise ValueError(f"{where} is out of range, expected 0 .. {num_steps - 1}")
    if len(mask.mask) != num_steps - mask.split:
        raise ValueError(f"{where} has {len(mask.mask)} entries, expected {num_steps - mask.split}, one a device step")
    unknown = [entry for entry in mask.mask if entry not in (FULL, PREDICTED)]
    if unknown:
        raise ValueError(f"{where} has the entry {unknown[0]}, expected {FULL} | {PREDICTED}")
    if mask.mask[0] != FULL:
        raise ValueError(f"{where} predicts its first step, which has no ladder yet, expected {FULL}")


def _check_hot(mask: StepMask, spec: PredictionSpec) -> None:
    """A hot run computes fewer steps than the split's normal one, which is the whole network where it has no mask."""
    if mask.level != HOT:
        return
    normal = next((each.mask for each in spec.masks if (each.split, each.level) == (mask.split, NORMAL)), None)
    most = len(mask.mask) if normal is None else normal.count(FULL)
    if mask.mask.count(FULL) >= most:
        raise ValueError(
            f"prediction.masks: {_place(mask.split, HOT)} computes {mask.mask.count(FULL)} steps, expected fewer than "
            f"the {most} of level {NORMAL}"
        )


def _check_full(full: Component, spec: PredictionSpec) -> None:
    _split_row(STEP_FULL, full)
    for side, ports in (("inputs", full.inputs), ("outputs", full.outputs)):
        _ladders(f"{STEP_FULL}.{side}", ports, spec)


def _check_predicted(predicted: Component, full: Component, spec: PredictionSpec) -> None:
    _split_row(STEP_PREDICTED, predicted)
    _ladders(f"{STEP_PREDICTED}.inputs", predicted.inputs, spec)
    roles = {port.role for port in full.outputs} - set(LADDER_ROLES)
    roles |= set(_SELECTION) if spec.probe is not None else set()
    got = {port.role for port in predicted.outputs}
    if got != roles:
        raise ValueError(f"components.{STEP_PREDICTED}: got outputs {sorted(got)}, expected {sorted(roles)}")
    made = {port.role: (port.dtype, port.shape) for port in full.outputs}
    for port in predicted.outputs:
        if made.get(port.role, (port.dtype, port.shape)) != (port.dtype, port.shape):
            raise ValueError(f"components.{STEP_PREDICTED}.{port.name} is not what {STEP_FULL} returns for {port.role}")


def _split_row(name: str, component: Component) -> None:
    port = _by_role(component.inputs).get("split_row")
    if port is None:
        raise ValueError(f"components.{name} has no input split_row, so it cannot follow a mask")
    if (port.dtype, port.shape) != ("int64", ()):
        raise ValueError(f"components.{name}.split_row: got {port.dtype} {list(port.shape)}, expected int64 []")


def _ladders(where: str, ports: Iterable[Port], spec: PredictionSpec) -> None:
    found = _by_role(ports)
    for role, shape in zip(LADDER_ROLES, (spec.feature_shape, spec.probe_shape), strict=True):
        port = found.get(role)
        if (port is None) != (shape is None):
            wanted = "is missing" if port is None else "is there, but no predictor is chosen by a probe"
            raise ValueError(f"components.{where}: {role} {wanted}")
        if port is not None and (port.dtype, port.shape) != (spec.ladder_dtype, shape):
            got, expected = f"{port.dtype} {list(port.shape)}", f"{spec.ladder_dtype} {list(shape or ())}"
            raise ValueError(f"components.{where}: {role} is {got}, expected prediction's {expected}")


def _by_role(ports: Iterable[Port]) -> dict[str, Port]:
    return {port.role: port for port in ports}
