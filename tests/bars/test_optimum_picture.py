"""Bar: Optimum's pipeline opens the reference bundle and paints diffusers' picture from the same initial latents."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow

BAR_DB, STEPS = 40.0, 25
PROMPTS = ("a large red circle on a wooden table", "a small blue square left of a green star")


def test_optimum_paints_the_same_pictures(
    reference_pipeline: Any, reference_bundle: Callable[[str], Path], measured: Callable[[str, dict[str, Any]], Path]
) -> None:
    from latentrelay.reference.pipeline import GUIDANCE

    values = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optimum pulls in torch.jit and reads configurations in deprecated ways
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        other = ORTStableDiffusionPipeline.from_pretrained(str(reference_bundle("dpmsolver++")))
        other.set_progress_bar_config(disable=True)
        for seed, prompt in enumerate(PROMPTS):
            request: dict[str, Any] = {
                "prompt": prompt,
                "latents": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)),
                "num_inference_steps": STEPS,
                "guidance_scale": GUIDANCE,
                "output_type": "np",
            }
            expected, got = reference_pipeline(**request).images[0], other(**request).images[0]
            assert expected.shape == got.shape == (128, 128, 3)
            assert expected.std() > 0.02  # a picture, not a grey sheet
            values[prompt] = round(float(-10 * np.log10(max(np.mean((got - expected) ** 2), 1e-30))), 2)
    measured("optimum_picture", {"what": "PSNR in dB (peak 1), Optimum against diffusers", "psnr_db": values})
    assert min(values.values()) >= BAR_DB
