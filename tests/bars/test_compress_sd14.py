"""Compression at Stable Diffusion 1.4's size: the published shape, exactly, within its time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.full_size


def test_the_published_224m_student(tmp_path: Path, measured: Callable[[str, dict[str, Any]], Path]) -> None:
    words = ["compress", "--geometry", "sd14", "--recipe", "hybrid-sd-224m", "-o", str(tmp_path / "s"), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "latentrelay.tools.cli", *words],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["parameters"] == 224_492_676
    assert document["block_mid_channels"] == [256, 480, 960, 320, 320, 160, 160, 96, 256]
    assert document["self_attention_heads"] == [8, 4, 6, 6, 8, 8, 4, 8, 8]
    assert document["cross_attention_heads"] == [8] * 9
    assert document["light_decoder_parameters"] == 1_222_531
    assert document["published_total"] == 225_797_127  # "225.8M": with the few-step variant's guidance embedding
    assert document["roundtrip_identical"] is True
    assert document["seconds"] < 600
    assert document["peak_memory_mib"] < 12 * 1024
    kept = ("parameters", "block_mid_channels", "self_attention_heads", "light_decoder_parameters", "published_total")
    measured("compress_sd14", {name: document[name] for name in (*kept, "seconds", "peak_memory_mib")})
