"""Bar: the light decoder has at most a tenth of the source's parameters, five times its speed, and is 27 dB from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

RATIO, SPEEDUP, PSNR_DB = 0.10, 5.0, 27.0


def test_the_light_decoder_is_small_fast_and_near(
    reference_pipeline: Any, measured: Callable[[str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from latentrelay.reference.pipeline import reference_path
    from latentrelay.tools import evaluate_vae

    if not (reference_path() / "light_vae").is_dir():
        pytest.skip("the light VAE's weights are not in this checkout")
    evaluate_vae.run("reference", scenes=256, generated=64, as_json=True)
    found = json.loads(capsys.readouterr().out)
    measured("light_vae", {"command": "latentrelay evaluate --vae --json", "threads": 1, **found})
    assert found["decoder_parameters_ratio"] <= RATIO
    assert found["psnr_db"] >= PSNR_DB
    assert found["decode_speedup"] >= SPEEDUP
    accuracy = {name: found["judge"][name]["attribute_accuracy"] for name in ("source", "light")}
    assert accuracy["light"] >= accuracy["source"] - 0.02
