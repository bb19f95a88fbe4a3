"""What `evaluate --vae` measures: PSNR by hand, crops around textures, timing in turn, and a run on a small student."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentrelay.compress.light_vae import LightVaeSpec, new_light_vae
from latentrelay.reference.scenes import Scene, SceneObject
from latentrelay.runtime.errors import RequestError
from latentrelay.tools import evaluate_vae


def test_psnr_is_at_peak_one_and_one_a_picture() -> None:
    pictures = torch.zeros(2, 3, 4, 4)
    pictures[1] += 0.2  # a tenth of the range
    assert evaluate_vae.psnr(pictures, torch.zeros(2, 3, 4, 4)) == pytest.approx([120, 20], abs=1e-4)


def test_texture_crops_see_the_object_alone() -> None:
    scene = Scene(
        (SceneObject("circle", "red", "small", "dotted", (0.25, 0.75), 0.125, (0, 0, 0)),), None, "studio", 1.0
    )
    pictures = torch.zeros(1, 3, 16, 16)
    reference = pictures.clone()
    reference[..., 10:14, 2:6] += 0.2  # the object's square: rows by y, columns by x
    assert evaluate_vae.texture_psnr(pictures, reference, [scene]) == {"dotted": pytest.approx(20, abs=1e-4)}
    reference[..., 10:14, 2:6] = 0
    reference[..., 2:6, 10:14] = 1
    assert evaluate_vae.texture_psnr(pictures, reference, [scene])["dotted"] > 100


def test_tasks_run_in_turn_and_warm_up_is_not_counted() -> None:
    seen: list[str] = []
    wall, processor = evaluate_vae.interleaved(
        {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=3, warm_up=1
    )
    assert seen == ["a", "b"] * 4
    assert [len(values) for values in (*wall.values(), *processor.values())] == [3] * 4


def test_a_timing_is_a_median_with_its_spread() -> None:
    assert evaluate_vae.Timing.of([*range(11)]).document() == {"median_ms": 5.0, "p10_ms": 1.0, "p90_ms": 9.0}


def test_a_run_prints_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_light_vae(LightVaeSpec(8, (1, 0, 0, 0), (0, 0, 0, 1))).save_pretrained(tmp_path)
    evaluate_vae.run(
        "reference", tmp_path, scenes=4, generated=0, split="gate", rounds=2, sheet=tmp_path / "a.png", as_json=True
    )
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["decoder_parameters"]["source"] == 1_702_339
    assert found["decoder_parameters_ratio"] == found["decoder_parameters"]["light"] / 1_702_339
    assert found["decode_speedup"] > 1
    assert found["psnr_db"] < 15  # untrained
    assert set(found["judge"]) == {"source", "light"}
    numbers = [found["encoder"]["latent_snr_db"], *found["psnr_db_to_truth"].values(), *found["psnr_db_p10_p90"]]
    assert np.isfinite(numbers).all()
    assert not math.isnan(found["judge"]["light"]["frechet_distance"])
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no light VAE"):
        evaluate_vae.run("reference", tmp_path)
    with pytest.raises(RequestError, match="data split"):
        evaluate_vae.run("reference", tmp_path, split="train")
