"""Step graphs with predicted steps: parity with NumPy, row 0, DeepCache, ladders never written, shared weights."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from diffusers import DDIMScheduler
from latentrelay.compress.denoising_chain import Start
from latentrelay.compress.ladders import LadderSpec, ladder_rows
from latentrelay.compress.plan import Plan, SplitMask
from latentrelay.compress.precision import recipe_for
from latentrelay.compress.solver_tables import solver_table
from latentrelay.export.activation_ranges import record_ranges
from latentrelay.export.cut_unet import cut_graph, cut_points
from latentrelay.export.errors import ExportError, ParityError
from latentrelay.export.layers import layers_of
from latentrelay.export.parity import open_session
from latentrelay.export.predicted_parity import check_predicted, numpy_steps, run_chained
from latentrelay.export.quantise_graph import quantise
from latentrelay.export.reference_run import ReferenceRun
from latentrelay.export.staged_onnx import StagedOnnx
from latentrelay.export.step_writer import ladders_of, write_predicted, write_step
from latentrelay.runtime.manifest import BackendSpec

SPLIT, GUIDANCE, LATENTS = 17, 3.5, torch.zeros(2, 4, 8, 8)
MASK = ("full", "full", "predicted", "full", "predicted", "predicted", "full", "predicted")
SPEC = BackendSpec("onnxruntime", ("CPUExecutionProvider",), {})
RNG = np.random.default_rng(11)
STATES = RNG.standard_normal((2, 16, 16)).astype(np.float32)
LATENT, MEMORY = (RNG.standard_normal((1, 4, 8, 8)).astype(np.float32) for _ in range(2))


@dataclass(frozen=True)
class Case:
    """One way to predict."""

    target: str = "deep_feature"
    orders: tuple[int, ...] = (0, 1)
    probe: str = "P1"
    metric: str = "l2"
    dtype: str = "float32"
    kind: str = "backward"
    horizon: int = 0
    sampler: str = "dpmsolver++"
    rectified: bool = True
    grid: bool = False
    quantised: bool = False


CASES = {
    "deep, chosen by l2": Case(),
    "deep, chosen by cosine, newton, float16": Case(
        orders=(0, 1, 2), probe="P3", metric="cosine", dtype="float16", kind="newton", horizon=1
    ),
    "deep, reused": Case(orders=(0,), rectified=False),
    "whole, one row, ddim": Case("whole_output", orders=(2,), sampler="ddim"),
    "whole, chosen by l2, own grid": Case("whole_output", orders=(0, 1, 2), probe="P2", grid=True),
    "whole, float16, P0 by cosine": Case("whole_output", probe="P0", metric="cosine", dtype="float16"),
    "deep, w8a8": Case(quantised=True),
}


def with_prediction(plan: Plan, case: Case) -> Plan:
    """The plan with one split that predicts; rectifier rows are random, on computed and predicted steps."""
    num_steps, rng = plan.recipe.num_steps, np.random.default_rng(2)
    spec = LadderSpec(case.orders, "step", case.kind, case.horizon)  # type: ignore[arg-type]
    rows = ladder_rows(MASK, SPLIT, num_steps, spec, np.arange(float(num_steps)))
    update, candidates = (np.stack([0.0 * each, each]) for each in rows)
    tables: dict[str, Any] = {"ladder_update": update, "candidates": candidates}
    if case.rectified:
        gain, offset = (0.05 * rng.standard_normal((2, num_steps, 2, 4)) for _ in range(2))
        mixing = 0.05 * rng.standard_normal((2, num_steps, 2, 1 + 2 * spec.rungs, 4))
        for table in (gain, offset, mixing):
            table[0], table[1, :SPLIT] = 0.0, 0.0
        computed = [SPLIT + i for i, kind in enumerate(MASK) if kind == "full"]
        mixing[:, computed, :, 3:] = 0.0
        if case.target == "deep_feature":
            mixing[:, :, :, 3:] = 0.0
        if not plan.recipe.solver_table.needs_x0_prev:
            mixing[:, :, :, 2] = 0.0
        mixing[1, SPLIT + 2, :, 3:] = 0.0  # the second rung is not written before the second computed step
        tables |= {"rectifier_gain": gain, "rectifier_offset": offset, "rectifier_mixing": mixing}
    if case.grid:
        own = np.array([[r.a, r.b, r.c, r.n, r.p, r.q, r.s] for r in plan.recipe.solver])
        tables["grid_solver"] = np.stack([own, own * np.where(np.arange(num_steps) < SPLIT, 1.0, 1.02)[:, None]])
        times = np.array(plan.recipe.timesteps, dtype=np.float64)
        tables["grid_timesteps"] = np.stack([times, times - 0.5])
    chooses = candidates.shape[2] > 1
    settings = {
        "target": case.target,
        "probe": case.probe if chooses else None,
        "metric": case.metric if chooses else None,
        "orders": list(case.orders),
        "horizon": case.horizon,
        "abscissa": "step",
        "ladder": case.kind,
        "ladder_dtype": case.dtype,
        "rows": {str(SPLIT): 1},
        "fallback_threshold": None,
        "report": {},
    }
    splits = tuple(SplitMask(s.split, MASK if s.split == SPLIT else s.mask) for s in plan.recipe.splits)  # type: ignore[arg-type]
    recipe = replace(plan.recipe, splits=splits, prediction=settings)
    return Plan(recipe, replace(plan.tables, **tables))


def ddim(plan: Plan) -> Plan:
    """The same run with a solver that has no memory."""
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    table = solver_table(scheduler, plan.recipe.num_steps)
    recipe = replace(plan.recipe, sampler="ddim", solver=table.rows, timesteps=table.timesteps)
    return replace(plan, recipe=recipe)


@pytest.fixture(scope="module")
def folders(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The tiny bundle's U-Net, and the same in w8a8, by whether it is quantised."""
    plain, integer = tmp_path_factory.mktemp("unet"), tmp_path_factory.mktemp("w8a8")
    for name in ("model.onnx", "model.onnx_data"):
        shutil.copyfile(tiny_bundle / "unet" / name, plain / name)
    rng, graph = np.random.default_rng(1), plain / "model.onnx"
    samples = [
        (
            step,
            {
                "sample": rng.standard_normal((2, 4, 8, 8)).astype(np.float32),
                "timestep": np.array(900.0 - 300 * step, np.float32),
                "encoder_hidden_states": STATES,
            },
        )
        for step in range(3)
    ]
    recipe = recipe_for(layers_of(onnx_ir.load(graph)), "w8a8", "onnxruntime-x64")
    quantise(graph, recipe, record_ranges(graph, samples, threads=1), integer / "model.onnx")
    return {False: plain, True: integer}


@dataclass(frozen=True)
class Made:
    """A case's graphs in sessions."""

    plan: Plan
    folder: Path
    staged: StagedOnnx
    sessions: dict[str, Any]

    @property
    def start(self) -> Start:
        return Start(SPLIT, LATENT, MEMORY, STATES)

    @property
    def run(self) -> ReferenceRun:
        n = self.plan.recipe.num_steps
        return ReferenceRun((LATENT,) * (n + 1), (MEMORY,) * (n + 1), STATES, np.zeros((2, 16), np.int64), GUIDANCE, ())


def made(name: str, folders: dict[bool, Path], tiny_bundle: Path, where: Path, opset: int = 20) -> Made:
    case = CASES[name]
    folder, plan = folders[case.quantised], Plan.load(tiny_bundle)
    plan = with_prediction(plan if case.sampler == "dpmsolver++" else ddim(plan), case)
    stem = f"{list(CASES).index(name)}-{opset}"
    paths = {kind: folder / f"{kind}-{stem}.onnx" for kind in ("step_full", "step_predicted")}
    if not paths["step_full"].is_file():
        write_step(plan, paths["step_full"], LATENTS, opset)
        write_predicted(plan, paths["step_predicted"], LATENTS, opset)
    probe = plan.recipe.prediction["probe"]
    table = plan.recipe.solver_table
    staged = StagedOnnx(folder / "model.onnx", where, table, SPEC, (4, 8, 8), (16, 16), 1, probe)
    return Made(plan, folder, staged, {kind: open_session(path) for kind, path in paths.items()})


@pytest.mark.parametrize("name", CASES)
def test_the_graphs_are_the_tables_in_numpy(
    name: str, folders: dict[bool, Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    it = made(name, folders, tiny_bundle, tmp_path)
    report = check_predicted(it.sessions, it.plan, it.run, it.staged, quantised=CASES[name].quantised)
    assert report["step_predicted"]["snr_db"] > 60
    assert report["predicted_run"]["snr_db"] > 60
    assert report["predicted_run"]["flipped_choices"] <= 2
    names = {kind: {port.name for port in session.get_inputs()} for kind, session in it.sessions.items()}
    for step in numpy_steps(it.plan, it.start, GUIDANCE, it.staged):
        assert set(step.inputs) == names["step_full" if step.kind == "full" else "step_predicted"]
        if "choices" in step.outputs:
            assert step.outputs["choices"].sum() == 2 * 8 * 8


def test_choices_count_every_token_once_and_follow_the_probe(
    folders: dict[bool, Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    it = made("deep, chosen by l2", folders, tiny_bundle, tmp_path)
    steps = list(numpy_steps(it.plan, it.start, GUIDANCE, it.staged))
    chosen = [step for step in steps if "choices" in step.outputs]
    for step in chosen:
        choices, error = it.sessions["step_predicted"].run(["choices", "probe_error"], step.inputs)
        assert choices.dtype == np.int64
        assert choices.sum() == 128
        assert error.shape == ()
        assert 0.0 < error < 1.0
    assert any(step.outputs["choices"].min() > 0 for step in chosen)  # both rows win somewhere


def test_what_a_wrong_table_does_is_seen(folders: dict[bool, Path], tiny_bundle: Path, tmp_path: Path) -> None:
    it = made("whole, one row, ddim", folders, tiny_bundle, tmp_path)
    wrong = it.plan.tables.candidates.copy()  # type: ignore[union-attr]
    wrong[1, SPLIT + 2] *= 1.01
    plan = Plan(it.plan.recipe, replace(it.plan.tables, candidates=wrong))
    with pytest.raises(ParityError, match="step_predicted"):
        check_predicted(it.sessions, plan, it.run, it.staged, quantised=False)


def test_row_0_is_the_plain_step_bit_for_bit(folders: dict[bool, Path], tiny_bundle: Path, tmp_path: Path) -> None:
    for name in ("deep, chosen by l2", "deep, w8a8", "whole, chosen by l2, own grid"):
        it = made(name, folders, tiny_bundle, tmp_path / name.replace(" ", "_"))
        write_step(Plan.load(tiny_bundle), it.folder / "plain.onnx", LATENTS, 20)
        plain = open_session(it.folder / "plain.onnx")
        ladders = ladders_of(it.plan, it.folder / "model.onnx", (4, 8, 8)).examples()
        for step in (0, 1, SPLIT, SPLIT + 2, it.plan.recipe.num_steps - 1):
            feeds = {
                "latents": LATENT,
                "step": np.array(step, np.int64),
                "prompt_embeds": STATES,
                "guidance": np.array(GUIDANCE, np.float32),
                "x0_prev": MEMORY,
            }
            poisoned = {name: np.full(tuple(each.shape), np.nan, np.float32) for name, each in ladders.items()}
            more = {**feeds, **poisoned, "split_row": np.array(0, np.int64)}
            names = ["next_latents", "next_x0_prev"]
            expected = plain.run(names, feeds)
            for mine, theirs in zip(it.sessions["step_full"].run(names, more), expected, strict=True):
                assert mine.tobytes() == theirs.tobytes()
            left = it.sessions["step_full"].run([f"next_{name}" for name in ladders], more)
            assert not any(ladder.any() for ladder in left)
            if step == SPLIT + 2 and not CASES[name].grid:  # predicted in row 1: computed after all, it is a plain step
                again = it.sessions["step_full"].run(names, {**more, "split_row": np.array(1, np.int64)})
                assert [array.tobytes() for array in again] == [array.tobytes() for array in expected]


def test_order_0_is_deepcache_bit_for_bit(folders: dict[bool, Path], tiny_bundle: Path, tmp_path: Path) -> None:
    """DeepCache from the plain step graph itself: its deep value kept at computed steps, put back at the others."""
    it = made("deep, reused", folders, tiny_bundle, tmp_path)
    write_step(Plan.load(tiny_bundle), it.folder / "plain.onnx", LATENTS, 20)
    model = onnx.load(str(it.folder / "plain.onnx"), load_external_data=False)
    deep, results = cut_points(model).deep, {"next_latents": "next_latents", "next_x0_prev": "next_x0_prev"}
    shape = ladders_of(it.plan, it.folder / "model.onnx", (4, 8, 8)).feature
    model.graph.value_info.append(onnx.helper.make_tensor_value_info(deep, onnx.TensorProto.FLOAT, shape[1:]))
    onnx.save(cut_graph(model, {}, {**results, deep: "kept"}), str(it.folder / "keep.onnx"))
    onnx.save(cut_graph(model, {deep: "kept"}, results), str(it.folder / "reuse.onnx"))
    keep, reuse = (open_session(it.folder / f"{name}.onnx") for name in ("keep", "reuse"))
    latents, memory, kept = LATENT, MEMORY, None
    mine: dict[str, Any] = {"latents": LATENT, "x0_prev": MEMORY, "feature_ladder": np.full(shape, np.nan, np.float32)}
    for step, kind in enumerate(MASK, start=SPLIT):
        common = {
            "step": np.array(step, np.int64),
            "prompt_embeds": STATES,
            "guidance": np.array(GUIDANCE, np.float32),
        }
        feeds = {**common, "latents": latents, "x0_prev": memory}
        if kind == "full":
            latents, memory, kept = keep.run(["next_latents", "next_x0_prev", "kept"], feeds)
        else:
            latents, memory = reuse.run(["next_latents", "next_x0_prev"], {**feeds, "kept": kept})
        session = it.sessions["step_full" if kind == "full" else "step_predicted"]
        found = session.run(None, {**common, **mine, "split_row": np.array(1, np.int64)})
        got = dict(zip([port.name for port in session.get_outputs()], found, strict=True))
        mine |= {name.removeprefix("next_"): array for name, array in got.items()}
        assert mine["latents"].tobytes() == latents.tobytes()
        assert mine["x0_prev"].tobytes() == memory.tobytes()


def test_ladders_that_were_never_written_do_not_matter(
    folders: dict[bool, Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    it = made("deep, chosen by cosine, newton, float16", folders, tiny_bundle, tmp_path)
    steps = list(numpy_steps(it.plan, it.start, GUIDANCE, it.staged))
    assert all(np.isnan(steps[0].inputs[name]).all() for name in ("feature_ladder", "probe_ladder"))
    last, _ = run_chained(it.sessions, steps)
    for name in ("feature_ladder", "probe_ladder"):
        steps[0].inputs[name] = np.zeros_like(steps[0].inputs[name])
    again, _ = run_chained(it.sessions, steps)
    assert np.isfinite(last).all()
    assert last.tobytes() == again.tobytes()


def test_the_graphs_share_the_weights_and_hold_what_they_need(
    folders: dict[bool, Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    deep = made("deep, chosen by l2", folders, tiny_bundle, tmp_path / "deep")
    whole = made("whole, one row, ddim", folders, tiny_bundle, tmp_path / "whole")
    weights = 0
    for it in (deep, whole):
        stem = list(CASES).index("deep, chosen by l2" if it is deep else "whole, one row, ddim")
        for kind in ("step_full", "step_predicted"):
            model = onnx.load(str(it.folder / f"{kind}-{stem}-20.onnx"), load_external_data=False)
            for tensor in model.graph.initializer:
                if tensor.external_data:
                    places = {each.key: each.value for each in tensor.external_data}
                    assert places["location"] == "model.onnx_data"
                    weights += 1
            onnx.checker.check_model(str(it.folder / f"{kind}-{stem}-20.onnx"))
        assert {node.op_type for node in model.graph.node}.isdisjoint({"If", "Loop", "Scan"})
    assert weights > 0
    computed = {"Conv", "MatMul", "Gemm", "MultiHeadAttention"}
    assert {node.op_type for node in model.graph.node}.isdisjoint(computed)  # the last: whole output, no network at all
    assert "prompt_embeds" not in {value.name for value in model.graph.input}
    assert [value.name for value in model.graph.output] == ["next_latents"]


@pytest.mark.parametrize("opset", [18, 19])
def test_lower_opsets(opset: int, folders: dict[bool, Path], tiny_bundle: Path, tmp_path: Path) -> None:
    case = Case("whole_output", orders=(1,))
    plan = with_prediction(Plan.load(tiny_bundle), case)
    write_predicted(plan, tmp_path / "step_predicted.onnx", LATENTS, opset)
    model = onnx.load(str(tmp_path / "step_predicted.onnx"))
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == opset
    it = made("whole, one row, ddim", folders, tiny_bundle, tmp_path / "other")
    step = list(numpy_steps(plan, it.start, GUIDANCE, it.staged))[2]
    got = open_session(tmp_path / "step_predicted.onnx").run(["next_latents"], step.inputs)[0]
    np.testing.assert_allclose(got, step.outputs["next_latents"], atol=1e-5)


@pytest.mark.parametrize("name", ["deep, chosen by l2", "whole, chosen by l2, own grid"])
def test_openvino_runs_them(name: str, folders: dict[bool, Path], tiny_bundle: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    it = made(name, folders, tiny_bundle, tmp_path)
    core, stem = openvino.Core(), list(CASES).index(name)
    for kind in ("step_full", "step_predicted"):
        compiled = core.compile_model(
            str(it.folder / f"{kind}-{stem}-20.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        for step in numpy_steps(it.plan, it.start, GUIDANCE, it.staged):
            if (step.kind == "full") == (kind == "step_full"):
                found = compiled(step.inputs)
                for port, expected in step.outputs.items():
                    if port == "choices":
                        assert np.abs(found[port] - expected).sum() <= 4
                    else:
                        np.testing.assert_allclose(found[port], expected, atol=2e-4, err_msg=f"{kind} {port}")


def test_a_plan_without_predicted_steps_writes_none(tiny_bundle: Path, tmp_path: Path) -> None:
    plan = Plan.load(tiny_bundle)
    with pytest.raises(ExportError, match="predicts no steps"):
        write_predicted(plan, tmp_path / "step_predicted.onnx", LATENTS, 20)
