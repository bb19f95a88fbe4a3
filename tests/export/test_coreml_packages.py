"""The coreml/ folder of a bundle, made of a tiny pipeline and run by the interpreter: names, ports, parity, tables,
compression by precision, packages in two parts, and what a deployment target lacks."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.models.embeddings import Timesteps
from latentrelay.compress.plan import Plan, PlanSource, Tables, full_plan
from latentrelay.compress.precision import LayerRule
from latentrelay.compress.solver_tables import solver_table
from latentrelay.device_profiles import DeviceProfile, load_profile
from latentrelay.export.coreml_bundle import GATES_DB, CoreMLParts, feeds_of, parity_method, write_coreml
from latentrelay.export.coreml_chunks import best_cut, chunk, weight_bytes
from latentrelay.export.coreml_convert import check_operators, convert, load_program, save_package
from latentrelay.export.coreml_graphs import CoreMLStep, PackageInput, step_inputs, step_outputs
from latentrelay.export.errors import ConversionError, DeploymentTargetError, ParityError
from latentrelay.export.mil_interpreter import MilProgram, type_name
from latentrelay.export.onnx_graphs import TextEncoderGraph, decoder_graph
from latentrelay.export.parity import Sample, collect_samples, snr_db
from latentrelay.export.reference_run import record_run
from latentrelay.export.step_graph import FewStepTail, StepHead, StepTail
from latentrelay.runtime.manifest import CoreMLPackage
from latentrelay.runtime.samplers import sampler_rule
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

STEPS = 6
IPHONE = "iphone-15-pro"


class SmallNetwork(torch.nn.Module):
    """A stand-in for a U-Net, with its signature: convolutions, attention over the text states, the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.time_proj = Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = torch.nn.Linear(32, 32)
        self.conv_in = torch.nn.Conv2d(4, 32, 3, padding=1)
        self.conv1 = torch.nn.Conv2d(32, 32, 3, padding=1)
        self.to_q = torch.nn.Linear(32, 64)
        self.to_k = torch.nn.Linear(16, 64)
        self.to_out = torch.nn.Linear(64, 32)
        self.conv_out = torch.nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, return_dict: bool = True) -> Any:
        time = self.time(self.time_proj(timestep.expand(sample.shape[0])))
        x = F.silu(self.conv1(F.silu(self.conv_in(sample) + time[:, :, None, None])))
        query, key = self.to_q(x.flatten(2).transpose(1, 2)), self.to_k(encoder_hidden_states)
        mixed = self.to_out(F.scaled_dot_product_attention(query, key, key))
        return (self.conv_out(x + mixed.transpose(1, 2).reshape(x.shape)),)


@dataclasses.dataclass(frozen=True)
class Made:
    """Networks, a plan, and torch's samples."""

    parts: CoreMLParts
    plan: Plan
    samples: dict[str, list[Sample]]

    def write(self, folder: Path, profile: str | DeviceProfile = IPHONE, precision: str = "fp16", **more: Any) -> Any:
        folder.mkdir(exist_ok=True)
        target = load_profile(profile) if isinstance(profile, str) else profile
        return write_coreml(folder, self.parts, self.plan, target, precision, self.samples, **more)


def plan_for(sampler: str, scheduler: Any) -> Plan:
    rule = sampler_rule(sampler)
    table = solver_table(scheduler, STEPS)
    return full_plan(
        PlanSource("some/model-v1", "sha256:0", "sd1"), {}, sampler, rule.scheduler_class, "sha256:0", table
    )


@pytest.fixture(scope="module")
def whole(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A whole tiny pipeline, as diffusers runs it."""
    pipeline = tiny.make_pipeline(tmp_path_factory.mktemp("coreml-source"))
    rule = sampler_rule("dpmsolver++")
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **rule.overrides)
    plan = plan_for("dpmsolver++", scheduler)
    run = record_run(pipeline, scheduler, STEPS, 16, 16, 7.5, rule)
    parts = CoreMLParts(pipeline.unet, pipeline.text_encoder, pipeline.vae)
    return Made(parts, plan, collect_samples(pipeline, plan, run, rule))


@pytest.fixture(scope="module")
def written(whole: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[CoreMLPackage, ...]]:
    folder = tmp_path_factory.mktemp("coreml") / "bundle"
    return folder, whole.write(folder)


def small(tiny: Any, whole: Made, sampler: str = "dpmsolver++") -> Made:
    """The same text encoder, with a small network and a light decoder: seconds less to convert."""
    torch.manual_seed(0)
    light = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    rule = sampler_rule(sampler)
    scheduler = tiny.SCHEDULERS[sampler](
        **{"prediction_type": "epsilon", "beta_schedule": "scaled_linear"}, **rule.overrides
    )
    plan = plan_for(sampler, scheduler)
    network = SmallNetwork().eval()
    latent = torch.randn(1, 4, 8, 8)
    decoded = Sample({"latent_sample": latent.numpy()}, {"sample": run(decoder_graph(light), latent)[0].numpy()})
    samples = {
        "text_encoder": whole.samples["text_encoder"],
        "step_full": [step_sample(network, plan, step) for step in (0, 2, STEPS - 1)],
        "vae_decoder": [decoded],
    }
    return Made(CoreMLParts(network, whole.parts.text_encoder, light), plan, samples)


@torch.no_grad()
def run(module: torch.nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    result = module(*inputs)
    return result if isinstance(result, tuple) else (result,)


def step_sample(network: torch.nn.Module, plan: Plan, step: int) -> Sample:
    """One step by the modules that ONNX gets, called one after the other with the ONNX graph's own ranks."""
    rule = sampler_rule(plan.recipe.sampler)
    generator = torch.Generator().manual_seed(step)
    latents, other = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    embeds = torch.randn(rule.branches, 16, 16, generator=generator)
    index = torch.tensor(step)
    with torch.no_grad():
        noise = network(*StepHead(plan, rule.branches)(latents, index), embeds, return_dict=False)[0]
        if rule.branches == 1:
            outputs = [FewStepTail(plan)(noise, latents, index, other)]
            rest = {"noise": other}
        else:
            rest = {"guidance": torch.tensor(7.5)} | ({"x0_prev": other} if rule.needs_x0_prev else {})
            outputs = StepTail(plan)(noise, latents, index, *rest.values())
    inputs = {"latents": latents, "step": index, "prompt_embeds": embeds} | rest
    return Sample(
        {name: tensor.numpy() for name, tensor in inputs.items()},
        {name: tensor.numpy() for name, tensor in zip(step_outputs(rule), outputs, strict=True)},
    )


@pytest.fixture(scope="module")
def made(tiny: Any, whole: Made) -> Made:
    return small(tiny, whole)


def program_of(folder: Path, packages: tuple[CoreMLPackage, ...], role: str = "step_full") -> MilProgram:
    return MilProgram(folder / next(each.path for each in packages if each.role == role))


def save_step(made: Made, package: Path) -> list[PackageInput]:
    """The step alone, converted and saved; returns its inputs."""
    rule = sampler_rule(made.plan.recipe.sampler)
    inputs = step_inputs(rule, (4, 8, 8), (16, 16))
    module = CoreMLStep(made.parts.unet, made.plan, rule)
    kept = ("head", "tail", "time_proj")
    save_package(
        convert(module, inputs, step_outputs(rule), target="iOS18", compute_units="ALL", keep_float32=kept), package
    )
    return inputs


# ---- the folder ---------------------------------------------------------------------------------------------------


def test_three_packages_with_apples_names_and_the_onnx_graphs_ports(written: Any) -> None:
    folder, packages = written
    names = [Path(each.path).name for each in packages]
    assert names == [
        f"Stable_Diffusion_version_some_model-v1_{part}.mlpackage" for part in ("text_encoder", "unet", "vae_decoder")
    ]
    assert [each.role for each in packages] == ["text_encoder", "step_full", "vae_decoder"]
    assert all(each.deployment_target == "iOS18" and each.compute_units == "CPU_AND_NE" for each in packages)
    step = packages[1]
    assert {port.name: (port.dtype, port.shape) for port in step.inputs} == {
        "latents": ("float32", (1, 4, 8, 8)),
        "step": ("int32", (1,)),
        "prompt_embeds": ("float32", (2, 16, 16)),
        "guidance": ("float32", (1,)),
        "x0_prev": ("float32", (1, 4, 8, 8)),
    }
    assert {port.name: port.role for port in step.outputs} == {"next_latents": "latents", "next_x0_prev": "x0_prev"}
    for each in packages:
        files = [path for path in (folder / each.path).rglob("*") if path.is_file()]
        assert each.bytes == sum(path.stat().st_size for path in files) > 0


def test_fp16_parity_of_every_component_is_above_35_db(written: Any) -> None:
    assert parity_method() in ("interpreter", "prediction")
    assert {each.role: each.parity_db >= 35.0 for each in written[1]} == dict.fromkeys(
        ("text_encoder", "step_full", "vae_decoder"), True
    )


def test_the_step_is_an_input_and_not_baked_in(whole: Made, written: Any) -> None:
    program = program_of(*written)
    ports = written[1][1].inputs
    feeds = feeds_of(ports, whole.samples["step_full"][0])
    module = CoreMLStep(whole.parts.unet, whole.plan, sampler_rule("dpmsolver++"))
    for case in whole.samples["step_full"]:
        moved = feeds | {"step": feeds_of(ports, case)["step"]}
        wanted = run(module, *(torch.from_numpy(moved[each.name]) for each in ports))
        assert snr_db(wanted[0].numpy(), program(moved)["next_latents"]) > 50.0


def test_unused_memory_may_hold_anything(whole: Made, written: Any) -> None:
    program = program_of(*written)
    first = next(case for case in whole.samples["step_full"] if int(case.inputs["step"]) == 0)
    feeds = feeds_of(written[1][1].inputs, first)
    spoilt = feeds | {"x0_prev": np.full_like(feeds["x0_prev"], np.nan)}
    assert np.array_equal(program(feeds)["next_latents"], program(spoilt)["next_latents"])


def test_tables_solver_and_the_timesteps_sine_stay_float32(written: Any) -> None:
    program = program_of(*written)
    made_by = {var.name: op for op in program.operations for var in op.outputs}
    kept = [op for op in program.operations if op.op_type in ("gather", "sin", "cos")]
    assert len(kept) >= 5
    assert {type_name(op.outputs[0]) for op in [*kept, made_by["next_latents"], made_by["next_x0_prev"]]} == {"fp32"}
    convolutions = [op for op in program.operations if op.op_type in ("conv", "linear")]
    assert {type_name(op.outputs[0]) for op in convolutions} == {"fp16"}


def test_no_shape_depends_on_an_input(written: Any) -> None:
    for role in ("text_encoder", "step_full", "vae_decoder"):
        for op in program_of(*written, role).operations:
            for var in op.outputs:
                assert all(isinstance(size, int) or np.issubdtype(type(size), np.integer) for size in var.shape), (
                    var.name
                )


def test_equal_modules_make_equal_packages(made: Made, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        save_step(made, tmp_path / f"{name}.mlpackage")
        files = sorted(path for path in (tmp_path / f"{name}.mlpackage").rglob("*") if path.is_file())
        digests.append([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
    assert digests[0] == digests[1]
    assert len(digests[0]) == 3


def test_apples_layout_of_the_text_states(made: Made, tmp_path: Path) -> None:
    packages = made.write(tmp_path, apple_layout=True)
    port = next(port for port in packages[1].inputs if port.name == "prompt_embeds")
    assert port.shape == (2, 16, 1, 16)
    assert packages[1].parity_db >= 35.0


def test_compensation_is_inside(made: Made, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    gain, offset = 0.3 * generator.standard_normal((2, STEPS, 2, 4))
    mixing = 0.1 * generator.standard_normal((STEPS, 2, 3, 4))
    mixing[[step for step, row in enumerate(made.plan.recipe.solver) if row.c == 0.0], :, 2] = 0.0
    tables = Tables(made.plan.tables.guidance_multiplier, gain, offset, mixing)
    inputs = save_step(dataclasses.replace(made, plan=Plan(made.plan.recipe, tables)), tmp_path / "step.mlpackage")
    program = MilProgram(tmp_path / "step.mlpackage")
    assert max(len(var.shape) for op in program.operations for var in op.outputs) <= 5  # what Core ML takes
    case = made.samples["step_full"][1]
    feeds, step = feeds_of(inputs, case), int(case.inputs["step"])
    latents = torch.from_numpy(np.concatenate([feeds["latents"]] * 2))
    timestep = torch.tensor(float(made.plan.recipe.timesteps[step]))
    noise = run(made.parts.unet, latents, timestep, torch.from_numpy(feeds["prompt_embeds"]))[0].numpy()
    e = (1 - gain[step])[..., None, None] * noise - offset[step][..., None, None]
    own = np.stack([noise[::-1], latents.numpy(), np.concatenate([feeds["x0_prev"]] * 2)], 1)  # (2, 3, C, h, w)
    e = e - np.sum(mixing[step][..., None, None] * own, 1)
    e = e[0] + 7.5 * (e[1] - e[0])
    row = made.plan.recipe.solver[step]
    wanted = row.a * feeds["latents"][0] + row.b * e + row.c * feeds["x0_prev"][0]
    assert (row.s, row.c != 0) == (1.0, True)
    assert snr_db(wanted, program(feeds)["next_latents"][0]) > 50.0


@pytest.mark.parametrize(("sampler", "last"), [("ddim", "guidance"), ("lcm", "noise")])
def test_samplers_without_memory_or_with_noise(tiny: Any, whole: Made, sampler: str, last: str, tmp_path: Path) -> None:
    made = small(tiny, whole, sampler)
    inputs = save_step(made, tmp_path / "step.mlpackage")
    program = MilProgram(tmp_path / "step.mlpackage")
    assert program.inputs == ("latents", "step", "prompt_embeds", last)
    for case in made.samples["step_full"]:
        assert snr_db(case.outputs["next_latents"], program(feeds_of(inputs, case))["next_latents"]) > 45.0


# ---- compressed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["w8a16", "w8a8", "w4a16", "w4a8"])
def test_every_precision_converts_and_reports_its_parity(made: Made, precision: str, tmp_path: Path) -> None:
    packages = made.write(tmp_path, precision=precision)
    assert [each.precision for each in packages] == ["w8a16", precision, "fp16"]
    step = program_of(tmp_path, packages)
    kinds = [op.op_type for op in step.operations]
    assert ("quantize" in kinds) == precision.endswith("a8")
    assert packages[1].parity_db >= GATES_DB[precision]


def test_an_older_target_gets_the_operators_that_it_has(made: Made, tmp_path: Path) -> None:
    packages = made.write(tmp_path, "generic-ios", "w8a16")
    assert {each.deployment_target for each in packages} == {"iOS17"}
    kinds = {op.op_type for op in load_program(tmp_path / packages[1].path).functions["main"].operations}
    assert {"constexpr_affine_dequantize", "softmax", "matmul"} <= kinds
    assert not {"constexpr_blockwise_shift_scale", "scaled_dot_product_attention"} & kinds


def test_rules_by_layer(made: Made, tmp_path: Path) -> None:
    network = made.parts.unet
    rules = {
        path: LayerRule("float16", "float16")
        for path, module in network.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    } | {"conv1": LayerRule("int8", "int8")}
    packages = made.write(tmp_path, precision="w8a8", rules=rules)
    operations = load_program(tmp_path / packages[1].path).functions["main"].operations
    expanded = [op for op in operations if op.op_type.startswith("constexpr_")]
    assert [op.data.val.shape for op in expanded] == [(32, 32, 3, 3)]
    assert sum(op.op_type == "quantize" for op in operations) == 1
    weight = network.conv1.weight.detach().numpy()
    wanted = np.round(weight / (np.abs(weight).max((1, 2, 3), keepdims=True) / 127))
    assert np.abs(expanded[0].data.val - wanted).max() <= 1  # float16 weights round a little differently
    assert np.mean(expanded[0].data.val != wanted) < 0.05


def test_a_rule_for_a_layer_that_is_not_there(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"a rule for no_such\.layer"):
        made.write(tmp_path, precision="w8a16", rules={"no_such.layer": LayerRule("int8", "float16")})


def test_a_layer_without_a_range_is_named(made: Made, tmp_path: Path) -> None:
    ranges = {path: (-1.0, 1.0) for path, _ in made.parts.unet.named_modules() if path != "conv1"}
    with pytest.raises(ConversionError, match="conv1 has no activation range"):
        made.write(tmp_path, precision="w8a8", ranges=ranges)


# ---- cut in two ---------------------------------------------------------------------------------------------------


def test_two_packages_where_one_would_be_too_large(made: Made, tmp_path: Path) -> None:
    package = tmp_path / "step.mlpackage"
    inputs = save_step(made, package)
    limit = int(weight_bytes(package) * 0.7)
    first, second = chunk(package, limit, "iOS18")
    assert (first.name, second.name) == ("step_chunk1.mlpackage", "step_chunk2.mlpackage")
    assert max(weight_bytes(first), weight_bytes(second)) <= limit
    feeds = feeds_of(inputs, made.samples["step_full"][1])
    one, two = MilProgram(first), MilProgram(second)
    between = one({name: feeds[name] for name in one.inputs})
    assert set(between) <= set(two.inputs)
    chained = two({name: (feeds | between)[name] for name in two.inputs})
    for name, array in MilProgram(package)(feeds).items():
        assert np.array_equal(array, chained[name])


def test_a_profiles_limit_cuts_the_unet(made: Made, tmp_path: Path, monkeypatch: Any) -> None:
    # the weights of a tiny network are far below a MiB, so the unit is what shrinks
    save_step(made, tmp_path / "whole.mlpackage")
    limit = int(weight_bytes(tmp_path / "whole.mlpackage") * 0.7)
    monkeypatch.setattr("latentrelay.export.coreml_bundle.MIB", limit)
    profile = load_profile(IPHONE)
    tight = profile.model_copy(update={"memory": profile.memory.model_copy(update={"largest_file_mib": 1})})
    packages = made.write(tmp_path, tight)
    parts = [each for each in packages if each.role == "step_full"]
    assert [(each.part, each.parts) for each in parts] == [(1, 2), (2, 2)]
    assert [Path(each.path).name[-17:] for each in parts] == ["_chunk1.mlpackage", "_chunk2.mlpackage"]
    assert {port.name for port in parts[0].outputs} <= {port.name for port in parts[1].inputs}
    assert not any(path.name.endswith("unet.mlpackage") for path in (tmp_path / "coreml").iterdir())
    assert parts[0].parity_db == parts[1].parity_db >= 35.0


def test_more_than_two_packages_are_refused(written: Any) -> None:
    package = written[0] / written[1][1].path
    with pytest.raises(ConversionError, match="does not fit in two packages"):
        best_cut(package, weight_bytes(package) // 3)


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "precision", "operator", "needs"),
    [
        ("iOS17", "w4a16", "constexpr_blockwise_shift_scale", "iOS18"),
        ("iOS16", "w8a8", "quantize", "iOS17"),
        ("iOS15", "fp16", "float16 outputs", "iOS16"),
    ],
)
def test_a_precision_that_the_target_lacks_is_named(
    made: Made, target: str, precision: str, operator: str, needs: str, tmp_path: Path
) -> None:
    profile = load_profile(IPHONE)
    older = profile.model_copy(
        update={"support": profile.support.model_copy(update={"coreml_deployment_target": target})}
    )
    with pytest.raises(DeploymentTargetError, match=f"{operator} .*got {target}, expected {needs} or later") as caught:
        made.write(tmp_path, older, precision)
    assert (caught.value.operator, caught.value.needs, caught.value.exit_status) == (operator, needs, 3)
    assert not (tmp_path / "coreml").exists()


def test_an_operator_that_the_target_lacks_is_named(written: Any) -> None:
    program = load_program(written[0] / written[1][1].path)
    check_operators(program, "iOS18")
    with pytest.raises(DeploymentTargetError, match=r"scaled_dot_product_attention \(.*got iOS17, expected iOS18"):
        check_operators(program, "iOS17")


def test_an_operator_without_a_core_ml_form_is_named() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(ConversionError, match=r"cannot convert Odd: .*bessel_j0"):
        convert(Odd(), [PackageInput("x", (2,))], ["y"], target="iOS18", compute_units="ALL")


def test_a_package_that_disagrees_with_torch_is_refused(made: Made, tmp_path: Path) -> None:
    wrong = [Sample(case.inputs, {k: v + 1 for k, v in case.outputs.items()}) for case in made.samples["text_encoder"]]
    spoilt = dataclasses.replace(made, samples=made.samples | {"text_encoder": wrong})
    with pytest.raises(ParityError, match=r"Core ML text_encoder \(fp16\)"):
        spoilt.write(tmp_path)


def test_a_profile_without_core_ml_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="pixel-8 is not an Apple profile"):
        made.write(tmp_path, "pixel-8")


def test_token_ids_beyond_int16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=6,
        eos_token_id=49407,
        bos_token_id=49406,
    )
    module = TextEncoderGraph(CLIPTextModel(config).eval())
    model = convert(
        module, [PackageInput("input_ids", (1, 6), "int32")], ["states", "pooled"], target="iOS17", compute_units="ALL"
    )
    save_package(model, tmp_path / "text.mlpackage")
    ids = np.array([[49406, 40000, 33000, 320, 49407, 49407]], np.int32)
    got = MilProgram(tmp_path / "text.mlpackage")({"input_ids": ids})
    with torch.no_grad():
        states, pooled = module(torch.from_numpy(ids).long())
    assert snr_db(states.numpy(), got["states"]) > 50.0
    assert snr_db(pooled.numpy(), got["pooled"]) > 50.0
