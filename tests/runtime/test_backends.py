"""Which backend runs a bundle, and the execution providers' options: what reaches ONNX Runtime, what is refused."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from latentrelay.runtime import Bundle, Session, generate
from latentrelay.runtime.backend import open_backend
from latentrelay.runtime.errors import RequestError, SessionError
from latentrelay.runtime.manifest import BackendSpec, Manifest
from latentrelay.runtime.onnxruntime_backend import _session_options, checked_options, share_threads

CPU = "CPUExecutionProvider"


def test_an_unknown_backend_is_named_with_those_there_are(bundle_folder: Path) -> None:
    with pytest.raises(RequestError, match=r"got tensorrt, expected onnxruntime \| openvino \| coreml"):
        Session(Bundle.open(bundle_folder), backend="tensorrt")
    with pytest.raises(SessionError, match="got abacus"):
        open_backend(BackendSpec("abacus", ()))


def test_threads_below_zero_are_refused_by_every_backend() -> None:
    with pytest.raises(RequestError, match="threads is out of range"):
        open_backend(BackendSpec("openvino", ()), threads=-1)


def test_execution_providers_are_refused_where_they_mean_nothing() -> None:
    with pytest.raises(RequestError, match="the backend here is openvino"):
        open_backend(BackendSpec("openvino", ()), providers=[CPU])


def test_a_bundle_of_another_backend_runs_on_onnx_runtime(bundle_folder: Path, kit: SimpleNamespace) -> None:
    here = generate(bundle_folder, "a red circle", seed=3)
    kit.reseal(
        bundle_folder, backend=BackendSpec("openvino", (CPU,), {"inference_precision": "bf16", "intra_op_threads": 1})
    )
    with Session(Bundle.open(bundle_folder), backend="onnxruntime") as session:
        result = generate(session, "a red circle", seed=3)
        assert session.providers_by_component == dict.fromkeys(("text_encoder", "step_full", "vae_decoder"), (CPU,))
    np.testing.assert_array_equal(result.latents, here.latents)


def test_provider_options_reach_onnx_runtime(bundle_folder: Path, kit: SimpleNamespace) -> None:
    options = {CPU: {"arena_extend_strategy": "kSameAsRequested"}, "QNNExecutionProvider": {"backend_path": "libQ.so"}}
    spec = BackendSpec("onnxruntime", ("QNNExecutionProvider", CPU), {}, options)
    manifest = kit.reseal(bundle_folder, backend=spec)
    again = Manifest.from_json_bytes(manifest.to_json_bytes())
    assert again.backend == spec
    backend = open_backend(again.backend)
    assert backend._providers == [(CPU, options[CPU])]  # what this machine's ONNX Runtime lacks is skipped
    with Session(Bundle.open(bundle_folder)) as session:
        session.open("step_full")
        assert session.providers_used == (CPU,)


@pytest.mark.parametrize("value", ["/tmp/evil.so", "..\\evil.dll", "folder/lib.so", "~evil", ".hidden"])
def test_a_bundle_cannot_name_a_library_by_path(value: str) -> None:
    with pytest.raises(SessionError, match="backend_path of QNNExecutionProvider is a path"):
        checked_options("QNNExecutionProvider", {"backend_path": value})
    assert checked_options("QNNExecutionProvider", {"backend_path": "libQnnHtp.so", "n": "1.5"})["n"] == "1.5"


@pytest.mark.parametrize(
    ("asked", "own", "session", "expected"),
    [(None, "4", 0, "4"), (2, "4", 2, "2"), (None, None, 3, "3"), (0, "4", 0, "4")],
)
def test_xnnpack_gets_the_threads(asked: int | None, own: str | None, session: int, expected: str) -> None:
    options: dict[str, object] = {"intra_op_threads": session}
    xnnpack = {} if own is None else {"intra_op_num_threads": own}
    share_threads(options, xnnpack, asked=asked)
    assert xnnpack == {"intra_op_num_threads": expected}
    made = _session_options(onnxruntime, options)
    assert made.intra_op_num_threads == 1
    assert made.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_a_bundle_may_let_onnx_runtime_spin_beside_xnnpack() -> None:
    options: dict[str, object] = {"config.session.intra_op.allow_spinning": "1"}
    share_threads(options, {}, asked=None)
    assert options["config.session.intra_op.allow_spinning"] == "1"


@pytest.mark.parametrize("entry", ["session.collect_node_memory_stats_to_file", "ep.context_file_path"])
def test_a_bundle_sets_only_entries_that_name_no_file(entry: str, bundle_folder: Path, kit: SimpleNamespace) -> None:
    kit.reseal(bundle_folder, backend=BackendSpec("onnxruntime", (CPU,), {f"config.{entry}": str(bundle_folder / "x")}))
    with pytest.raises(SessionError, match="unknown session option"):
        Session(Bundle.open(bundle_folder)).open("text_encoder")
    assert not (bundle_folder / "x").exists()
    known = BackendSpec("onnxruntime", (CPU,), {"config.session.intra_op.allow_spinning": "0"})
    kit.reseal(bundle_folder, backend=known)
    with Session(Bundle.open(bundle_folder)) as session:
        session.open("text_encoder")
