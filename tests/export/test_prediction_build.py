"""Builds with predicted steps: what ships, what the manifest records, and that the runtime's run is the plan's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from latentrelay.compress.denoising_chain import Start
from latentrelay.compress.plan import Plan
from latentrelay.compress.predicted_chain import WholeOutput, predicted_chain
from latentrelay.compress.prediction import Prediction
from latentrelay.device_profiles import load_profile
from latentrelay.export import ExportResult, export
from latentrelay.export.calibration import Calibration
from latentrelay.export.compensation_file import TableCorrection
from latentrelay.export.prediction_pass import PredictionAsk
from latentrelay.runtime import Bundle, Session, generate
from latentrelay.runtime.errors import RequestError
from latentrelay.tools.precision_runs import deployed

CALIBRATION = Calibration(("a red cat", "the cat", "the red thing", "cat on the grass"), ("a cat", "the", "in red"))
STEPS, SPLIT = 8, 3  # the profile's own split of 8 steps, so that a build without predictions records the same runs


@pytest.fixture(scope="module")
def wide(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.make_pipeline(tmp_path_factory.mktemp("predicted"), widths=(16, 32), heads=2, text_dim=32)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("built")


def build(pipeline: Any, folder: Path, name: str, **options: Any) -> ExportResult:
    hot = options.pop("hot_speedup", None)
    ask = PredictionAsk(options.pop("speedup", 1.6), options.pop("target", "whole_output"), (0, SPLIT), hot)
    settings = {"num_steps": STEPS, "calibration": CALIBRATION, "work": folder / "work", "prediction": ask, **options}
    return export(pipeline, "x86-laptop-vnni", folder / name, **settings)


@pytest.fixture(scope="module")
def whole(wide: Any, work: Path) -> ExportResult:
    return build(wide, work, "whole", precision="w8a8")


def test_masks_are_in_plan_and_manifest(whole: ExportResult) -> None:
    manifest, plan = Bundle.open(whole.bundle).manifest, Plan.load(whole.bundle)
    spec = manifest.prediction
    assert spec is not None
    assert spec.target == "whole_output"
    masks = {each.split: each.mask for each in plan.recipe.splits}
    assert {each.split: each.mask for each in spec.masks} == {split: masks[split] for split in (0, SPLIT)}
    assert all(each.mask[0] == "full" and "predicted" in each.mask for each in spec.masks)
    assert all("predicted" not in mask for split, mask in masks.items() if split not in (0, SPLIT))
    parts = {each.name for each in plan.recipe.corrections if each.name.startswith("prediction, whole_output")}
    assert {"prediction, whole_output: rectifier", "prediction, whole_output: order above 0"} <= parts
    assert manifest.quality["prediction"]["why"].startswith("whole_output")
    assert whole.parity_db["step_predicted"] > 50
    assert whole.parity_db["predicted_run"] > 50


def test_the_runtimes_run_is_the_plans_run_in_numpy(whole: ExportResult) -> None:
    bundle, plan = Bundle.open(whole.bundle), Plan.load(whole.bundle)
    network = deployed(bundle, 1)
    tables = {name: each for name, each in plan.tables.arrays().items() if name.startswith("compensation_")}
    with Session(bundle, threads=1) as session:
        embeds, latents = session.encode("a red cat"), session.initial_latents(5)
        events = list(session.run_steps(latents, None, 0, embeds, 7.5))
        computed = list(session.run_steps(latents, None, 0, embeds, 7.5, predict=False))
    prediction = Prediction.of_plan(plan, 0)
    assert prediction is not None
    correction = TableCorrection(tables) if tables else None
    expected = list(
        predicted_chain(
            WholeOutput(network.open()), network.table, Start(0, latents, None, embeds), 7.5, prediction, correction
        )
    )
    assert tuple(event.kind for event in events) == prediction.mask
    peak = float(np.abs(expected[-1].next_latents).max())
    np.testing.assert_allclose(events[-1].latents, expected[-1].next_latents, atol=2e-3 * peak)
    assert {event.kind for event in computed} == {"full"}
    assert not np.array_equal(events[-1].latents, computed[-1].latents)


@pytest.fixture(scope="module")
def hot(wide: Any, work: Path, whole: ExportResult) -> ExportResult:
    return build(wide, work, "hot", precision="w8a8", hot_speedup=2.5)


def test_hot_masks_come_after_the_normal_ones_whose_tables_stay_bit_for_bit(
    whole: ExportResult, hot: ExportResult
) -> None:
    plain, plan, manifest = Plan.load(whole.bundle), Plan.load(hot.bundle), Bundle.open(hot.bundle).manifest
    assert {"quantise", "compensation", "step_costs"} <= set(hot.reused)
    assert manifest.prediction is not None
    masks = {(each.split, each.level): each for each in manifest.prediction.masks}
    assert {(0, "normal"), (SPLIT, "normal"), (0, "hot")} <= set(masks)
    rows = 1 + 2  # none, and one a normal split
    assert [masks[key].row for key in ((0, "normal"), (SPLIT, "normal"), (0, "hot"))] == [1, 2, rows]
    assert masks[0, "hot"].mask.count("full") < masks[0, "normal"].mask.count("full")
    before = plain.tables.arrays()
    for name, array in plan.tables.arrays().items():
        if name.startswith(("ladder", "candidates", "rectifier", "grid")):
            kept = before.get(name, np.zeros_like(array[:rows]))
            assert (len(array), array[:rows].tobytes()) == (1 + len(masks), kept.tobytes())
        else:
            assert array.tobytes() == before[name].tobytes()
    old = Bundle.open(whole.bundle).manifest.prediction
    assert old is not None
    assert manifest.prediction.masks[:2] == old.masks
    report = manifest.quality["prediction"]["hot"]
    assert report["speedup"] == 2.5
    assert report["splits"]["0"]["computed_steps"] == masks[0, "hot"].mask.count("full")
    assert hot.parity_db["predicted_run"] > 50


@pytest.mark.parametrize("level", ["normal", "hot"])
def test_a_bundle_with_hot_masks_gives_each_levels_chain(hot: ExportResult, level: Any) -> None:
    bundle, plan = Bundle.open(hot.bundle), Plan.load(hot.bundle)
    network = deployed(bundle, 1)
    tables = {name: each for name, each in plan.tables.arrays().items() if name.startswith("compensation_")}
    prediction = Prediction.of_plan(plan, 0, level)
    assert prediction is not None
    with Session(bundle, threads=1) as session:
        assert session.selftest().ok
        embeds, latents = session.encode("a red cat"), session.initial_latents(5)
        events = list(session.run_steps(latents, None, 0, embeds, 7.5, level=level))
    correction = TableCorrection(tables) if tables else None
    start = Start(0, latents, None, embeds)
    chain = predicted_chain(WholeOutput(network.open()), network.table, start, 7.5, prediction, correction)
    assert tuple(event.kind for event in events) == prediction.mask
    for event, step in zip(events, chain, strict=True):
        peak = float(np.abs(step.next_latents).max())
        np.testing.assert_allclose(event.latents, step.next_latents, atol=2e-3 * peak)


def test_the_preview_is_fitted_on_the_recorded_runs(whole: ExportResult) -> None:
    manifest = Bundle.open(whole.bundle).manifest
    assert manifest.preview is not None
    assert manifest.quality["preview"]["fitted_on"] == "recorded runs"
    assert np.array(manifest.preview.factors).shape == (3, manifest.latent.channels)


def test_a_run_that_predicts_nothing_is_the_plain_bundles(wide: Any, work: Path, whole: ExportResult) -> None:
    plain = build(wide, work, "plain", precision="w8a8", prediction=None)
    assert {"quantise", "compensation"} <= set(plain.reused)
    assert not (plain.bundle / "unet" / "step_predicted.onnx").exists()
    results = []
    for folder in (whole.bundle, plain.bundle):
        with Session(Bundle.open(folder), threads=1) as session:
            embeds, latents = session.encode("the red cat"), session.initial_latents(9)
            memory = np.full_like(latents, 0.25)
            start = SPLIT + 1  # a split without a mask
            results.append([event.latents for event in session.run_steps(latents, memory, start, embeds, 7.5)])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_are_shared_and_the_selftest_passes(whole: ExportResult) -> None:
    bundle = Bundle.open(whole.bundle)
    predicted = onnx.load(whole.bundle / "unet" / "step_predicted.onnx", load_external_data=False)
    assert "prompt_embeds" not in {value.name for value in predicted.graph.input}
    assert (whole.bundle / "unet" / "step_predicted.onnx").stat().st_size < 50_000
    with Session(bundle) as session:
        report = session.selftest()
        result = generate(session, "a red cat", seed=1)
    assert report.ok
    assert "step_predicted" in report.snr_db
    assert np.isfinite(result.pixels).all()


def test_a_second_build_takes_the_planned_steps_over(wide: Any, work: Path, whole: ExportResult) -> None:
    again = build(wide, work, "again", precision="w8a8")
    assert {"prediction", "step_costs", "preview"} <= set(again.reused)
    assert Plan.load(again.bundle) == Plan.load(whole.bundle)


def test_the_deep_feature_ships_its_shallow_path(wide: Any, work: Path) -> None:
    deep = build(wide, work, "deep", target="deep_feature", speedup=1.3)  # a tiny shallow path is a third of a step
    bundle = Bundle.open(deep.bundle)
    spec = bundle.manifest.prediction
    assert spec is not None
    assert (spec.target, spec.feature_shape[1:3]) == ("deep_feature", (2, 16))
    graph = onnx.load(deep.bundle / "unet" / "step_predicted.onnx", load_external_data=False).graph
    places = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    assert places == {"model.onnx_data"}
    assert deep.parity_db["predicted_run"] > 80
    with Session(bundle) as session:
        assert session.selftest().ok
        first, second = (generate(session, "the cat", seed=3).pixels for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_ladders_are_float16_where_the_devices_memory_would_be_passed(wide: Any, work: Path) -> None:
    plenty = load_profile("x86-laptop-vnni")
    short = plenty.model_copy(update={"memory": plenty.memory.model_copy(update={"application_ceiling_mib": 8})})
    ask = PredictionAsk(1.6, "whole_output", (0,))
    settings: dict[str, Any] = {"num_steps": STEPS, "calibration": CALIBRATION, "prediction": ask}
    done = export(wide, short, work / "short", work=work / "work", **settings)
    spec = Bundle.open(done.bundle).manifest.prediction
    assert spec is not None
    assert spec.ladder_dtype == Plan.load(done.bundle).recipe.prediction["ladder_dtype"] == "float16"
    assert done.parity_db["predicted_run"] > 50
    with Session(Bundle.open(done.bundle), threads=1) as session:
        assert session.selftest().ok
        assert generate(session, "the cat", seed=3).predicted_steps > 0


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        ({"speedup": 1.0}, "speedup"),
        ({"speedup": 2.0, "target": "all"}, "target"),
        ({"speedup": 2.0, "hot_speedup": 2.0}, "hot_speedup"),
        ({"speedup": 2.0, "hot_speedup": 101.0}, "hot_speedup"),
    ],
)
def test_what_cannot_be_asked(ask: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        PredictionAsk(**ask)


def test_splits_beyond_the_run_and_features_inside_packages_are_refused(wide: Any, work: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such split"):
        build(wide, work, "beyond", prediction=PredictionAsk(2.0, "auto", (STEPS,)))
    ask = PredictionAsk(2.0, "deep_feature")
    with pytest.raises(RequestError, match="Core ML"):
        export(wide, "iphone-15-pro", tmp_path / "b", num_steps=4, calibration=CALIBRATION, prediction=ask)
    assert not (tmp_path / "b").exists()


def test_an_apple_build_has_both_steps_as_packages(wide: Any, work: Path) -> None:
    settings: dict[str, Any] = {"precision": "fp16", "num_steps": 6, "calibration": CALIBRATION}
    ask = PredictionAsk(1.6, "auto", (0,), hot_speedup=2.2)
    done = export(wide, "iphone-15-pro", work / "apple", work=work / "work", prediction=ask, **settings)
    manifest = Bundle.open(done.bundle).manifest
    packages = {each.role: each for each in manifest.coreml}
    assert set(packages) == {"text_encoder", "step_full", "step_predicted", "vae_decoder"}
    assert packages["step_predicted"].parity_db > 40
    assert manifest.prediction is not None
    assert manifest.prediction.target == "whole_output"
    assert [(each.split, each.level) for each in manifest.prediction.masks] == [(0, "normal"), (0, "hot")]
    assert "prompt_embeds" not in {port.name for port in packages["step_predicted"].inputs}
    with Session(Bundle.open(done.bundle)) as session:  # the graphs beside the packages
        assert session.selftest().ok
