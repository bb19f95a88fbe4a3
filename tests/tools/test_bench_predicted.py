"""The benchmark of predicted steps on a tiny network: what its JSON holds, and that its graphs are what they are.

Times of so small a network say nothing; the command as a whole is a bar (slow), here its parts over a float graph.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from latentrelay.compress.plan import Plan
from latentrelay.runtime.errors import RequestError
from latentrelay.tools import bench_graphs, bench_predicted, bench_source, predicted_graphs
from latentrelay.tools.bench_clock import Timed
from latentrelay.tools.bench_source import Network
from latentrelay.tools.bench_worker import Lap
from latentrelay.tools.predicted_graphs import COMPUTED, EVERY, PREDICTED, SPLIT, VARIANTS
from rich.console import Console

SOME = [
    each
    for each in VARIANTS
    if each.kind == "part"
    or each.name in ("full", "full-deep-feature", "predicted-deep-feature", "predicted-whole-output")
]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    folder = tmp_path_factory.mktemp("predicted") / "network"
    folder.mkdir()
    bench_source.write_geometry(folder, "tiny")
    return Network.read(folder)


@pytest.fixture(scope="module")
def graphs(network: Network) -> Path:
    """The variants over the float graph: w8a8 has the same structure."""
    unet, folder = network.folder.with_name("unet"), network.folder.with_name("graphs")
    unet.mkdir()
    folder.mkdir()
    bench_graphs.write_ours(network, unet, "onnxruntime-x64")
    predicted_graphs.write_variants(network, folder, unet, SOME)
    predicted_graphs.write_shares(network, folder)
    return folder


@pytest.fixture(scope="module")
def timed(network: Network, graphs: Path) -> dict[str, Timed]:
    return bench_predicted.measure(network, graphs, 1, 2, lambda words: None, SOME)


def test_the_object_for_machines_and_the_table_for_people(
    network: Network, graphs: Path, timed: dict[str, Timed]
) -> None:
    found = bench_predicted.document(network, graphs, timed, 1, 2)
    assert json.loads(json.dumps(found)).keys() == found.keys()
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [each.name for each in SOME]
    assert all(len(row["rounds_ms"]) == 2 and row["median_ms"] > 0 for row in rows.values())
    assert rows["full"]["time_ratio"] == 1.0
    for target, name in (("deep_feature", "predicted-deep-feature"), ("whole_output", "predicted-whole-output")):
        assert found["targets"][target]["time_ratio"] == rows[name]["time_ratio"] > 0
        assert found["targets"][target]["flop_share"] == rows[name]["flop_share"]
    assert found["selection_over_full"] == pytest.approx(sum(found["selection_parts"].values()), abs=2e-6)
    assert found["selection_parts"].keys() == {"selection-alone", "ladder-updates-alone"}
    console = Console(file=io.StringIO(), width=160)
    bench_predicted.show(console, found)
    assert "choosing and updating ladders" in console.file.getvalue()


def test_ladders_are_written_where_the_runtime_wants_them(network: Network, graphs: Path) -> None:
    variant = next(each for each in SOME if each.name == "full-deep-feature")
    opened = bench_predicted.open_variant(network, graphs, variant, 1)
    opened.run()
    assert opened.ladders.keys() == {"next_feature_ladder", "next_probe_ladder"}
    before = opened.feeds["feature_ladder"]
    after = opened.ladders["next_feature_ladder"]
    np.testing.assert_allclose(after[1] * EVERY, after[0] - before[0], rtol=1e-3, atol=1e-4)


def test_flop_shares_are_those_of_the_layers_that_run(network: Network, graphs: Path) -> None:
    counted = json.loads((graphs / predicted_graphs.SHARES).read_text())
    shares = counted["shares"]
    assert shares["predicted-whole-output"] == 0.0
    # by hand: two branches of conv_in 4 -> 32, 3x3, on 8x8 pixels, the first resnet's conv1 32 -> 32, and the time
    # embedding's three linears 32 -> 128 -> 128 -> 32, two FLOPs a multiply-add
    probe = 2 * 2 * (9 * 4 * 32 * 64 + 9 * 32 * 32 * 64 + 32 * 128 + 128 * 128 + 128 * 32)
    assert shares["predicted-whole-output-probe"] == pytest.approx(probe / counted["step_flops"], rel=1e-9)
    deep, fixed = shares["predicted-deep-feature"], shares["predicted-deep-feature-fixed"]
    assert 0 < fixed < deep < 1
    assert deep - fixed == pytest.approx(2 * 2 * (9 * 32 * 32 * 64 + 128 * 32) / counted["step_flops"], rel=1e-9)


def test_graphs_hold_what_their_names_say(graphs: Path) -> None:
    ports: dict[str, tuple[set[str], set[str]]] = {}
    convolutions: dict[str, int] = {}
    for each in SOME:
        graph = onnx.load(str(graphs / each.file), load_external_data=False).graph
        ports[each.name] = ({value.name for value in graph.input}, {value.name for value in graph.output})
        convolutions[each.name] = sum(node.op_type == "Conv" for node in graph.node)
    assert ports["full"] == (
        {"latents", "step", "prompt_embeds", "guidance", "x0_prev"}, {"next_latents", "next_x0_prev"}
    )  # fmt: skip
    assert ports["full-deep-feature"][1] - ports["full"][1] == {"next_feature_ladder", "next_probe_ladder"}
    assert ports["predicted-deep-feature"][1] - ports["full"][1] == {"choices", "probe_error"}
    assert ports["predicted-whole-output"][1] == ports["full"][1]
    assert convolutions["full"] == convolutions["full-deep-feature"]
    assert convolutions["predicted-whole-output"] == convolutions["selection-alone"] == 0
    assert 2 < convolutions["predicted-deep-feature"] < convolutions["full"]


def test_the_plan_of_the_benchmark_computes_and_predicts_where_it_is_timed(network: Network) -> None:
    plan = predicted_graphs.predicted_plan(Plan.load(network.folder), "deep_feature", selects=True, channels=4)
    mask = next(each.mask for each in plan.recipe.splits if each.split == SPLIT)
    assert (mask[COMPUTED - SPLIT], mask[PREDICTED - SPLIT]) == ("full", "predicted")
    tables: Any = plan.tables
    assert (tables.ladder_update[1, COMPUTED] != 0.0).sum() == 3  # y, and rung 1 from y and the old rung 0
    np.testing.assert_array_equal(tables.candidates[1, PREDICTED], [[1.0, 0.0], [1.0, 1.0]])


def test_ratios_are_taken_within_rounds() -> None:
    full = Timed((Lap(100.0, 1.0), Lap(200.0, 0.5), Lap(100.0, 1.0)))
    mine = Timed((Lap(20.0, 1.0), Lap(60.0, 0.5), Lap(10.0, 0.5)))
    timed = {"full": full, "mine": mine}
    assert bench_predicted.ratio(timed, "mine") == pytest.approx(0.2)
    assert bench_predicted.processor_ratio(timed, "mine") == pytest.approx(0.2)
    assert bench_predicted.ratio({"full": full, "mine": full}, "mine") == 1.0


def test_misuse_is_refused() -> None:
    with pytest.raises(RequestError, match="too few rounds"):
        bench_predicted.run(geometry="tiny", threads=1, rounds=3, work=None, output=None, as_json=True)
    with pytest.raises(RequestError, match="--student goes with --model"):
        bench_predicted.run(
            geometry=None, student=Path("student"), threads=1, rounds=5, work=None, output=None, as_json=True
        )
