"""`evaluate --precision`: its words, its measure, its report, and what it refuses (a run takes minutes)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.runtime.errors import RequestError
from latentrelay.tools import precision_report
from latentrelay.tools.evaluate_precision import parse_precisions
from latentrelay.tools.precision_runs import latent_psnr_db

Run = Callable[..., Any]


def a_row(precision: str, **changes: Any) -> dict[str, Any]:
    row = {
        "precision": precision, "simulated": False, "bytes": 3 * 2**20, "median_ms": 12.345, "spread_ms": 1.0,
        "peak_memory_mib": 321, "psnr_db": 37.5, "psnr_db_uncompensated": 34.25, "psnr_db_ptqd": 34.5,
        "psnr_db_gain_only": 34.75, "attribute_accuracy": 0.9612, "frechet_distance": 280.04, "verdict": "kept",
    }  # fmt: skip
    return {**row, **changes}


def test_precisions_are_parsed_and_fp32_is_always_there() -> None:
    assert parse_precisions("all") == ["fp32", "fp16", "w8a16", "w8a8", "w4a16", "w4a8", "w4a4"]
    assert parse_precisions("w4a8, w8a8") == ["fp32", "w8a8", "w4a8"]
    with pytest.raises(RequestError, match="w2a2"):
        parse_precisions("w8a8,w2a2")


def test_the_measure_by_hand() -> None:
    reference = np.zeros((2, 1, 1, 4), np.float32)
    reference[:, 0, 0, 0] = 2.0
    got = reference.copy()
    got[0, 0, 0, 1] = 0.4  # mean squared error 0.04, peak 2: 10 log10(4 / 0.04)
    assert latent_psnr_db(reference, got).tolist() == pytest.approx([20.0, 200.0])


def test_the_report_holds_every_row(tmp_path: Path) -> None:
    simulated = a_row("w4a4", simulated=True, median_ms=None, peak_memory_mib=None, psnr_db_uncompensated=None)
    simulated |= {"psnr_db_ptqd": None, "psnr_db_gain_only": None, "verdict": "simulated: no CPU runs it"}
    document = {
        "rows": [a_row("fp32"), a_row("w8a8"), simulated],
        "curves": {"w8a8": {"steps": [8, 9], "before": [1e-3, 2e-3], "after": [5e-4, 1e-3]}},
        "student": "<pi>", "device": "x86-laptop-vnni", "kernels": "onnxruntime-x64", "num_steps": 25, "split": 8,
        "sampler": "dpmsolver++", "captions": 4, "data_split": "gate", "seed": 0, "threads": 1,
    }  # fmt: skip
    precision_report.write(document, tmp_path)
    assert json.loads((tmp_path / "precision.json").read_text()) == document
    page = (tmp_path / "precision.html").read_text()
    assert "&lt;pi&gt;" in page
    assert "w4a4 (simulated)" in page
    assert page.count("<tr>") == 4
    assert (tmp_path / "precision.png").read_bytes().startswith(b"\x89PNG")
    assert precision_report.short(document["rows"][1])[:5] == ["w8a8", "3.00", "12.35", "321", "37.50"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--precision", "w8a8", "--sweep"), "evaluations of their own"),
        (("--precision", "w8a8", "--lora", "x.safetensors"), "--lora"),
        (("--precision", "w8a8", "-m", "somewhere"), "reference"),
        (("--precision", "w9a9"), "w9a9"),
        (("--precision", "w8a8", "--splits", "25"), "split"),
        (("--device", "pixel-8"), "--device"),
        (("--precision", "w8a8", "--device", "iphone-15-pro"), "packages"),
    ],
)
def test_what_does_not_go_together_is_misuse(arguments: tuple[str, ...], words: str, command: Run) -> None:
    done = command("evaluate", *arguments, "--captions", 2, "--json")
    assert done.status == 2
    assert words in done.json["reason"]
