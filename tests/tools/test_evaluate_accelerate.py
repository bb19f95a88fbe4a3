"""`evaluate --accelerate`: its words, verdicts by hand, its report, and what it refuses (a run takes minutes)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.runtime.errors import RequestError
from latentrelay.tools import accelerate_report, evaluate_accelerate
from latentrelay.tools.accelerate_rows import SHARES
from latentrelay.tools.accelerate_runs import Result
from latentrelay.tools.accelerate_verdicts import frontier, paired
from latentrelay.tools.evaluate_accelerate import FAMILIES, parse_methods
from latentrelay.tools.picture_scores import Scored

COSTS = {"full": 10.0, "tail": 0.0}
COUNT = 8


def a_result(name: str, computed: int, psnr: float, ours: bool = False, spread: float = 0.0) -> Result:
    """`computed` of ten steps; PSNR varies by `spread` over the captions."""
    kinds = ((*("full",) * computed, *("none",) * (10 - computed)),) * COUNT
    scores = Scored(*(np.ones(COUNT) for _ in range(4)), np.zeros((COUNT, 64)))
    values = psnr + spread * np.linspace(-1, 1, COUNT)
    return Result(name, {"computed": computed}, ours, kinds, values, None, scores)


def test_methods_are_parsed() -> None:
    assert parse_methods("all") == list(FAMILIES)
    assert parse_methods("deepcache, ours") == ["ours", "deepcache"]
    with pytest.raises(RequestError, match="magic"):
        parse_methods("ours,magic")


def test_the_frontier_by_hand() -> None:
    whole = a_result("all steps", 10, 200.0)
    results = [
        a_result("a", 4, 40.0, ours=True),
        a_result("b", 2, 20.0, ours=True),
        a_result("c", 4, 38.0),
        a_result("d", 5, 60.0),
    ]
    quarter, middle, half = frontier(results, whole, COSTS, (0.25, 0.4, 0.5))
    assert quarter["ours"] == "b: computed 2"
    assert (quarter["rival"], quarter["gain_db"]) == (None, None)
    assert (middle["ours"], middle["rival"]) == ("a: computed 4", "c: computed 4")
    assert middle["gain_db"] == pytest.approx(2.0)
    assert middle["verdict"] == "ours ahead"
    assert (half["rival"], half["verdict"]) == ("d: computed 5", "rival ahead")
    assert half["device_ms"] == 50.0


def test_ours_is_what_was_planned_and_the_rival_has_its_time() -> None:
    whole, kept = a_result("all steps", 10, 200.0), a_result("planned", 5, 35.0, ours=True)
    planned = Result("planned", {"share": 0.4}, True, kept.kinds, kept.psnr_db, None, kept.scored)
    results = [planned, a_result("a", 4, 50.0, ours=True), a_result("c", 4, 30.0), a_result("d", 5, 33.0)]
    middle, half = frontier(results, whole, COSTS, (0.4, 0.5))
    assert (middle["ours"], middle["rival"], middle["device_ms"]) == (planned.label, "d: computed 5", 50.0)
    assert middle["gain_db"] == pytest.approx(2.0)
    assert "planner" in middle["ours_picked"]
    assert (half["ours"], half["ours_picked"]) == ("a: computed 4", "the best on these captions")


def test_a_quantised_network_is_also_compared_with_the_float_run() -> None:
    def result(name: str, ours: bool, psnr: float, to_float: float) -> Result:
        plain = a_result(name, 4, psnr, ours)
        return Result(name, {}, ours, plain.kinds, plain.psnr_db, np.full(COUNT, to_float), plain.scored)

    both = [result("a", True, 40.0, 39.0), result("b", False, 42.0, 38.0)]
    whole = a_result("all steps", 10, 200.0)
    (own,), (exact,) = frontier(both, whole, COSTS, (0.5,)), frontier(both, whole, COSTS, (0.5,), "float")
    assert (own["verdict"], own["gain_db"]) == ("rival ahead", pytest.approx(-2.0))
    assert (exact["verdict"], exact["gain_db"]) == ("ours ahead", pytest.approx(1.0))


def test_a_gain_within_its_interval_is_no_difference() -> None:
    base = a_result("without", 4, 40.0)
    assert paired(a_result("with", 4, 40.1, spread=3.0), base)["verdict"] == "no difference"
    assert paired(a_result("with", 4, 41.0, spread=0.1), base)["verdict"] == "kept"
    found = paired(a_result("with", 4, 39.0, spread=0.1), base)
    assert found["verdict"] == "dropped"
    assert found["gain_db"] == pytest.approx(-1.0)


def test_labels_leave_out_what_goes_without_saying() -> None:
    result = a_result("whole output", 4, 40.0)
    settings = {"computed": 4, "policy": "uniform", "orders": [0, 1], "abscissa": "step", "rectifier": "all"}
    told = Result(result.name, settings, True, result.kinds, result.psnr_db, None, result.scored)
    assert told.label == "whole output: computed 4, orders 0+1, rectifier all"


def a_row(label: str, ours: bool, share: float, psnr: float, **settings: Any) -> dict[str, Any]:
    return {
        "method": label, "settings": settings, "label": label, "ours": ours, "device_ms": 100 * share,
        "time_share": share, "computed_steps": 17 * share, "psnr_db": psnr, "psnr_db_95": [psnr - 1, psnr + 1],
        "psnr_db_to_float": None, "picture_psnr_db": psnr, "ssim": 0.99, "attribute_accuracy": 0.97,
        "frechet_distance": 280.0,
    }  # fmt: skip


def test_the_report_holds_every_row(tmp_path: Path) -> None:
    gain = {"gain_db": 5.0, "gain_db_95": [4.0, 6.0], "verdict": "kept"}
    document = {
        "rows": [
            a_row("all steps", False, 1.0, 200.0),
            a_row("<ours>", True, 0.25, 40.0, orders=[1], rectifier="all"),
            a_row("fewer steps", False, 0.25, 35.0, grid="kept"),
        ],
        "frontier": [
            {"share": share, "ours": "<ours>", "rival": "fewer steps", "ours_psnr_db": 40.0, "rival_psnr_db": 35.0,
             "device_ms": 25.0, **gain, "verdict": "ours ahead"}
            for share in SHARES
        ],
        "ablation": [{"part": "rectifier", "share": 0.25, "with": "a", "without": "b", **gain}],
        "chosen": [{"share": 0.25, "label": "planned", "device_ms": 25.0, "psnr_db": 40.0, "why": "it was best",
                    "end_to_end_speedup": 3.9}],
        "student": "pi", "device": "x86-laptop-vnni", "kernels": "onnxruntime-x64", "num_steps": 25, "split": 8,
        "sampler": "dpmsolver++", "captions": 4, "data_split": "gate", "seed": 0, "threads": 1, "precision": "fp32",
        "fitted_on": 48,
    }  # fmt: skip
    accelerate_report.write(document, tmp_path)
    assert json.loads((tmp_path / "accelerate.json").read_text()) == document
    page = (tmp_path / "accelerate.html").read_text()
    assert "&lt;ours&gt; *" in page
    assert "it was best" in page
    assert page.count("<tr") == 1 + 3 + 2 + 2
    assert (tmp_path / "accelerate.png").read_bytes().startswith(b"\x89PNG")
    accelerate_report.write({**document, "ablation": [], "chosen": []}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": "magic"}, "unknown method"),
        ({"captions": 1}, "too few captions"),
        ({"split": 0}, "split is out of range"),
        ({"split": 24}, "split is out of range"),
        ({"data_split": "train"}, "unknown data split"),
        ({"precision": "w4a4"}, "unknown precision"),
    ],
)
def test_what_it_refuses(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "methods": "all", "captions": 2, "seed": 0, "device": None, "student": None, "split": 8, "num_steps": 25,
        "precision": None, "data_split": "gate", "output": tmp_path, "as_json": True,
    }  # fmt: skip
    with pytest.raises(RequestError, match=words):
        evaluate_accelerate.run(**{**asked, **changes})


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two captions, two rivals, a short run of the reference pipeline."""
    output = tmp_path_factory.mktemp("accelerate")
    evaluate_accelerate.run(
        "fewer-steps,deepcache",
        2,
        0,
        device="x86-laptop-vnni",
        student="pi",
        split=2,
        num_steps=7,
        precision="fp32",
        data_split="gate",
        output=output,
        as_json=True,
    )
    return dict(json.loads((output / "accelerate.json").read_text()))


def test_a_short_run_has_what_machines_read(document: dict[str, Any]) -> None:
    whole, *rows = document["rows"]
    assert {"rows", "chosen", "ablation", "frontier"} <= set(document)
    assert {(row["method"], *row["settings"].values()) for row in rows} == {
        *(("fewer steps", count, "kept") for count in (3, 4, 5)),
        ("fewer steps", 4, "natural"),
        *(("DeepCache", interval) for interval in (2, 3, 4, 5, 6)),
    }
    for row in document["rows"]:
        assert {"device_ms", "computed_steps", "psnr_db", "ssim", "attribute_accuracy", "frechet_distance"} <= set(row)
    assert (whole["computed_steps"], whole["psnr_db"], whole["ssim"], whole["time_share"]) == (5, 200.0, 1.0, 1.0)
    assert [row["computed_steps"] for row in rows if row["method"] == "DeepCache"] == [3, 2, 2, 1, 1]


def test_steps_cost_what_they_call(document: dict[str, Any]) -> None:
    costs = {kind: each["median_ms"] for kind, each in document["costs"].items()}
    by_label = {row["label"]: row["device_ms"] for row in document["rows"]}
    assert by_label["all steps"] == pytest.approx(5 * (costs["full"] + costs["tail"]), abs=0.01)
    three = 3 * (costs["full"] + costs["tail"])
    assert by_label["fewer steps: steps 3, grid kept"] == pytest.approx(three, abs=0.01)
    cached = 2 * costs["full_deep"] + 3 * costs["shallow"] + 5 * costs["tail"]
    assert by_label["DeepCache: interval 3"] == pytest.approx(cached, abs=0.01)


def test_every_step_kept_is_the_run_itself(document: dict[str, Any]) -> None:
    (kept,) = (row for row in document["rows"] if row["label"] == "fewer steps: steps 5, grid kept")
    assert kept["psnr_db"] == 200.0
