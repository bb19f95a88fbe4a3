"""Bar: predicted steps against every rival on the same graphs, captions and seeds, and what each part contributes.

128 captions of the report split through the phone-mid student in float, 17 of 25 steps on the device; some forty
minutes on a quiet thread. Ours are on the frontier at two of three device times at least; what the planner ships
within one of them is twice as fast end to end, its attribute accuracy within a point and its Frechet distance within
5 % of the same segment fully computed. Figures go to docs/measured/accelerate_fp32.json, the plot to docs/images/.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

CAPTIONS, SEED = 128, 11
IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
POINTS, RATIO, SPEEDUP = 0.01, 1.05, 2.0


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from latentrelay.tools import evaluate_accelerate

    output = tmp_path_factory.mktemp("accelerate")
    evaluate_accelerate.run(
        "all",
        CAPTIONS,
        SEED,
        device="x86-laptop-vnni",
        student="phone-mid",
        split=8,
        num_steps=25,
        precision="fp32",
        data_split="report",
        output=output,
        as_json=True,
    )
    shutil.copyfile(output / "accelerate.png", IMAGES / "accelerate_fp32.png")
    return dict(json.loads((output / "accelerate.json").read_text()))


def test_the_figures_are_kept(document: dict[str, Any], measured: Callable[[str, dict[str, Any]], Path]) -> None:
    found = json.loads(measured("accelerate_fp32", document).read_text())
    assert found["captions"] >= 128
    assert {row["method"] for row in found["rows"]} >= {
        "all steps", "whole output", "deep feature", "fewer steps", "DeepCache", "FORA", "TaylorSeer", "TeaCache",
        "first-block cache", "output cache", "random per-token choice", "guidance interval", "few-step student",
    }  # fmt: skip


def test_ours_are_on_the_frontier(document: dict[str, Any]) -> None:
    entries = document["frontier"]
    print(*(f"{each['share']:.0%}: {each['verdict']} {each['gain_db_95']}" for each in entries), sep="\n")
    assert len(entries) == 3
    assert sum(entry["verdict"] != "rival ahead" for entry in entries) >= 2


def test_twice_as_fast_at_the_same_quality(document: dict[str, Any]) -> None:
    entries = [entry for entry in document["chosen"] if entry["label"] is not None]
    print(*((e["share"], e["end_to_end_speedup"], e["attribute_accuracy_difference_95"]) for e in entries), sep="\n")
    assert any(
        entry["end_to_end_speedup"] >= SPEEDUP
        and entry["attribute_accuracy_difference_95"][0] >= -POINTS
        and entry["frechet_ratio_95"][1] <= RATIO
        for entry in entries
    )


def test_every_part_has_an_interval(document: dict[str, Any]) -> None:
    parts = {entry["part"].split(":")[0].split(",")[0] for entry in document["ablation"]}
    assert parts >= {"policy", "adjusted grid", "rectifier", "per-token choice over order 1"}
    for entry in document["ablation"]:
        low, high = entry["gain_db_95"]
        assert low <= entry["gain_db"] <= high
