"""Bar: what can be predicted of the released student's steps, measured before any sampler is built on it.

Builds the phone-mid student at fp32 and w8a8 and profiles both along 32 recorded runs: error matrices, schedules, the
probes' rank correlations, and the teacher's own first steps. Figures go to docs/measured/prediction_profile.json, plots
to docs/images/error_matrix.png and docs/images/probe_fidelity.png. Some ten minutes on a core, most of it the builds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.export import export, load_source
from latentrelay.export.calibration import Calibration
from latentrelay.tools import prediction_profile
from latentrelay.tools.recipes import shipped_recipe

pytestmark = pytest.mark.slow

STUDENT, PROFILE = "phone-mid", "x86-laptop-vnni"
CAPTIONS, SEED, SPLIT = 32, 5, 8
DOCS = Path(__file__).resolve().parents[2] / "docs"


def built(reference_pipeline: Any, folder: Path) -> list[Path]:
    from latentrelay.reference.captions import sample_captions
    from latentrelay.reference.pipeline import GUIDANCE, NAME, reference_path

    student = reference_path() / "students" / STUDENT
    prompts = [caption.text for _, caption in sample_captions("calibrate", 32, SEED)]
    held_out = [caption.text for _, caption in sample_captions("gate", 12, SEED)]
    calibration = Calibration(
        tuple(dict.fromkeys(prompts)), tuple(text for text in dict.fromkeys(held_out) if text not in prompts)
    )
    return [
        export(
            load_source(reference_pipeline, name=NAME),
            PROFILE,
            folder / precision,
            guidance=GUIDANCE,
            student=student,
            precision=precision,
            recipe=shipped_recipe(student, precision, "onnxruntime-x64"),
            calibration=calibration,
            work=folder / "work",
        ).bundle
        for precision in ("fp32", "w8a8")
    ]


def test_steps_can_be_predicted_and_tokens_hardly_differ(reference_pipeline: Any, tmp_path: Path) -> None:
    out = tmp_path / "profile"
    bundles = built(reference_pipeline, tmp_path / "bundles")
    prediction_profile.run(bundles, CAPTIONS, SEED, split=SPLIT, threads=1, output=out, as_json=True)
    document = json.loads((out / "prediction_profile.json").read_text())
    shutil.copy(out / "prediction_profile.json", DOCS / "measured")
    for name in ("error_matrix.png", "probe_fidelity.png"):
        shutil.copy(out / name, DOCS / "images")

    by_name = {row["name"]: row for row in document["networks"]}
    assert set(by_name) == {"fp32", "w8a8", "teacher"}
    for row in by_name.values():
        for matrix in row["matrices"].values():
            values = np.array(matrix["values"], dtype=float)[row["steps"][0] : row["steps"][1] + 1]
            nearest, twice = (np.nanmean(np.diagonal(values, row["steps"][0] + gap)) for gap in (1, 2))
            assert 0 < nearest < twice
        cost = {(each["target"], each["kind"], each["computed"]): each["cost"] for each in row["schedules"]}
        for (target, kind, computed), value in cost.items():
            if kind in ("even", "unweighted"):
                assert cost[target, "optimal", computed] <= value * 1.0001
    ranks = {
        (name, row["target"], row["horizon"], row["probe"], row["metric"]): row
        for name in ("fp32", "w8a8")
        for row in by_name[name]["fidelity"]
    }
    of_feature = ("fp32", "deep_feature", 0)
    richest, cheap = (ranks[(*of_feature, probe, "l2")]["across_tokens"] for probe in ("P3", "P1"))
    assert richest["low"] > cheap["high"]  # the probe that sees the prompt knows best where prediction is hard
    assert cheap["low"] > 0.2
    assert ranks[(*of_feature, "P1", "cosine")]["across_tokens"]["high"] < cheap["low"]
    for row in ranks.values():
        assert row["oracle"]["mean"] <= row["best_fixed"]["mean"] < row["random"]["mean"]
    chosen = ranks[(*of_feature, "P1", "l2")]
    assert chosen["chosen"]["mean"] > 0.97 * chosen["best_fixed"]["mean"]  # tokens' choice is worth next to nothing
