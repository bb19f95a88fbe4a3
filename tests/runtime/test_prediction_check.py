"""A manifest whose masks and graphs disagree is refused when it is written and when a bundle is opened."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from latentrelay.runtime import Bundle
from latentrelay.runtime.errors import ManifestError
from latentrelay.runtime.manifest import Component, Manifest, Port, PredictionSpec, PreviewSpec, StepMask

FEATURE, PROBE = (2, 2, 4, 2, 2), (2, 2, 8, 2, 2)
FULL_RUN = ("full", "predicted", "full", "predicted")
MASKS = (StepMask(0, 1, FULL_RUN), StepMask(2, 2, ("full", "predicted")))
HOT = StepMask(0, 3, ("full", "predicted", "predicted", "predicted"), "hot")
SPEC = PredictionSpec("whole_output", FEATURE, MASKS)
CHOOSING = replace(SPEC, probe="P1", metric="l2", probe_shape=PROBE, fallback_threshold=0.5)


def ladder(role: str, *shape: int, dtype: str = "float32", new: bool = False) -> Port:
    return Port("next_" * new + role, role, dtype, shape)


def parts(kit: SimpleNamespace, probe: bool = False) -> dict[str, Component]:
    """The tiny bundle's components with predicted steps (their files are those of the plain bundle)."""
    found = kit.components()
    base = found["step_full"]
    shapes = {"feature_ladder": FEATURE, **({"probe_ladder": PROBE} if probe else {})}
    inputs = (*base.inputs, Port("split_row", "split_row", "int64", ()))
    inputs += tuple(ladder(role, *shape) for role, shape in shapes.items())
    news = tuple(ladder(role, *shape, new=True) for role, shape in shapes.items())
    chosen = (Port("choices", "choices", "int64", (3,)), Port("probe_error", "probe_error", "float32", ()))
    found["step_full"] = Component("step_full", base.path, inputs, (*base.outputs, *news))
    predicted = (*base.outputs, *(chosen if probe else ()))
    found["step_predicted"] = Component("step_predicted", base.path, inputs, predicted)
    return found


def without(ports: tuple[Port, ...], role: str) -> tuple[Port, ...]:
    return tuple(port for port in ports if port.role != role)


def with_port(ports: tuple[Port, ...], role: str, **changes: Any) -> tuple[Port, ...]:
    return tuple(replace(port, **changes) if port.role == role else port for port in ports)


def test_what_fits_is_read_again(bundle_folder: Path, kit: SimpleNamespace) -> None:
    hot = replace(SPEC, masks=(*MASKS, HOT, StepMask(1, 4, ("full", "full", "predicted"), "hot")))
    for spec, probe in ((SPEC, False), (CHOOSING, True), (replace(SPEC, masks=()), False), (hot, False)):
        manifest = kit.reseal(bundle_folder, components=parts(kit, probe), prediction=spec)
        assert Bundle.open(bundle_folder).manifest.prediction == spec
        assert Manifest.from_json_bytes(manifest.to_json_bytes()) == manifest


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ((StepMask(0, 1, FULL_RUN[:3]),), "split 0 has 3 entries, expected 4"),
        ((StepMask(0, 1, (*FULL_RUN, "full")),), "split 0 has 5 entries, expected 4"),
        ((StepMask(0, 1, ("predicted", "full", "full", "full")),), "split 0 predicts its first step"),
        ((StepMask(0, 1, ("full", "guess", "full", "full")),), "has the entry guess"),
        ((StepMask(4, 1, ()),), "split 4 is out of range"),
        ((StepMask(-1, 1, FULL_RUN),), "split -1 is out of range"),
        ((StepMask(0, 0, FULL_RUN),), r"got rows \[0\], expected 1 \.\. 1"),
        ((StepMask(0, 3, FULL_RUN), MASKS[1]), r"got rows \[3, 2\]"),
        ((MASKS[0], replace(MASKS[1], row=1)), r"got rows \[1, 1\]"),
        ((MASKS[0], replace(MASKS[0], row=2)), r"level normal got splits \[0, 0\]"),
        ((*MASKS, HOT, replace(HOT, row=4)), r"level hot got splits \[0, 0\]"),
        ((*MASKS, replace(HOT, level="cold")), r"split 0 has level cold, expected normal \| hot"),
        ((*MASKS, replace(HOT, mask=FULL_RUN)), "split 0, level hot, computes 2 steps, expected fewer than the 2 of"),
        ((replace(HOT, split=1, row=1, mask=("full",) * 3),), "computes 3 steps, expected fewer than the 3 of"),
        ((*MASKS, replace(HOT, row=2)), r"got rows \[1, 2, 2\]"),
    ],
)
def test_masks_and_rows(bundle_folder: Path, kit: SimpleNamespace, masks: tuple[StepMask, ...], words: str) -> None:
    with pytest.raises(ManifestError, match=words) as caught:
        kit.make_manifest(bundle_folder, components=parts(kit), prediction=replace(SPEC, masks=masks))
    assert caught.value.exit_status == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "noise"}, "target: got noise"),
        ({"ladder_dtype": "int8"}, "ladder_dtype: got int8"),
        ({"metric": "cosine"}, "belong together"),
        ({"probe": "P1", "metric": "l1", "probe_shape": PROBE}, "metric: got l1"),
        ({"probe": "P1", "metric": "l2", "probe_shape": (3, *PROBE[1:])}, "differ in rungs"),
        ({"feature_shape": (2, 4, 2, 2)}, "feature_shape: got"),
        ({"feature_shape": (2, 2, 4, 4, 4)}, "expected the latents'"),
        ({"fallback_threshold": 0.5}, "needs a probe"),
        ({"fallback_threshold": -1.0}, "expected a finite number"),
    ],
)
def test_settings(bundle_folder: Path, kit: SimpleNamespace, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        kit.make_manifest(bundle_folder, components=parts(kit), prediction=replace(SPEC, **changes))


@pytest.mark.parametrize("component", ["step_full", "step_predicted"])
@pytest.mark.parametrize(
    ("role", "changes", "words"),
    [
        ("split_row", None, "has no input split_row"),
        ("split_row", {"dtype": "float32"}, r"split_row: got float32 \[\], expected int64"),
        ("feature_ladder", None, "inputs: feature_ladder is missing"),
        ("feature_ladder", {"dtype": "float16"}, r"is float16 \[2, 2, 4, 2, 2\], expected prediction's float32"),
        ("feature_ladder", {"shape": (3, 2, 4, 2, 2)}, r"float32 \[3, 2, 4, 2, 2\], expected prediction's"),
        ("probe_ladder", None, "inputs: probe_ladder is missing"),
    ],
)
def test_inputs_of_the_step_graphs(
    bundle_folder: Path, kit: SimpleNamespace, component: str, role: str, changes: dict[str, Any] | None, words: str
) -> None:
    found = parts(kit, probe=True)
    ports = found[component].inputs
    ports = without(ports, role) if changes is None else with_port(ports, role, **changes)
    found[component] = replace(found[component], inputs=ports)
    with pytest.raises(ManifestError, match=words):
        kit.make_manifest(bundle_folder, components=found, prediction=CHOOSING)


def test_outputs_of_the_step_graphs(bundle_folder: Path, kit: SimpleNamespace) -> None:
    def refused(words: str, spec: PredictionSpec | None = CHOOSING, probe: bool = True, **found: Any) -> None:
        with pytest.raises(ManifestError, match=words):
            kit.make_manifest(bundle_folder, components={**parts(kit, probe), **found}, prediction=spec)

    full, predicted = parts(kit, probe=True)["step_full"], parts(kit, probe=True)["step_predicted"]
    refused(
        "step_full.outputs: feature_ladder is missing",
        step_full=replace(full, outputs=without(full.outputs, "feature_ladder")),
    )
    refused(
        "outputs .* expected .*'probe_error'",
        step_predicted=replace(predicted, outputs=without(predicted.outputs, "probe_error")),
    )
    refused(
        "next_x0_prev is not what step_full returns",
        step_predicted=replace(predicted, outputs=with_port(predicted.outputs, "x0_prev", shape=(1, 8, 2, 2))),
    )
    refused("probe_ladder is there, but no predictor is chosen", SPEC)
    refused("role feature_ladder, but there is no prediction", None)


def test_predicted_steps_without_their_graph(bundle_folder: Path, kit: SimpleNamespace) -> None:
    found = parts(kit)
    del found["step_predicted"]
    with pytest.raises(ManifestError, match="components has no step_predicted"):
        kit.make_manifest(bundle_folder, components=found, prediction=SPEC)
    assert kit.make_manifest(bundle_folder, components=found, prediction=replace(SPEC, masks=())).prediction
    with pytest.raises(ManifestError, match="has no input split_row"):  # the plain step graph
        kit.make_manifest(bundle_folder, components=kit.components(), prediction=replace(SPEC, masks=()))


@pytest.mark.parametrize(
    ("splits", "rows", "words"),
    [
        ([[0, FULL_RUN], [1, ["full"] * 3], [2, ["full", "predicted"]]], {"0": 1, "2": 2}, None),
        (
            [[0, FULL_RUN], [2, ["full", "full"]]],
            {"0": 1},
            "split 2 has full, predicted, expected .* no predicted step",
        ),
        ([[0, FULL_RUN], [1, ["full", "full", "predicted"]], [2, ["full", "predicted"]]], {}, "split 0 has row 1"),
        (
            [[0, [*FULL_RUN[:3], "full"]], [2, ["full", "predicted"]]],
            {},
            "split 0 has full, predicted, full, predicted",
        ),
        ([[0, FULL_RUN], [2, ["full", "predicted"]]], {"0": 2, "2": 1}, "split 0 has row 1, expected the plan's 2"),
        ("nonsense", {}, "it is not a plan"),
    ],
)
def test_masks_that_are_not_the_plans(
    bundle_folder: Path, kit: SimpleNamespace, splits: Any, rows: dict[str, int], words: str | None
) -> None:
    listed = splits if isinstance(splits, str) else [{"split": k, "mask": list(mask)} for k, mask in splits]
    plan = {"schema_version": "1.3", "recipe": {"splits": listed, "prediction": {"rows": rows}}}
    (bundle_folder / "plan.json").write_text(json.dumps(plan))
    kit.reseal(bundle_folder, components=parts(kit), prediction=SPEC)
    if words is None:
        assert Bundle.open(bundle_folder, verify=False).manifest.prediction == SPEC
    else:
        with pytest.raises(ManifestError, match=words) as caught:
            Bundle.open(bundle_folder, verify=False)
        assert caught.value.path == "plan.json"


@pytest.mark.parametrize(
    ("level", "row", "words"),
    [
        ({"level": "hot"}, {"0 hot": 3}, None),
        ({"level": "hot"}, {"0 hot": 4}, "split 0, level hot, has row 3, expected the plan's 4"),
        ({"level": "hot"}, {"1 hot": 3}, "split 0, level hot, has row 3, expected the plan's None"),
        (None, {}, "split 0, level hot, has full, predicted, .* expected what the plan has: no predicted step"),
        (
            {"level": "hot", "mask": ["full", "full", "full", "predicted"]},
            {"0 hot": 3},
            "expected what the plan has: full",
        ),
    ],
)
def test_hot_masks_and_their_rows_are_the_plans(
    bundle_folder: Path, kit: SimpleNamespace, level: dict[str, Any] | None, row: dict[str, int], words: str | None
) -> None:
    spec = replace(SPEC, masks=(*MASKS, HOT))
    splits = [{"split": mask.split, "mask": list(mask.mask), "level": "normal"} for mask in MASKS]
    splits += [] if level is None else [{"split": 0, "mask": list(HOT.mask), **level}]
    plan = {"schema_version": "1.4", "recipe": {"splits": splits, "prediction": {"rows": {"0": 1, "2": 2, **row}}}}
    (bundle_folder / "plan.json").write_text(json.dumps(plan))
    kit.reseal(bundle_folder, components=parts(kit), prediction=spec)
    if words is None:
        assert Bundle.open(bundle_folder, verify=False).manifest.prediction == spec
    else:
        with pytest.raises(ManifestError, match=words):
            Bundle.open(bundle_folder, verify=False)


def test_factors_of_the_preview(bundle_folder: Path, kit: SimpleNamespace) -> None:
    rows, bias = ((0.25, 0.5, -0.125, 0.0),) * 3, (0.5, 0.25, 0.125)
    kit.reseal(bundle_folder, preview=PreviewSpec(rows, bias))
    assert Bundle.open(bundle_folder).manifest.preview == PreviewSpec(rows, bias)
    for preview, words in (
        (PreviewSpec(rows[:2], bias), r"rows of \[4, 4\] and 3 in bias, expected 3 of 4"),
        (PreviewSpec((*rows[:2], rows[0][:3]), bias), r"rows of \[4, 4, 3\]"),
        (PreviewSpec(rows, bias[:2]), "2 in bias"),
    ):
        with pytest.raises(ManifestError, match=words):
            kit.make_manifest(bundle_folder, preview=preview)
    with pytest.raises(ManifestError, match="finite"):
        kit.make_manifest(bundle_folder, preview=PreviewSpec(rows, (0.0, 0.0, float("nan"))))


def test_a_plan_with_predicted_steps_and_a_manifest_without(bundle_folder: Path, kit: SimpleNamespace) -> None:
    recipe = {"splits": [{"split": 0, "mask": list(FULL_RUN)}], "prediction": {"rows": {"0": 1}}}
    (bundle_folder / "plan.json").write_text(json.dumps({"recipe": recipe}))
    kit.reseal(bundle_folder)
    with pytest.raises(
        ManifestError, match="split 0 has no predicted step, expected what the plan has: full, predicted"
    ):
        Bundle.open(bundle_folder)
