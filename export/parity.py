"""The parity gate: every graph against torch on the same inputs, and a whole device-only run against diffusers'.

SNR in dB is 10 log10(sum ref^2 / sum err^2). Per component the inputs are torch's own (teacher-forced), so errors do
not add up; the chained run feeds every step with the last one's output, as a device does. Below a gate nothing
ships.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentrelay.compress.denoising_chain import Denoiser, compensated, guided, solver_step
from latentrelay.compress.plan import Plan
from latentrelay.export.errors import ParityError
from latentrelay.export.onnx_graphs import TextEncoderGraph, UNetGraph, VaeDecoderGraph
from latentrelay.export.reference_run import Floats, ReferenceRun
from latentrelay.runtime.samplers import SamplerRule
from numpy.typing import NDArray

COMPONENT_GATE_DB, CHAINED_GATE_DB = 60.0, 50.0
_FORCED_STEPS = 5  # teacher-forced steps of the step graph: the ends, their neighbours and the middle

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Sample:
    """Inputs of one graph and what torch says comes out, by the graph's own names."""

    inputs: Feeds
    outputs: Feeds


def snr_db(reference: NDArray[Any], got: NDArray[Any]) -> float:
    """10 log10(sum ref^2 / sum err^2); -inf when `got` is not finite, 200 at most."""
    if reference.shape != got.shape or not np.isfinite(got).all():
        return -math.inf
    signal = float(np.sum(np.square(reference, dtype=np.float64)))
    error = float(np.sum(np.square(got.astype(np.float64) - reference)))
    if error == 0.0:
        return 200.0
    return min(200.0, 10.0 * math.log10(signal / error)) if signal > 0.0 else -math.inf


def collect_samples(
    pipeline: Any, plan: Plan, run: ReferenceRun, rule: SamplerRule, vae: Any = None
) -> dict[str, list[Sample]]:
    """Teacher-forced samples for every graph, from the recorded torch run; `vae` stands in for the pipeline's own."""
    decoder = vae or pipeline.vae
    steps = _forced_steps(plan.recipe.num_steps)
    latent = (run.latents[-1] / np.float32(decoder.config.scaling_factor)).astype(np.float32)
    picture = _torch(VaeDecoderGraph(decoder), latent)[0]
    return {
        "text_encoder": [_text_sample(pipeline, run.input_ids[row : row + 1]) for row in (0, 1)],
        "unet": [_unet_sample(pipeline, plan, run, step) for step in sorted({steps[0], steps[len(steps) // 2]})],
        "step_full": [_step_sample(run, step, rule) for step in steps],
        "vae_decoder": [Sample({"latent_sample": latent}, {"sample": picture})],
    }


def _forced_steps(num_steps: int) -> list[int]:
    wanted = {0, 1, num_steps // 2, num_steps - 2, num_steps - 1}
    return sorted(step for step in wanted if 0 <= step < num_steps)[:_FORCED_STEPS]


def _text_sample(pipeline: Any, input_ids: NDArray[np.int64]) -> Sample:
    states, pooled = _torch(TextEncoderGraph(pipeline.text_encoder), input_ids)
    return Sample({"input_ids": input_ids}, {"last_hidden_state": states, "pooler_output": pooled})


def _unet_sample(pipeline: Any, plan: Plan, run: ReferenceRun, step: int) -> Sample:
    scale = np.float32(plan.recipe.solver[step].s)
    inputs: Feeds = {
        "sample": np.concatenate([run.latents[step] * scale] * len(run.prompt_embeds)),
        "timestep": np.array(plan.recipe.timesteps[step], dtype=np.float32),
        "encoder_hidden_states": run.prompt_embeds,
    }
    return Sample(inputs, {"out_sample": _torch(UNetGraph(pipeline.unet), *inputs.values())[0]})


def _step_sample(run: ReferenceRun, step: int, rule: SamplerRule) -> Sample:
    inputs: Feeds = {
        "latents": run.latents[step],
        "step": np.array(step, dtype=np.int64),
        "prompt_embeds": run.prompt_embeds,
    }
    outputs: Feeds = {"next_latents": run.latents[step + 1]}
    if rule.branches == 2:
        inputs["guidance"] = np.array(run.guidance, dtype=np.float32)
    if rule.needs_noise:
        inputs["noise"] = run.noise[step]
    if rule.needs_x0_prev:
        inputs["x0_prev"] = run.x0_prev[step]
        outputs["next_x0_prev"] = run.x0_prev[step + 1]
    return Sample(inputs, outputs)


def _torch(module: torch.nn.Module, *arrays: NDArray[Any]) -> list[Floats]:
    with torch.no_grad():
        result = module.eval()(*(torch.from_numpy(array) for array in arrays))
    tensors = result if isinstance(result, tuple) else (result,)
    return [tensor.numpy().copy() for tensor in tensors]


def check_components(
    paths: Mapping[str, Path], samples: Mapping[str, list[Sample]], progress: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Run float graphs through ONNX Runtime: {component: {"snr_db": lowest}}; ParityError at the first below 60 dB."""
    report = {}
    for component, path in paths.items():
        progress(f"parity: {component}")
        lowest = _lowest(open_session(path), samples[component])
        report[component] = {"snr_db": _gate(component, lowest, COMPONENT_GATE_DB)}
    return report


def check_step(
    session: Any,
    plan: Plan,
    cases: list[Sample],
    run: ReferenceRun,
    rule: SamplerRule,
    denoiser: Denoiser | None,
    progress: Callable[[str], None],
    plain: Feeds | None = None,
) -> dict[str, dict[str, float]]:
    """The step graph in its `session`: "step_full" teacher-forced, "chained_run" fed with its own results.

    `plain`: inputs that every step is given besides, where the graph serves predicted steps too.

    With a float network (`denoiser` None) both are compared with torch. A quantised one is `denoiser`, and both are
    compared with the plan's tables applied to its output in NumPy: the graph must be the tables, whatever the network
    does. Raises ParityError below 60 dB (50 dB chained, and both where the network is quantised).
    """
    table = plan.recipe.solver_table
    gate = COMPONENT_GATE_DB if denoiser is None else CHAINED_GATE_DB
    if denoiser is not None:
        cases = [Sample(case.inputs, case.outputs | step_in_numpy(plan, case.inputs, denoiser)) for case in cases]
    progress("parity: step_full")
    report = {"step_full": {"snr_db": _gate("step_full", _lowest(session, cases), gate)}}
    progress("parity: chained run")
    steps = range(len(table.rows))
    feeds = (_step_sample(run, step, rule).inputs | (plain or {}) for step in steps)
    expected = run.latents[-1] if denoiser is None else _chained_in_numpy(plan, run, rule, denoiser)
    chained = snr_db(expected, _chained(session, feeds, rule))
    report["chained_run"] = {"snr_db": _gate("chained_run", chained, CHAINED_GATE_DB)}
    return report


def step_in_numpy(plan: Plan, inputs: Feeds, denoiser: Denoiser) -> Feeds:
    """What a step graph must give for its inputs, by the plan's tables: {"next_latents", "next_x0_prev" if read}."""
    step = int(inputs["step"])
    row, latents = plan.recipe.solver[step], inputs["latents"]
    noise_pred = corrected(plan, denoiser(latents, step, inputs["prompt_embeds"]), step, inputs)
    if "noise" in inputs:
        a, b, n = (np.float32(value) for value in (row.a, row.b, row.n))
        return {"next_latents": a * latents + b * noise_pred + n * inputs["noise"]}
    scale = np.float32(inputs["guidance"]) * np.float32(plan.tables.guidance_multiplier[step])
    next_latents, x0 = solver_step(row, latents, guided(noise_pred, float(scale)), inputs.get("x0_prev"))
    return {"next_latents": next_latents, **({"next_x0_prev": x0} if "x0_prev" in inputs else {})}


def corrected(plan: Plan, noise_pred: Floats, step: int, inputs: Feeds) -> Floats:
    """The plan's compensation in float32, (branches, C, h, w) both; unchanged where it has none."""
    tables = plan.tables
    if tables.compensation_gain is None or tables.compensation_offset is None:
        return noise_pred
    rows = (tables.compensation_gain[step], tables.compensation_offset[step])
    mixing = None if tables.compensation_mixing is None else tables.compensation_mixing[step]
    return compensated(noise_pred, *rows, mixing, inputs["latents"], inputs.get("x0_prev"))


def open_session(path: Path) -> Any:
    """An ONNX Runtime session on the CPU, as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _lowest(session: Any, cases: list[Sample]) -> float:
    values = []
    for case in cases:
        names = list(case.outputs)
        for name, got in zip(names, session.run(names, case.inputs), strict=True):
            values.append(snr_db(case.outputs[name], got))
    return min(values)


def _chained(session: Any, steps: Iterable[Feeds], rule: SamplerRule) -> Floats:
    """The last latents of a run in which each step's results stand in for the next one's recorded inputs."""
    carried: Feeds = {}
    for feeds in steps:
        if rule.needs_x0_prev:
            latents, memory = session.run(["next_latents", "next_x0_prev"], feeds | carried)
            carried = {"latents": latents, "x0_prev": memory}
        else:
            (latents,) = session.run(["next_latents"], feeds | carried)
            carried = {"latents": latents}
    result: Floats = carried["latents"]
    return result


def _chained_in_numpy(plan: Plan, run: ReferenceRun, rule: SamplerRule, denoiser: Denoiser) -> Floats:
    carried: Feeds = {}
    for step in range(plan.recipe.num_steps):
        outputs = step_in_numpy(plan, _step_sample(run, step, rule).inputs | carried, denoiser)
        carried = {name.removeprefix("next_"): array for name, array in outputs.items()}
    result: Floats = carried["latents"]
    return result


def _gate(component: str, value: float, gate_db: float) -> float:
    if not value >= gate_db:
        raise ParityError(component, value, gate_db)
    return round(value, 2)
