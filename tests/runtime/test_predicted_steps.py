"""The step loop with predicted steps against a NumPy reference, on hand-made graphs: what is predicted, kept and reset.

The step graph of the tiny bundle with a ladder of two rungs over its two-branch output q = w x + mean(embeddings):
computed, L' = U y + U' L; predicted, q^ = c L and q^ - offset[row, step]. Zeros of U and c are selected away.
"""

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from latentrelay.runtime import Bundle, Session, StepEvent, generate
from latentrelay.runtime.errors import (
    ManifestError,
    NonFiniteError,
    RequestError,
    RunCancelledError,
    SessionError,
)
from latentrelay.runtime.ladders import Ladders
from latentrelay.runtime.manifest import BackendSpec, PredictionSpec, StepMask
from onnx import TensorProto as T

RUNGS, ROWS, STEPS, LATENT = 2, 6, 4, (1, 4, 2, 2)
MASKS = (
    StepMask(0, 1, ("full", "predicted", "full", "predicted")),
    StepMask(1, 2, ("full", "full", "predicted")),
    StepMask(0, 3, ("full", "predicted", "predicted", "predicted"), "hot"),
    StepMask(1, 4, ("full", "predicted", "predicted"), "hot"),
    StepMask(2, 5, ("full", "predicted"), "hot"),  # whose normal run computes every step
)
FEATURE, PROBE = (RUNGS, 2, 4, 2, 2), (RUNGS, 2, 1, 2, 2)
UPDATE = np.zeros((ROWS, STEPS, RUNGS, 1 + RUNGS), np.float32)  # L'_o = U[o, 0] y + sum U[o, 1 + p] L_p
UPDATE[1, 0, 0, 0] = UPDATE[2, 1, 0, 0] = 1.0  # the first computed step: rung 0 alone
UPDATE[1, 2] = [[1, 0, 0], [0.5, -0.5, 0]]  # the next, two steps on
UPDATE[2, 2] = [[1, 0, 0], [1, -1, 0]]  # the next, one step on
UPDATE[3, 0, 0, 0] = UPDATE[4, 1, 0, 0] = UPDATE[5, 2, 0, 0] = 1.0  # hot: one value is held
CANDIDATES = np.zeros((ROWS, STEPS, RUNGS), np.float32)
CANDIDATES[1, 1], CANDIDATES[1, 3], CANDIDATES[2, 3] = [1, 0], [1, 1], [1, 1]
CANDIDATES[3, 1:], CANDIDATES[4, 2:], CANDIDATES[5, 3] = [1, 0], [1, 0], [1, 0]
OFFSET = np.zeros((ROWS, STEPS), np.float32)
OFFSET[1], OFFSET[3] = [0.0, 0.25, 0.0, 0.75], [0.0, 0.5, 0.0, 0.125]
ERRORS = np.array([0, 0.2, 0, 0.4], np.float32)
CHOICES = np.array([[0, 0], [5, 3], [0, 0], [8, 0]], np.int64)
AMPLITUDES = np.array([0.5, 0.25, -0.75, 1.0], np.float32)  # of a sampler's noise; the last step gets zeros
PREDICTION = PredictionSpec("whole_output", FEATURE, MASKS)


def write_steps(
    folder: Path, kit: SimpleNamespace, dtype: str = "float32", probe: bool = False, noise: bool = False
) -> None:
    """Both step graphs; with a probe the choices and the probe error are tables by step; with noise it is added."""
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    kind = T.FLOAT16 if dtype == "float16" else T.FLOAT
    shapes = {"feature_ladder": FEATURE, **({"probe_ladder": PROBE} if probe else {})}
    weights = {
        **{"A": kit.A, "B": kit.B, "M": kit.M, "kernel": kit.KERNEL, "U": UPDATE, "P": CANDIDATES, "offsets": OFFSET},
        **{"errors": ERRORS, "counts": CHOICES, "zeros": np.zeros(LATENT, np.float32), "nothing": np.float32(0)},
        **{
            "zero": np.array(0),
            "one": np.array(1),
            "axis1": np.array([1]),
            "own": np.array([0]),
            "rest": np.array([1]),
        },
        **{"end": np.array([9]), "last": np.array([1]), "probe_shape": np.array([1, 2, 1, 2, 2])},
        **{"as_first": np.array([RUNGS, 1, 1, 1, 1]), "as_update": np.array([RUNGS, RUNGS, 1, 1, 1, 1])},
    }

    def table(name: str, out: str) -> list[Any]:  # row and step of a table
        return [make("Gather", [name, "split_row"], [out + "_"]), make("Gather", [out + "_", "step"], [out])]

    def ladder(role: str, fresh: str) -> list[Any]:
        new = [
            make("Mul", ["u_own", fresh], [role + "_own"]),
            make("Cast", [role], [role + "_32"], to=T.FLOAT),
            make("Unsqueeze", [role + "_32", "own"], [role + "_all"]),
            make("Mul", ["u_rest", role + "_all"], [role + "_products"]),
            make("Where", ["used", role + "_products", "nothing"], [role + "_used"]),
            make("ReduceSum", [role + "_used", "axis1"], [role + "_old"], keepdims=0),
            make("Add", [role + "_own", role + "_old"], [role + "_new"]),
            make("Cast", [role + "_new"], ["next_" + role], to=kind),
        ]
        return new

    tail = [
        make("Gather", ["corrected", "own"], ["u"]),
        make("Gather", ["corrected", "last"], ["c"]),
        make("Sub", ["c", "u"], ["gap"]),
        make("Mul", ["gap", "guidance"], ["guided"]),
        make("Add", ["guided", "u"], ["e"]),
        make("Sub", ["latents", "e"], ["next_x0_prev"]),
        make("Equal", ["step", "zero"], ["first"]),
        make("Where", ["first", "zeros", "x0_prev"], ["memory"]),
        *(make("Gather", [name, "step"], [name.lower()]) for name in ("A", "B", "M")),
        make("Mul", ["latents", "a"], ["ax"]),
        make("Mul", ["e", "b"], ["be"]),
        make("Mul", ["memory", "m"], ["mm"]),
        make("Add", ["ax", "be"], ["axbe"]),
        make("Add", ["axbe", "mm"], ["without_noise" if noise else "next_latents"]),
    ]
    if noise:
        weights["amplitudes"] = AMPLITUDES
        tail += [
            make("Gather", ["amplitudes", "step"], ["amplitude"]),
            make("Mul", ["noise", "amplitude"], ["added"]),
            make("Add", ["without_noise", "added"], ["next_latents"]),
        ]
    full = [
        make("Mul", ["latents", "kernel"], ["wx"]),
        make("ReduceMean", ["prompt_embeds"], ["means_"], axes=[1, 2], keepdims=1),
        make("Unsqueeze", ["means_", "axis1"], ["means"]),
        make("Add", ["wx", "means"], ["q"]),
        *table("U", "update"),
        make("Slice", ["update", "own", "rest", "axis1"], ["u_own_"]),
        make("Reshape", ["u_own_", "as_first"], ["u_own"]),
        make("Slice", ["update", "rest", "end", "axis1"], ["u_rest_"]),
        make("Reshape", ["u_rest_", "as_update"], ["u_rest"]),
        make("Equal", ["u_rest", "nothing"], ["unused"]),
        make("Not", ["unused"], ["used"]),
        *ladder("feature_ladder", "q"),
    ]
    if probe:
        full += [make("ReduceMean", ["q"], ["z"], axes=[1], keepdims=1), *ladder("probe_ladder", "z")]
    predicted = [
        *table("P", "row"),
        make("Reshape", ["row", "as_first"], ["c_o"]),
        make("Cast", ["feature_ladder"], ["l32"], to=T.FLOAT),
        make("Equal", ["c_o", "nothing"], ["unused"]),
        make("Mul", ["c_o", "l32"], ["products"]),
        make("Where", ["unused", "nothing", "products"], ["terms"]),
        make("ReduceSum", ["terms", "own"], ["q"], keepdims=0),
        *([make("Gather", ["errors", "step"], ["probe_error"])] if probe else []),
        *([make("Gather", ["counts", "step"], ["choices"])] if probe else []),
    ]
    inputs = [
        value("latents", T.FLOAT, LATENT),
        value("step", T.INT64, []),
        value("split_row", T.INT64, []),
        value("prompt_embeds", T.FLOAT, [2, kit.TOKENS, kit.WIDTH]),
        value("guidance", T.FLOAT, []),
        value("x0_prev", T.FLOAT, LATENT),
        *(value(role, kind, shape) for role, shape in shapes.items()),
        *([value("noise", T.FLOAT, LATENT)] if noise else []),
    ]
    states = [value(name, T.FLOAT, LATENT) for name in ("next_latents", "next_x0_prev")]
    news = [value("next_" + role, kind, shape) for role, shape in shapes.items()]
    chosen = [value("choices", T.INT64, [2]), value("probe_error", T.FLOAT, [])] if probe else []
    offset = [*table("offsets", "offset"), make("Sub", ["q", "offset"], ["corrected"])]
    plain = [make("Identity", ["q"], ["corrected"])]
    save(folder / "unet/step_full.onnx", [*full, *plain, *tail], inputs, [*states, *news], weights)
    save(folder / "unet/step_predicted.onnx", [*predicted, *offset, *tail], inputs, [*states, *chosen], weights)


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Any]) -> None:
    tensors = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = onnx.helper.make_graph(nodes, path.stem, inputs, outputs, tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def parts(kit: SimpleNamespace, dtype: str = "float32", probe: bool = False, noise: bool = False) -> dict[str, Any]:
    """The manifest's components for those graphs."""
    found, port = kit.components(), kit.port
    base = found["step_full"]
    shapes = {"feature_ladder": FEATURE, **({"probe_ladder": PROBE} if probe else {})}
    inputs = (*base.inputs, port("split_row", "split_row", "int64"))
    inputs += tuple(port(role, role, dtype, *shape) for role, shape in shapes.items())
    inputs += (port("noise", "noise", "float32", *LATENT),) if noise else ()
    news = tuple(port("next_" + role, role, dtype, *shape) for role, shape in shapes.items())
    chosen = (port("choices", "choices", "int64", 2), port("probe_error", "probe_error", "float32")) if probe else ()
    component = kit.m.Component
    found["step_full"] = component("step_full", base.path, inputs, (*base.outputs, *news))
    found["step_predicted"] = component("step_predicted", "unet/step_predicted.onnx", inputs, (*base.outputs, *chosen))
    return found


@pytest.fixture
def predicting(bundle_folder: Path, kit: SimpleNamespace) -> Callable[..., Path]:
    """Turn the tiny bundle into one with predicted steps; `threshold` asks for a probe."""

    def build(
        dtype: str = "float32",
        probe: bool = False,
        threshold: float | None = None,
        noise: bool = False,
        **changes: Any,
    ) -> Path:
        for name in ("step_full.onnx", "model.onnx_data"):
            (bundle_folder / "unet" / name).unlink(missing_ok=True)
        write_steps(bundle_folder, kit, dtype, probe, noise)
        spec = PredictionSpec(
            "whole_output",
            FEATURE,
            MASKS,
            dtype,
            *(("P1", "l2", PROBE) if probe else ()),
            fallback_threshold=threshold,
        )
        (bundle_folder / "selftest.safetensors").unlink(missing_ok=True)
        fields = {"components": parts(kit, dtype, probe, noise), "prediction": spec, "selftest": None, **changes}
        kit.reseal(bundle_folder, **fields)
        return bundle_folder

    return build


def reference(
    kit: SimpleNamespace, latents: Any, memory: Any, first: int, embeds: Any, kinds: tuple[str, ...], row: int
) -> list[Any]:
    """Latents after each step."""
    ladder, out = np.zeros(FEATURE, np.float32), []
    for step, kind in enumerate(kinds, first):
        if kind == "predicted":
            q = np.tensordot(CANDIDATES[row, step], ladder, 1) - OFFSET[row, step]
        else:
            q = kit.KERNEL * latents + embeds.mean((1, 2)).reshape(2, 1, 1, 1)
        if kind == "full":
            u = UPDATE[row, step]
            ladder = u[:, :1].reshape(-1, 1, 1, 1, 1) * q + np.tensordot(u[:, 1:], ladder, 1)
        e = q[:1] + 2.0 * (q[1:] - q[:1])
        used = np.zeros_like(latents) if step == 0 else memory
        latents, memory = kit.A[step] * latents + kit.B[step] * e + kit.M[step] * used, latents - e
        out.append(latents)
    return out


def run(session: Session, first: int = 0, **options: Any) -> list[StepEvent]:
    latents, memory = session.initial_latents(5), session.initial_latents(6)
    return list(
        session.run_steps(latents, memory if first else None, first, session.encode("a red circle"), 2.0, **options)
    )


def expected(session: Session, kit: SimpleNamespace, first: int, kinds: tuple[str, ...], row: int) -> list[Any]:
    embeds = session.encode("a red circle")
    return reference(kit, session.initial_latents(5), session.initial_latents(6), first, embeds, kinds, row)


def same(events: list[StepEvent], wanted: list[Any], tolerance: float = 1e-5) -> None:
    for event, latents in zip(events, wanted, strict=True):
        np.testing.assert_allclose(event.latents, latents, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["onnxruntime", "openvino"])
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return str(request.param)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3)])
def test_each_split_follows_its_mask(
    predicting: Callable[..., Path], kit: SimpleNamespace, backend: str, dtype: str, tolerance: float
) -> None:
    with Session(Bundle.open(predicting(dtype)), backend=backend, threads=1) as session:
        for first, row, kinds in ((0, 1, MASKS[0].mask), (1, 2, MASKS[1].mask), (2, 0, ("full", "full"))):
            events = run(session, first)
            assert tuple(event.kind for event in events) == kinds
            same(events, expected(session, kit, first, kinds, row), tolerance)
            assert {(event.choices, event.probe_error) for event in events} == {(None, None)}


def test_a_hot_run_follows_its_own_mask_and_row_and_a_normal_one_is_as_before(
    predicting: Callable[..., Path], kit: SimpleNamespace, backend: str
) -> None:
    with Session(Bundle.open(predicting()), backend=backend, threads=1) as session:
        before = [event.latents for event in run(session)]
        for mask in MASKS[2:]:
            events = run(session, mask.split, level="hot")
            assert tuple(event.kind for event in events) == mask.mask
            same(events, expected(session, kit, mask.split, mask.mask, mask.row))
        np.testing.assert_array_equal([event.latents for event in run(session)], before)
        assert {event.kind for event in run(session, 2)} == {"full"}
        assert {event.kind for event in run(session, 0, predict=False, level="hot")} == {"full"}


def test_where_there_is_no_hot_mask_the_normal_one_holds(predicting: Callable[..., Path]) -> None:
    spec = replace(PREDICTION, masks=(*MASKS[:2], replace(MASKS[4], row=3)))
    with Session(Bundle.open(predicting(prediction=spec)), threads=1) as session:
        assert tuple(event.kind for event in run(session, 1, level="hot")) == MASKS[1].mask
        assert (session.mask(1, level="hot"), session.mask(3, level="hot")) == (MASKS[1], None)
        assert session.mask(2) is None
        assert session.mask(2, predict=False, level="hot") is None
        assert session.step_graphs(2) == session.step_graphs(3, level="hot") == ("step_full",)
        assert session.step_graphs(2, level="hot") == ("step_full", "step_predicted")
        for ask in (session.mask, session.step_graphs):
            with pytest.raises(RequestError, match="level"):
                ask(0, level="cold")
        with pytest.raises(RequestError, match="level"):
            run(session, 0, level="cold")


def test_a_run_without_prediction_is_the_plain_bundle_bit_for_bit(
    predicting: Callable[..., Path], kit: SimpleNamespace, backend: str
) -> None:
    with Session(Bundle.open(predicting()), backend=backend, threads=1) as session:
        events = run(session, predict=False)
        assert {event.kind for event in events} == {"full"}
        same(events, expected(session, kit, 0, ("full",) * 4, 0))
        assert not session.is_open("step_predicted")
        again = run(session, predict=False)
    for one, other in zip(events, again, strict=True):
        np.testing.assert_array_equal(one.latents, other.latents)


def test_a_second_image_equals_a_fresh_process_and_what_the_caller_holds_stays(
    predicting: Callable[..., Path], backend: str
) -> None:
    folder = predicting()
    with Session(Bundle.open(folder), backend=backend, threads=1) as session:
        first = run(session)
        kept = [event.latents.copy() for event in first]
        second = run(session, 1)
        third = run(session)
    with Session(Bundle.open(folder), backend=backend, threads=1) as fresh:
        alone = run(fresh, 1)
    for one, other in zip(second, alone, strict=True):
        np.testing.assert_array_equal(one.latents, other.latents)
    for copy, event, again in zip(kept, first, third, strict=True):
        np.testing.assert_array_equal(copy, event.latents)
        np.testing.assert_array_equal(copy, again.latents)


def test_a_second_image_equals_the_first_of_another_process(predicting: Callable[..., Path]) -> None:
    folder = predicting(probe=True, threshold=0.3)
    with Session(Bundle.open(folder)) as session:
        generate(session, "a blue square", seed=1)
        here = generate(session, "a red circle", seed=3).latents
    code = (
        "import sys; from latentrelay.runtime import generate\n"
        "sys.stdout.buffer.write(generate(sys.argv[1], 'a red circle', seed=3).latents.tobytes())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, str(folder)], capture_output=True, check=True)
    assert done.stdout == here.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_the_ladders_hold_at_the_start_changes_nothing(
    predicting: Callable[..., Path], backend: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Session(Bundle.open(predicting(dtype)), backend=backend, threads=1) as session:
        clean = run(session)
        for poison in (math.nan, math.inf, 0.0, 7.0):

            def reset(ladders: Ladders, poison: float = poison) -> None:
                for array in (*ladders.current.values(), *ladders.spare.values()):
                    array.fill(poison)

            monkeypatch.setattr(Ladders, "reset", reset)
            for one, other in zip(clean, run(session), strict=True):
                np.testing.assert_array_equal(one.latents, other.latents)


def test_two_runs_at_once_do_not_share_ladders(predicting: Callable[..., Path], backend: str) -> None:
    with Session(Bundle.open(predicting()), backend=backend, threads=1) as session:
        alone = [event.latents for first in (0, 1) for event in run(session, first)]
        embeds, start, memory = session.encode("a red circle"), session.initial_latents(5), session.initial_latents(6)
        one = session.run_steps(start, None, 0, embeds, 2.0)
        head = next(one)
        other = list(session.run_steps(start, memory, 1, embeds, 2.0))
        together = [event.latents for event in (head, *one, *other)]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_cancelled_run_leaves_the_session_as_new(
    predicting: Callable[..., Path], backend: str, stop_after: int
) -> None:
    folder, seen = predicting(), []
    with Session(Bundle.open(folder), backend=backend, threads=1) as session:
        with pytest.raises(RunCancelledError):
            generate(session, "a red circle", seed=9, on_step=seen.append, cancel=lambda: len(seen) == stop_after)
        assert len(seen) == stop_after
        result = generate(session, "a red circle", seed=3)
    with Session(Bundle.open(folder), backend=backend, threads=1) as fresh:
        alone = generate(fresh, "a red circle", seed=3)
    np.testing.assert_array_equal(result.latents, alone.latents)


def test_generate_counts_steps_and_opens_both_graphs_before_the_first(predicting: Callable[..., Path]) -> None:
    with Session(Bundle.open(predicting())) as session:
        opened = []
        result = generate(session, "a", on_step=lambda _: opened.append(session.is_open("step_predicted")))
        assert opened == [True] * 4
        assert dict(result.kinds) == {"full": 2, "predicted": 2, "recomputed": 0}
        assert (result.computed_steps, result.predicted_steps) == (2, 2)
        session.release("step_full")
        assert not session.is_open("step_predicted")
        plain = generate(session, "a", predict=False)
        assert (plain.computed_steps, plain.predicted_steps) == (4, 0)
        assert not session.is_open("step_predicted")


def test_choices_and_the_probe_error_are_told(predicting: Callable[..., Path], kit: SimpleNamespace) -> None:
    with Session(Bundle.open(predicting(probe=True))) as session:
        events = run(session)
        same(events, expected(session, kit, 0, MASKS[0].mask, 1))
    assert [event.choices for event in events] == [None, (5, 3), None, (8, 0)]
    assert [event.probe_error for event in events] == [None, pytest.approx(0.2), None, pytest.approx(0.4)]


@pytest.mark.parametrize(
    ("threshold", "asked", "kinds"),
    [
        (None, None, ("full", "predicted", "full", "predicted")),
        (0.3, None, ("full", "predicted", "full", "recomputed")),
        (None, 0.1, ("full", "recomputed", "full", "recomputed")),
        (0.3, math.inf, ("full", "predicted", "full", "predicted")),
        (0.3, 0.0, ("full", "recomputed", "full", "recomputed")),
    ],
)
def test_a_step_predicted_too_far_off_is_computed_and_its_ladders_thrown_away(
    predicting: Callable[..., Path],
    kit: SimpleNamespace,
    backend: str,
    threshold: float | None,
    asked: float | None,
    kinds: tuple[str, ...],
) -> None:
    folder = predicting(probe=True, threshold=threshold)
    with Session(Bundle.open(folder), backend=backend, threads=1) as session:
        events = run(session, fallback_threshold=asked)
        assert tuple(event.kind for event in events) == kinds
        same(events, expected(session, kit, 0, kinds, 1))
        assert events[1].choices == (5, 3)
    result = generate(folder, "a", fallback_threshold=asked)
    assert result.computed_steps == 2 + kinds.count("recomputed")


def test_a_threshold_needs_a_probe_and_a_sensible_number(predicting: Callable[..., Path]) -> None:
    with (
        Session(Bundle.open(predicting())) as session,
        pytest.raises(RequestError, match="report no probe error"),
    ):
        run(session, fallback_threshold=0.1)
    with Session(Bundle.open(predicting(probe=True))) as session, pytest.raises(RequestError, match="out of range"):
        run(session, fallback_threshold=-1.0)


def poisoned(folder: Path, graph: str, name: str, index: tuple[int, ...]) -> None:
    model = onnx.load(folder / graph)
    tensor = next(item for item in model.graph.initializer if item.name == name)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[index] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, folder / graph)


@pytest.mark.parametrize(
    ("graph", "table", "index", "words"),
    [
        ("unet/step_full.onnx", "U", (1, 2, 0, 0), r"step_full, step 2 \(feature_ladder\)"),
        ("unet/step_predicted.onnx", "P", (1, 3, 1), "step_predicted, step 3"),
        ("unet/step_predicted.onnx", "offsets", (1, 1), "step_predicted, step 1"),
        ("unet/step_predicted.onnx", "errors", (3,), r"step_predicted, step 3 \(probe_error\)"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nan_names_the_graph_and_the_step(
    predicting: Callable[..., Path],
    kit: SimpleNamespace,
    graph: str,
    table: str,
    index: tuple[int, ...],
    words: str,
    dtype: str,
) -> None:
    folder = predicting(dtype, probe=True)
    manifest = Bundle.open(folder).manifest
    poisoned(folder, graph, table, index)
    kit.reseal(folder, components=dict(manifest.components), prediction=manifest.prediction, selftest=None)
    with Session(Bundle.open(folder)) as session, pytest.raises(NonFiniteError, match=words):
        run(session)


def test_a_graph_that_reads_a_ladder_too_early_is_an_error_not_a_picture(
    predicting: Callable[..., Path], kit: SimpleNamespace
) -> None:
    folder = predicting()
    manifest = Bundle.open(folder).manifest
    model = onnx.load(folder / "unet/step_full.onnx")
    tensor = next(item for item in model.graph.initializer if item.name == "U")
    values = UPDATE.copy()
    values[1, 0, 1, 1] = 0.5  # the first step's second rung out of a ladder that is not there
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, "U"))
    onnx.save(model, folder / "unet/step_full.onnx")
    kit.reseal(folder, components=dict(manifest.components), prediction=manifest.prediction, selftest=None)
    with Session(Bundle.open(folder)) as session, pytest.raises(NonFiniteError, match="step_full, step 0"):
        run(session)


def test_graphs_that_are_not_what_the_manifest_says(
    predicting: Callable[..., Path], kit: SimpleNamespace, backend: str
) -> None:
    folder = predicting("float16")
    with Session(Bundle.open(folder)) as session:
        session.open("step_full")
    kit.reseal(
        folder,
        components=parts(kit),
        prediction=PREDICTION,
        selftest=None,
        backend=BackendSpec("onnxruntime", (), {"intra_op_threads": 1}),
    )
    with Session(Bundle.open(folder)) as session, pytest.raises(SessionError, match="other inputs than the manifest"):
        run(session)  # float16 graphs, float32 in the manifest
    longer = (3, *FEATURE[1:])  # a rung that the graphs do not have
    found = parts(kit, "float16")
    for name in ("step_full", "step_predicted"):
        sides = [
            tuple(replace(p, shape=longer) if p.role == "feature_ladder" else p for p in side)
            for side in (found[name].inputs, found[name].outputs)
        ]
        found[name] = replace(found[name], inputs=sides[0], outputs=sides[1])
    spec = PredictionSpec("whole_output", longer, MASKS, "float16")
    kit.reseal(folder, components=found, prediction=spec, selftest=None)
    words = r"step_full\.onnx: feature_ladder is of another shape.*got \[2, 2, 4, 2, 2\], expected \[3, "
    with Session(Bundle.open(folder), backend=backend) as session, pytest.raises(SessionError, match=words):
        run(session)
    shutil.copy(folder / "unet/step_full.onnx", folder / "unet/step_predicted.onnx")
    manifest = kit.reseal(
        folder, components=parts(kit, "float16", probe=False), selftest=None,
        prediction=PredictionSpec("whole_output", FEATURE, MASKS, "float16"),
    )  # fmt: skip
    assert manifest.prediction is not None
    (folder / "unet/step_predicted.onnx").unlink()
    with pytest.raises(ManifestError, match=r"step_predicted\.onnx is used but not listed"):
        kit.reseal(folder, components=parts(kit, "float16"), prediction=manifest.prediction, selftest=None)


def test_the_self_test_makes_the_ladders_that_its_file_leaves_out(
    predicting: Callable[..., Path], kit: SimpleNamespace, backend: str
) -> None:
    folder = predicting()
    manifest = Bundle.open(folder).manifest
    noise = np.random.default_rng(0)
    latents, memory = (noise.standard_normal(LATENT).astype(np.float32) for _ in range(2))
    embeds = noise.standard_normal((2, kit.TOKENS, kit.WIDTH)).astype(np.float32)
    first, second = reference(kit, latents, memory, 0, embeds, ("full", "predicted"), 1)
    given = {"split_row": np.array(1), "prompt_embeds": embeds, "guidance": np.float32(2.0)}
    q = kit.KERNEL * latents + embeds.mean((1, 2)).reshape(2, 1, 1, 1)
    x0_prev = latents - (q[:1] + 2.0 * (q[1:] - q[:1]))
    tensors: dict[str, Any] = {"step_full.out.next_latents": first, "step_predicted.out.next_latents": second}
    for name, step, start, kept in (("step_full", 0, latents, memory), ("step_predicted", 1, first, x0_prev)):
        sample = {**given, "latents": start, "x0_prev": kept, "step": np.array(step)}
        tensors |= {f"{name}.in.{key}": np.asarray(array) for key, array in sample.items()}
    tensors = {name: array if array.dtype == np.int64 else array.astype(np.float32) for name, array in tensors.items()}
    kit.safetensors.numpy.save_file(tensors, folder / "selftest.safetensors")
    kit.reseal(folder, components=dict(manifest.components), prediction=manifest.prediction)
    with Session(Bundle.open(folder), backend=backend, threads=1) as session:
        report = session.selftest()
    assert report.ok
    assert set(report.snr_db) == {"step_full", "step_predicted"}
