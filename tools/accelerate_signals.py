"""What threshold caches look at: relative change of a signal, and which signal TeaCache's is in a U-Net."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from latentrelay.compress.denoising_chain import Floats


def change(now: Floats, before: Floats) -> float:
    """mean |now - before| / mean |before|."""
    return float(np.abs(now - before).mean() / max(float(np.abs(before).mean()), 1e-12))


def tea_signal(found: Mapping[str, Floats]) -> Floats:
    """The first ResNet's state with the time embedding added: the nearest that a U-Net has to a modulated input."""
    return found["probe"]
