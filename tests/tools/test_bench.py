"""The benchmark: rows agree with torch, take turns in their own processes, and say why they cannot run.

The whole command on a torch network is a bar (slow); here its parts in one process, and the command on a bundle.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.export.stages import StageStore
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.selftest import snr_db
from latentrelay.tools import bench, bench_graphs, bench_rows, bench_source
from latentrelay.tools.bench_clock import Timed, interleave, times_faster
from latentrelay.tools.bench_rows import BASELINE, ROWS, Row, guided, open_row, why_not
from latentrelay.tools.bench_source import Network
from latentrelay.tools.bench_worker import Lap, Worker, environment, in_child

BY_NAME = {row.name: row for row in ROWS}
NEEDED = {"name", "median_ms", "spread_ms", "bytes", "peak_memory_mib"}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    folder = tmp_path_factory.mktemp("bench") / "network"
    folder.mkdir()
    bench_source.write_geometry(folder, "tiny")
    return Network.read(folder)


@pytest.fixture(scope="module")
def optimum(network: Network) -> Path:
    folder = network.folder.with_name("optimum")
    folder.mkdir()
    bench_graphs.write_optimum(network, folder)
    return folder


def expected(network: Network) -> Any:
    pred = network.inputs()["noise_pred"].astype(np.float64)
    return pred[0:1] + 7.5 * (pred[1:2] - pred[0:1])


def agreement(row: Row, network: Network, folder: Path) -> float:
    opened = open_row(row, network, folder, 1)
    assert sum(path.stat().st_size for path in opened.files) > 2 * network.parameters
    return snr_db(expected(network), guided(row, network, opened.run()))


def test_optimums_graph_and_torch_are_the_same_network(network: Network, optimum: Path) -> None:
    # 137 dB on one processor, 110 on another: float32 sums in another order
    assert agreement(BY_NAME["torch-eager-fp32"], network, network.folder) > 90
    assert agreement(BY_NAME[BASELINE], network, optimum) > 90


def test_our_step_graph_is_the_same_network_in_both_libraries(network: Network) -> None:
    pytest.importorskip("openvino")
    folder = network.folder.with_name("ours")
    folder.mkdir()
    bench_graphs.write_ours(network, folder, "openvino")
    for library, ran in (("onnxruntime", "CPUExecutionProvider"), ("openvino", "OpenVINO CPU f32")):
        row = BY_NAME[f"latentrelay-{library}-fp32"]
        assert agreement(row, network, folder) > 80
        assert open_row(row, network, folder, 1).ran == ran


def test_openvino_and_nncf_read_optimums_graph(network: Network, optimum: Path) -> None:
    pytest.importorskip("openvino")
    assert agreement(BY_NAME["openvino-f32"], network, optimum) > 80
    pytest.importorskip("nncf")
    folder = network.folder.with_name("nncf")
    folder.mkdir()
    bench_graphs.write_nncf(network, folder, optimum)
    row = BY_NAME["nncf-openvino-int8"]
    opened = open_row(row, network, folder, 1)
    assert opened.files == (folder / "model.xml", folder / "model.bin")
    assert (folder / "model.bin").stat().st_size < 1.2 * network.parameters  # a byte a weight
    assert 5 < snr_db(expected(network), guided(row, network, opened.run())) < 60
    assert sys.modules.get("openvino_telemetry") is None


def test_calibration_steps_are_spread_over_the_run(network: Network) -> None:
    steps, feeds = zip(*network.calibration(), strict=True)
    assert steps == (0, 8, 16, 24)
    assert {name: array.shape for name, array in feeds[0].items()} == {
        "sample": (2, 4, 8, 8),
        "timestep": (),
        "encoder_hidden_states": (2, 8, 32),
    }
    assert all(isinstance(array, np.ndarray) for array in feeds[0].values())  # () too, or ONNX Runtime refuses it
    np.testing.assert_array_equal(feeds[1]["sample"][0], feeds[1]["sample"][1])  # both branches see the same latents
    assert feeds[0]["timestep"] > feeds[3]["timestep"]


def test_the_command_on_a_bundle(tiny_bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    status = bench.run(
        geometry=None,
        model=None,
        student=None,
        bundle=tiny_bundle,
        rows=["bundle-openvino", "bundle-onnxruntime"],
        threads=1,
        rounds=5,
        work=None,
        output=tmp_path / "bench.json",
        as_json=True,
    )
    document = json.loads(capsys.readouterr().out)
    assert status == 0
    assert document == json.loads((tmp_path / "bench.json").read_text())
    assert [row["name"] for row in document["rows"]] == ["bundle-onnxruntime", "bundle-openvino"]
    for row in document["rows"]:
        assert row.keys() >= NEEDED
        assert row["reason"] is None
        assert len(row["rounds_ms"]) == 5
        assert row["median_ms"] == pytest.approx(float(np.median(row["rounds_ms"])), abs=1e-3)
        assert row["spread_ms"] == pytest.approx(max(row["rounds_ms"]) - min(row["rounds_ms"]), abs=2e-3)
        assert 20 < row["peak_memory_mib"] < 2000
        files = [tiny_bundle / "unet" / name for name in ("step_full.onnx", "model.onnx_data")]
        assert row["bytes"] == sum(path.stat().st_size for path in files)
    assert document["rows"][1]["snr_db"] > 80
    assert document["threads"] == 1
    assert document["versions"]["onnxruntime"]
    assert document["machine"]["cpu"]


def test_rounds_go_from_row_to_row_and_a_row_that_ends_drops_out() -> None:
    order: list[str] = []

    class Stub:
        def __init__(self, name: str, lives: int) -> None:
            self.row, self.lives = Row(name, "network", "torch"), lives

        def lap(self) -> Lap | str:
            order.append(self.row.name)
            self.lives -= 1
            return Lap(10.0 * len(order), 1.0) if self.lives >= 0 else "its process ended"

    timed, gone = interleave([Stub("a", 9), Stub("b", 9), Stub("c", 1)], 3, lambda turn, name: None)  # type: ignore[list-item]
    assert order == ["a", "b", "c", "b", "c", "a", "a", "b"]
    assert gone == {"c": "its process ended"}
    assert timed["a"].rounds_ms == [10.0, 60.0, 70.0]
    assert (timed["a"].median_ms, timed["a"].spread_ms) == (60.0, 60.0)


def test_ratios_are_taken_within_each_round() -> None:
    def timed(*ms: float) -> Timed:
        return Timed(tuple(Lap(each, 1.0) for each in ms))

    rows = {"slow": timed(10, 40, 90), "fast": timed(5, 10, 30)}  # ratios 2, 4, 3; of the medians 4
    assert times_faster(rows, "fast", "slow") == 3.0
    assert times_faster(rows, "fast", "absent") is None


def test_a_row_that_cannot_be_loaded_says_why(network: Network, tmp_path: Path) -> None:
    with Worker(BY_NAME[BASELINE], network, tmp_path, 1) as worker:
        answer = worker.loaded()
    assert isinstance(answer, str)
    assert "model.onnx" in answer


def test_a_row_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not(Row("x", "y", "onnxruntime", ("no-such-package",))) == "not installed: no-such-package"
    monkeypatch.setattr(bench_rows, "_has_bf16", lambda: False)
    assert why_not(Row("x", "y", "openvino", (), precision="bf16")) == "the processor has no bf16"
    monkeypatch.setenv("PATH", "")
    assert why_not(BY_NAME["torch-compile-fp32"]) == "no C++ compiler, which torch.compile needs"


def test_rows_are_chosen_by_name_in_the_tables_order() -> None:
    names = ["torch-eager-fp32", BASELINE]
    assert [row.name for row in bench.choose(ROWS, names[::-1])] == names
    assert bench.choose(ROWS, []) == [row for row in ROWS if row.name != "latentrelay-openvino-fp32"]
    assert [row.name for row in bench.choose(ROWS, ["latentrelay-openvino-fp32"])] == ["latentrelay-openvino-fp32"]
    with pytest.raises(RequestError, match="got optimum, expected torch-eager-fp32"):
        bench.choose(ROWS, ["optimum"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rounds": 4}, "too few rounds"),
        ({"geometry": "tiny", "model": "reference"}, "give one of"),
        ({"student": Path("s")}, "--student goes with --model"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], words: str) -> None:
    plain: dict[str, Any] = dict.fromkeys(("geometry", "model", "student", "bundle", "threads", "work", "output"))
    with pytest.raises(RequestError, match=words):
        bench.run(**{**plain, "rows": [], "rounds": 5, "as_json": True, **change})


def test_a_row_is_not_loaded_where_memory_would_not_do(network: Network, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable: {1024 * 517} kB\n")
    words = bench._short_of_memory(network, tmp_path / "meminfo")  # 512 MiB and twice 3 MiB of weights
    assert words == "not enough free memory: 517 MiB, expected 518 or more"
    (tmp_path / "meminfo").write_text(f"MemAvailable: {1024 * 518} kB\n")
    assert bench._short_of_memory(network, tmp_path / "meminfo") is None
    assert bench._short_of_memory(network, tmp_path / "absent") is None


def test_a_student_stands_in_the_place_of_the_models_unet(tmp_path: Path, tiny: Any, tiny_pipeline: Any) -> None:
    source, small = tmp_path / "source", tmp_path / "small"
    tiny.save_pipeline(tiny_pipeline, source)
    tiny.make_unet(widths=(8, 8)).save_pretrained(small / "unet", safe_serialization=True)
    counts = {}
    for student in (None, small):
        prepared = bench.Prepared(StageStore(tmp_path / f"work-{student is None}"), 1)
        counts[student] = prepared.network("tiny", str(source), student).parameters
    assert counts[None] == sum(each.numel() for each in tiny_pipeline.unet.parameters())
    assert counts[small] < counts[None]


def test_an_unknown_geometry_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="got sd99, expected hybrid-sd-224m"):
        in_child(bench_source.write_geometry, tmp_path, "sd99", threads=1)


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with environment(3):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("3", "3")
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ
