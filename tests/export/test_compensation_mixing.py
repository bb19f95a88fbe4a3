"""The tail of a step whose compensation mixes: in ONNX Runtime what the tables are in NumPy; zeros change nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from latentrelay.compress.denoising_chain import compensated, guided, solver_step
from latentrelay.compress.plan import Plan, PlanSource, Tables, full_plan
from latentrelay.compress.solver_tables import SolverRow, SolverTable
from latentrelay.export.onnx_graphs import export_onnx
from latentrelay.export.step_graph import StepTail

N, CHANNELS, SHAPE = 4, 3, (1, 3, 5, 5)
GUIDANCE = 4.0
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def tables(seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    mixing = 0.3 * rng.standard_normal((N, 2, 3, CHANNELS))
    mixing[:2, :, 2] = 0.0
    return 0.2 * rng.standard_normal((N, 2, CHANNELS)), 0.1 * rng.standard_normal((N, 2, CHANNELS)), mixing


def make_plan(rows: Rows | tuple[np.ndarray, np.ndarray, None] | None, memory: bool = True) -> Plan:
    rng = np.random.default_rng(5)
    solver = [SolverRow(*(float(v) for v in rng.standard_normal(7))) for _ in range(N)]
    solver = [
        SolverRow(r.a, r.b, r.c if memory and 0 < i < N - 1 else 0.0, 0.0, r.p, r.q, 1.0) for i, r in enumerate(solver)
    ]
    table = SolverTable(tuple(solver), (900, 600, 300, 1), 1.0)
    plain = full_plan(PlanSource("m", "sha256:0", "sd1"), {}, "dpmsolver++", "Class", "sha256:1", table)
    return plain if rows is None else Plan(plain.recipe, Tables(np.ones(N), *rows))


@pytest.fixture
def tail(tmp_path: Path) -> Any:
    """`tail(plan)`: the exported tail as a function of its feeds."""

    def exported(plan: Plan) -> Any:
        memory = plan.recipe.solver_table.needs_x0_prev
        feeds: dict[str, torch.Tensor] = {
            "noise_pred": torch.zeros(2, *SHAPE[1:]),
            "latents": torch.zeros(SHAPE),
            "step": torch.tensor(0),
            "guidance": torch.tensor(GUIDANCE),
        }
        feeds |= {"x0_prev": torch.zeros(SHAPE)} if memory else {}
        outputs = ["next_latents", *(["next_x0_prev"] if memory else [])]
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx"
        export_onnx(StepTail(plan), list(feeds.values()), path, inputs=list(feeds), outputs=outputs, opset=20)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda **arrays: session.run(outputs, arrays)

    return exported


def draw(seed: int, step: int, memory: bool) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    feeds = {"noise_pred": rng.standard_normal((2, *SHAPE[1:])), "latents": rng.standard_normal(SHAPE)}
    feeds |= {"x0_prev": rng.standard_normal(SHAPE)} if memory else {}
    arrays = {name: array.astype(np.float32) for name, array in feeds.items()}
    return arrays | {"step": np.array(step, np.int64), "guidance": np.array(GUIDANCE, np.float32)}


@pytest.mark.parametrize("memory", [True, False])
def test_onnx_is_the_tables_in_numpy(tail: Any, memory: bool) -> None:
    gain, offset, mixing = tables()
    if not memory:
        mixing[:, :, 2] = 0.0
    plan = make_plan((gain, offset, mixing), memory)
    run = tail(plan)
    for step in range(N):
        feeds = draw(step, step, memory)
        q, x, m = (
            feeds[name].astype(np.float64) if name in feeds else 0.0 for name in ("noise_pred", "latents", "x0_prev")
        )
        k, b, mix = (rows[step][..., None, None] for rows in (gain, offset, mixing))
        e = (1 - k) * q - b - mix[:, 0] * q[::-1] - mix[:, 1] * x - mix[:, 2] * m
        row = plan.recipe.solver[step]
        expected = row.a * x + row.b * (e[:1] + GUIDANCE * (e[1:] - e[:1])) + row.c * m
        np.testing.assert_allclose(run(**feeds)[0], expected, atol=3e-6)
        mine = compensated(
            feeds["noise_pred"], gain[step], offset[step], mixing[step], feeds["latents"], feeds.get("x0_prev")
        )
        found, _ = solver_step(row, feeds["latents"], guided(mine, GUIDANCE), feeds.get("x0_prev"))
        np.testing.assert_allclose(run(**feeds)[0], found, atol=2e-6)


@pytest.mark.parametrize("mixes", [True, False])
def test_tables_of_zeros_are_bit_identical_to_none(tail: Any, mixes: bool) -> None:
    zeros = np.zeros((N, 2, CHANNELS))
    plain = tail(make_plan(None))
    off = tail(make_plan((zeros, zeros, np.zeros((N, 2, 3, CHANNELS)) if mixes else None)))
    for step in range(N):
        feeds = draw(step, step, True)
        for one, other in zip(plain(**feeds), off(**feeds), strict=True):
            assert one.tobytes() == other.tobytes()


def test_memory_that_no_row_reads_may_hold_anything(tail: Any) -> None:
    run = tail(make_plan(tables()))
    feeds = draw(0, 0, True) | {"x0_prev": np.full(SHAPE, np.nan, np.float32)}
    assert np.isfinite(run(**feeds)[0]).all()
    assert np.isnan(run(**feeds | {"step": np.array(2, np.int64)})[0]).all()


def test_without_tables_there_is_no_node_for_them(tmp_path: Path) -> None:
    import onnx

    counts = []
    for rows in (None, tables()):
        feeds = [torch.zeros(2, *SHAPE[1:]), torch.zeros(SHAPE), torch.tensor(0), torch.tensor(4.0), torch.zeros(SHAPE)]
        names = ["noise_pred", "latents", "step", "guidance", "x0_prev"]
        path = tmp_path / "tail.onnx"
        export_onnx(StepTail(make_plan(rows)), feeds, path, inputs=names, outputs=["a", "b"], opset=20)
        counts.append([node.op_type for node in onnx.load(path).graph.node].count("Gather"))
    assert counts[1] > counts[0]
