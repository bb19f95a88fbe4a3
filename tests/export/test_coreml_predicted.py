"""Predicted steps as Core ML packages of a tiny U-Net, run by the interpreter against the chain in NumPy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from latentrelay.compress.ladders import LadderSpec, ladder_rows
from latentrelay.compress.plan import Plan, PlanSource, SplitMask, Tables, full_plan
from latentrelay.compress.precision import LayerRule
from latentrelay.compress.solver_tables import solver_table
from latentrelay.device_profiles import load_profile
from latentrelay.export.coreml_bundle import CoreMLParts, feeds_of, write_coreml
from latentrelay.export.coreml_convert import check_operators, convert, load_program, save_package
from latentrelay.export.coreml_predicted import predicted_samples, step_modules
from latentrelay.export.mil_interpreter import MilProgram
from latentrelay.export.parity import Sample, collect_samples, snr_db
from latentrelay.export.reference_run import record_run
from latentrelay.runtime.coreml_backend import CoreMLBackend
from latentrelay.runtime.manifest import BackendSpec, Component, Port
from latentrelay.runtime.samplers import sampler_rule

RULE = sampler_rule("dpmsolver++")
STEPS, SPLIT, MASK = 8, 2, ("full", "full", "predicted", "predicted", "full", "predicted")


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def plan(target: str, orders: tuple[int, ...], metric: str | None, *, tables: bool = True) -> Plan:
    """Two rows of tables, the second one for SPLIT; with `tables` a rectifier and a compensation of random numbers."""
    rule = RULE
    scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", steps_offset=1, **dict(rule.overrides))
    table = solver_table(scheduler, STEPS)
    source = PlanSource("tiny", "sha256:0", "sd1")
    plain = full_plan(source, {}, "dpmsolver++", rule.scheduler_class, "sha256:0", table)
    spec = LadderSpec(orders)
    update, candidates = ladder_rows(MASK, SPLIT, STEPS, spec, spec.axis(table, "epsilon"))
    rng = np.random.default_rng(1)
    here = np.zeros((2, STEPS, 1, 1))
    here[1, [SPLIT + i for i, kind in enumerate(MASK) if kind == "predicted"]] = 0.05
    gain, offset = (here * rng.standard_normal((2, STEPS, 2, 4)) for _ in range(2))
    mixing = here[..., None] * rng.standard_normal((2, STEPS, 2, 1 + 2 * spec.rungs, 4))
    if target == "deep_feature":
        mixing[:, :, :, 3:] = 0.0
    recipe: Any = {
        "target": target, "probe": "P1" if metric else None, "metric": metric, "orders": list(orders), "horizon": 0,
        "abscissa": "step", "ladder": "backward", "ladder_dtype": "float32", "rows": {str(SPLIT): 1},
        "fallback_threshold": None, "report": {},
    }  # fmt: skip
    kept = Tables(
        np.ones(STEPS),
        compensation_gain=0.02 * rng.standard_normal((STEPS, 2, 4)) if tables else None,
        compensation_offset=0.02 * rng.standard_normal((STEPS, 2, 4)) if tables else None,
        ladder_update=np.stack([np.zeros_like(update), update]),
        candidates=np.stack([np.zeros_like(candidates), candidates]),
        rectifier_gain=gain if tables else None,
        rectifier_offset=offset if tables else None,
        rectifier_mixing=mixing if tables else None,
    )
    splits = tuple(SplitMask(k, MASK if k == SPLIT else ("full",) * (STEPS - k)) for k in range(STEPS + 1))  # type: ignore[arg-type]
    return Plan(replace(plain.recipe, prediction=recipe, splits=splits), kept)


def with_hot(made: Plan) -> Plan:
    """With a hot mask for SPLIT, of row 2: only the first step computed; its rectifier is the normal row's."""
    settings, mask = made.recipe.prediction, ("full", *["predicted"] * 5)
    spec = LadderSpec(tuple(settings["orders"]))
    axis = spec.axis(made.recipe.solver_table, "epsilon")
    update, candidates = ladder_rows(mask, SPLIT, STEPS, spec, axis)
    arrays = {
        name: np.concatenate([each, each[1:]]) if name.startswith(("ladder", "candidates", "rectifier")) else each
        for name, each in made.tables.arrays().items()
    }
    arrays["ladder_update"][2], arrays["candidates"][2] = update, candidates
    splits = (*made.recipe.splits, SplitMask(SPLIT, mask, "hot"))  # type: ignore[arg-type]
    prediction = {**settings, "rows": {**settings["rows"], f"{SPLIT} hot": 2}}
    return Plan(replace(made.recipe, splits=splits, prediction=prediction), Tables(**arrays))


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {
        "latents": rng.standard_normal((1, 4, 8, 8), dtype=np.float32),
        "x0_prev": rng.standard_normal((1, 4, 8, 8), dtype=np.float32),
        "prompt_embeds": rng.standard_normal((2, 7, 24), dtype=np.float32),
        "guidance": np.array(4.0, np.float32),
    }


def packages(network: Any, made: Plan, samples: Any, folder: Path, precision: str = "fp32") -> dict[str, Any]:
    """Both steps converted, saved and read back: role -> (program, inputs)."""
    found = {}
    for role, (module, inputs, outputs) in step_modules(network, made, samples, apple_layout=False).items():
        keep = ("head", "guess", "tail", "time_proj")
        model = convert(
            module, inputs, outputs, target="iOS17", compute_units="ALL", precision=precision, keep_float32=keep
        )
        path = folder / f"{role}.mlpackage"
        save_package(model, path)
        check_operators(load_program(path), "iOS17")
        found[role] = (MilProgram(path), inputs)
    return found


CASES = {
    "deep feature, chosen by token": ("deep_feature", (0, 1), "l2"),
    "whole output, three orders by cosine": ("whole_output", (0, 1, 2), "cosine"),
    "whole output, order 1": ("whole_output", (1,), None),
}


@pytest.mark.parametrize("case", CASES)
def test_both_steps_are_the_chain_in_numpy(case: str, tmp_path: Path) -> None:
    network, made = unet(), plan(*CASES[case])
    samples = predicted_samples(network, made, start())
    assert [int(each.inputs["step"]) for each in samples["step_full"]] == [2, 3, 6]
    assert [int(each.inputs["step"]) for each in samples["step_predicted"]] == [4, 5, 7]
    assert np.isnan(samples["step_full"][0].inputs["feature_ladder"]).all()
    programs = packages(network, made, samples, tmp_path)
    reads_text = CASES[case][0] == "deep_feature" or CASES[case][2] is not None
    assert ("prompt_embeds" in programs["step_predicted"][0].inputs) is reads_text
    for role, (program, inputs) in programs.items():
        for each in samples[role]:
            got = program(feeds_of(inputs, each))
            assert set(each.outputs) == set(got)
            for name, expected in each.outputs.items():
                assert snr_db(expected, got[name].reshape(expected.shape)) > 80, (role, name)


def test_what_was_never_written_is_not_read(tmp_path: Path) -> None:
    """The run's first step gets NaN ladders; a predicted step that reads no memory or rung gets NaN there."""
    network, made = unet(), plan("deep_feature", (0, 1), "l2", tables=False)
    samples = predicted_samples(network, made, start())
    program, inputs = packages(network, made, samples, tmp_path)["step_full"]
    feeds = feeds_of(inputs, samples["step_full"][0])
    made_ladders = program(feeds)
    assert all(np.isfinite(array).all() for array in made_ladders.values())
    np.testing.assert_array_equal(made_ladders["next_feature_ladder"][1], 0.0)
    row_zero = program({**feeds, "split_row": np.array([0], np.int32)})
    np.testing.assert_array_equal(row_zero["next_latents"], made_ladders["next_latents"])
    np.testing.assert_array_equal(row_zero["next_feature_ladder"], 0.0)


def test_the_hot_rows_are_in_the_same_packages_and_checked() -> None:
    network, made = unet(), with_hot(plan("whole_output", (1,), None))
    samples = predicted_samples(network, made, start())
    for cases in samples.values():
        assert [int(each.inputs["split_row"]) for each in cases] == [1, 1, 1, 2]
    assert int(samples["step_predicted"][3].inputs["step"]) == 3
    for role, (module, inputs, outputs) in step_modules(network, made, samples, apple_layout=False).items():
        for each in samples[role]:
            feeds = feeds_of(inputs, each)
            with torch.no_grad():
                got = module(*(torch.from_numpy(feeds[one.name]) for one in inputs))
            for name, array in zip(outputs, got, strict=True):
                expected = np.asarray(each.outputs[name])
                assert snr_db(expected, array.numpy().reshape(expected.shape)) > 100, (role, name)


@pytest.mark.parametrize("apple_layout", [False, True])
def test_the_modules_are_the_chain_before_they_are_converted(apple_layout: bool) -> None:
    network, made = unet(), plan("deep_feature", (0, 1), "l2")
    samples = predicted_samples(network, made, start())
    for role, (module, inputs, outputs) in step_modules(network, made, samples, apple_layout=apple_layout).items():
        shapes = {each.name: each.shape for each in inputs}
        assert shapes["prompt_embeds"] == ((2, 24, 1, 7) if apple_layout else (2, 7, 24))
        for each in samples[role]:
            feeds = feeds_of(inputs, each)
            with torch.no_grad():
                got = module(*(torch.from_numpy(feeds[name]) for name in shapes))
            for name, array in zip(outputs, got, strict=True):
                expected = np.asarray(each.outputs[name])
                assert snr_db(expected, array.numpy().reshape(expected.shape)) > 100, (role, name)


def test_float16_networks_keep_ladders_and_tails_in_float32(tmp_path: Path) -> None:
    network, made = unet(), plan("deep_feature", (1,), None)
    samples = predicted_samples(network, made, start())
    for role, (program, inputs) in packages(network, made, samples, tmp_path, "fp16").items():
        for each in samples[role]:
            got = program(feeds_of(inputs, each))
            for name, expected in each.outputs.items():
                assert got[name].dtype == np.float32
                assert snr_db(expected, got[name]) > 35, (role, name)


def test_a_bundle_holds_packages_of_both_steps_that_the_backend_runs(tiny: Any, tmp_path: Path) -> None:
    pipeline, made, rule = tiny.make_pipeline(tmp_path / "source"), plan("deep_feature", (0, 1), "l2"), RULE
    scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **dict(rule.overrides))
    run = record_run(pipeline, scheduler, STEPS, 16, 16, 7.5, rule)
    plain = replace(made.recipe, prediction={}, splits=tuple(SplitMask(k, ("full",) * (STEPS - k)) for k in (0, SPLIT)))
    samples = collect_samples(pipeline, Plan(plain, Tables(np.ones(STEPS))), run, rule)
    parts = CoreMLParts(pipeline.unet, pipeline.text_encoder, pipeline.vae)
    names = ("conv_in", "mid_block.resnets.0.conv1", "up_blocks.1.resnets.1.conv1")
    rules = {name: LayerRule(weights="int8", activations="int8") for name in names}
    (tmp_path / "bundle").mkdir()
    entries = write_coreml(
        tmp_path / "bundle", parts, made, load_profile("iphone-15-pro"), "w8a8", samples, rules=rules
    )
    roles = {each.role: each for each in entries}
    assert list(roles) == ["text_encoder", "step_full", "step_predicted", "vae_decoder"]
    assert roles["step_predicted"].path == "coreml/Stable_Diffusion_version_tiny_unet_predicted.mlpackage"
    assert roles["step_predicted"].bytes < roles["step_full"].bytes
    assert {port.role for port in roles["step_full"].outputs} == {
        "latents",
        "x0_prev",
        "feature_ladder",
        "probe_ladder",
    }

    case = predicted_samples(pipeline.unet, made, samples["step_full"][0].inputs)["step_predicted"][0]
    sides = [
        tuple(Port(name, name.removeprefix("next_"), str(array.dtype), array.shape) for name, array in side.items())
        for side in (case.inputs, case.outputs)
    ]
    backend = CoreMLBackend(
        BackendSpec("coreml", ()), entries, tmp_path / "bundle", lambda path, units: Interpreted(MilProgram(path))
    )
    assert "step_predicted" in backend.roles
    got = backend.load(Path("unused"), Component("step_predicted", "unet/step_predicted.onnx", *sides)).run(case.inputs)
    assert got["choices"].dtype == np.int64
    assert got["choices"].sum() == 2 * 8 * 8
    assert got["probe_error"].shape == ()
    assert snr_db(case.outputs["next_latents"], got["next_latents"]) > 20


class Interpreted:
    """A program with coremltools' own method."""

    def __init__(self, program: MilProgram) -> None:
        self.program = program

    def predict(self, feeds: dict[str, Any]) -> dict[str, Any]:
        return self.program(feeds)


def test_a_plan_without_prediction_has_the_step_that_it_had() -> None:
    made = plan("whole_output", (1,), None)
    full = tuple(SplitMask(each.split, ("full",) * len(each.mask)) for each in made.recipe.splits)
    plain = Plan(replace(made.recipe, prediction={}, splits=full), Tables(np.ones(STEPS)))
    samples = {"step_full": [Sample({**start(), "step": np.array(2)}, {})]}
    modules = step_modules(unet(), plain, samples, apple_layout=False)
    assert modules.keys() == {"step_full"}
    module, inputs, outputs = modules["step_full"]
    assert type(module).__name__ == "CoreMLStep"
    assert [each.name for each in inputs] == ["latents", "step", "prompt_embeds", "guidance", "x0_prev"]
    assert outputs == ["next_latents", "next_x0_prev"]
