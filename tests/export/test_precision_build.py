"""Builds in a precision: what ships, what the plan and the manifest record, what a second build takes over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from latentrelay.compress.plan import Plan
from latentrelay.compress.precision import PrecisionRecipe
from latentrelay.device_profiles import load_profile
from latentrelay.export import ExportResult, export
from latentrelay.export.calibration import Calibration, default_calibration, split_prompts
from latentrelay.export.package_style import PackageStyle
from latentrelay.runtime import Bundle, Session, generate
from latentrelay.runtime.errors import RequestError

CALIBRATION = Calibration(("a red cat", "the cat", "the red thing", "cat on the grass"), ("a cat", "the", "in red"))
STAGES = ("reference_run", "text_encoder", "vae_decoder", "unet", "parity", "ranges", "quantise")


@pytest.fixture(scope="module")
def wide(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny pipeline wide enough for integer kernels to have something to do."""
    return tiny.make_pipeline(tmp_path_factory.mktemp("wide"), widths=(16, 32), heads=2, text_dim=32)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("built")


def build(pipeline: Any, folder: Path, name: str, **options: Any) -> ExportResult:
    settings = {"num_steps": 3, "calibration": CALIBRATION, "work": folder / "work", **options}
    return export(pipeline, "x86-laptop-vnni", folder / name, **settings)


@pytest.fixture(scope="module")
def w8a8(wide: Any, work: Path) -> ExportResult:
    return build(wide, work, "w8a8", precision="target")


def test_a_w8a8_bundle_runs_and_says_what_it_is(w8a8: ExportResult) -> None:
    bundle = Bundle.open(w8a8.bundle)
    manifest, plan = bundle.manifest, Plan.load(w8a8.bundle)
    assert (w8a8.precision, manifest.precision, plan.recipe.quantisation["precision"]) == ("w8a8",) * 3
    assert {name: each.precision for name, each in manifest.components.items()} == {
        "text_encoder": "w8a16", "unet": None, "step_full": None, "vae_decoder": "fp32",
    }  # fmt: skip
    recipe = PrecisionRecipe.from_json(plan.recipe.quantisation)
    integer = [name for name, rule in recipe.rules.items() if rule.integer]
    kernels = manifest.quality["kernels"]
    assert kernels["integer_convs"] + kernels["integer_linears"] == len(integer) > 20
    with Session(bundle) as session:
        assert np.isfinite(generate(session, "a red cat", seed=1).image).all()
        report = session.selftest()
    assert report.ok
    assert report.snr_db["step_full"] > report.tolerance("step_full") == 25.0 < report.tolerance("vae_decoder")


def test_the_plan_records_every_candidate_and_ships_the_better(w8a8: ExportResult) -> None:
    plan = Plan.load(w8a8.bundle)
    evidence = {each.name: each for each in plan.recipe.corrections}
    assert {"compensation: ptqd", "compensation: gain", "compensation: affine"} <= set(evidence)
    kept = [each for each in evidence.values() if each.verdict == "kept"]
    assert len(kept) <= 1
    assert (plan.tables.compensation_gain is not None) == bool(kept)
    for each in kept:
        assert each.error_with < each.error_without


def test_step_graph_and_unet_share_one_weights_file(w8a8: ExportResult) -> None:
    places = set()
    for name in ("model.onnx", "step_full.onnx"):
        graph = onnx.load(w8a8.bundle / "unet" / name, load_external_data=False).graph
        places |= {
            entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"
        }
    assert places == {"model.onnx_data"}


def test_a_second_build_runs_no_stage_and_another_schedule_only_what_hangs_on_it(
    wide: Any, work: Path, w8a8: ExportResult
) -> None:
    again = build(wide, work, "again", precision="w8a8")
    assert {*STAGES, "kernels", "compensation", "text_encoder_weights"} <= set(again.reused)
    assert Plan.load(again.bundle) == Plan.load(w8a8.bundle)
    other = build(wide, work, "other", precision="w8a8", num_steps=4)
    assert {"text_encoder", "vae_decoder", "unet", "text_encoder_weights"} <= set(other.reused)
    assert not {"reference_run", "ranges", "compensation"} & set(other.reused)


def test_a_build_that_was_cut_off_goes_on(wide: Any, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentrelay.export import precision_pass

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(precision_pass, "quantise", stop)
        with pytest.raises(KeyboardInterrupt):
            build(wide, work, "cut", precision="w4a8", work=work / "cut.work")
    assert not (work / "cut").exists()
    done = build(wide, work, "cut", precision="w4a8", work=work / "cut.work")
    assert {"reference_run", "text_encoder", "vae_decoder", "unet", "parity", "ranges"} <= set(done.reused)
    assert "quantise" in done.seconds


def test_another_size_and_another_split_share_no_runs(wide: Any, work: Path, w8a8: ExportResult) -> None:
    done = build(wide, work, "larger", precision="w8a8", height=32, width=16)
    assert not {"reference_run", "unet", "ranges", "quantise", "compensation"} & set(done.reused)
    profile = load_profile("x86-laptop-vnni")
    later = profile.model_copy(update={"defaults": profile.defaults.model_copy(update={"split": 20})})
    other = export(
        wide, later, work / "later", precision="w8a8", num_steps=3, calibration=CALIBRATION, work=work / "work"
    )
    assert "unet" in other.reused
    assert not {"ranges", "compensation"} & set(other.reused)


def test_one_held_out_prompt_decides_nothing_and_breaks_nothing(wide: Any, work: Path) -> None:
    alone = Calibration(("a red cat", "the cat"), ("a cat",))
    done = export(wide, "x86-laptop-vnni", work / "alone", precision="w8a8", num_steps=2, calibration=alone)
    assert done.quality["compensation"]["kept"] == "none"
    assert done.quality["compensation"]["gain_db_95"] in ([None, None], [0.0, 0.0])
    assert Plan.load(done.bundle).tables.compensation_gain is None


def test_a_work_folder_inside_the_bundle_is_refused(wide: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="work folder"):
        export(wide, "x86-laptop-vnni", tmp_path / "b", work=tmp_path / "b" / "work")


def test_an_apple_build_has_packages_with_tables_of_their_own(wide: Any, work: Path) -> None:
    settings: dict[str, Any] = {"precision": "w8a16", "num_steps": 3, "calibration": CALIBRATION}
    done = export(wide, "iphone-15-pro", work / "apple", work=work / "work", **settings)
    packages = {each.role: each for each in Bundle.open(done.bundle).manifest.coreml}
    assert set(packages) == {"text_encoder", "step_full", "vae_decoder"}
    assert {each.precision for each in packages.values()} == {"w8a16", "fp16"}
    assert min(each.parity_db for each in packages.values()) >= 25.0
    assert all((done.bundle / each.path).is_dir() for each in packages.values())
    plan = Plan.load(done.bundle)
    assert {"compensation: ptqd", "compensation: gain"} <= {each.name for each in plan.recipe.corrections}
    assert done.quality["compensation"]["held_out_runs"] == len(CALIBRATION.held_out)
    graph = onnx.load(done.bundle / "unet" / "step_full.onnx", load_external_data=False).graph
    assert not [each.name for each in graph.initializer if "compensation" in each.name]
    again = export(wide, "iphone-15-pro", work / "apple2", work=work / "work", **settings)
    assert {"coreml", "compensation"} <= set(again.reused)
    with pytest.raises(RequestError, match="palette5"):
        PackageStyle("palette5")
    with pytest.raises(RequestError, match="only a Core ML profile"):
        export(wide, "pixel-8", work / "no", packages=PackageStyle("palette6"))
    style = PackageStyle("palette6", apple_layout=True)
    styled = export(wide, "iphone-15-pro", work / "styled", work=work / "work", packages=style, **settings)
    step = next(each for each in styled.coreml if each.role == "step_full")
    assert {port.name: port.shape for port in step.inputs}["prompt_embeds"] == (2, 32, 1, 16)


@pytest.mark.parametrize("precision", ["fp16", "w8a16", "w4a16", "w4a8"])
def test_every_precision_builds_and_runs(precision: str, wide: Any, work: Path, w8a8: ExportResult) -> None:
    done = build(wide, work, precision, precision=precision)
    with Session(Bundle.open(done.bundle)) as session:
        assert np.isfinite(generate(session, "a red cat", seed=1).image).all()
        assert session.selftest().ok
    assert done.parity_db["unet"] > {"fp16": 50, "w8a16": 30, "w4a16": 10, "w4a8": 10}[precision]
    assert "text_encoder" in done.reused


def test_few_steps_take_float_activations_only(tiny: Any, tmp_path: Path) -> None:
    pipeline = tiny.make_pipeline(tmp_path / "made", sampler="lcm")
    settings: dict[str, Any] = {"num_steps": 2, "few_step": True, "calibration": CALIBRATION}
    with pytest.raises(RequestError, match="few-step run cannot be calibrated"):
        export(pipeline, "x86-laptop-vnni", tmp_path / "a", precision="w8a8", **settings)
    done = export(pipeline, "x86-laptop-vnni", tmp_path / "b", precision="w8a16", **settings)
    assert Plan.load(done.bundle).tables.compensation_gain is None


def test_a_precision_nobody_knows_is_refused(wide: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="w4a4"):
        export(wide, "x86-laptop-vnni", tmp_path / "a", precision="w4a4")
    assert not (tmp_path / "a").exists()


def test_calibration_prompts_are_apart() -> None:
    plain = default_calibration(20, 10)
    assert (len(plain.prompts), len(plain.held_out), len({*plain.prompts, *plain.held_out})) == (20, 10, 30)
    assert not {*plain.seeds(held_out=True)} & {*plain.seeds(held_out=False)}
    own = split_prompts(("a", "b", "c", "d", "a", "e"))
    assert (own.prompts, own.held_out) == (("a", "b", "c", "e"), ("d",))
    with pytest.raises(RequestError, match="also fitted"):
        Calibration(("a", "b"), ("b",))
    with pytest.raises(RequestError, match="too few"):
        split_prompts(("a", "b", "b"))
