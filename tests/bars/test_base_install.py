"""Bar: the wheel with its base dependencies alone, in an environment of its own, makes pictures; torch is not there.

Needs a package index (pip's ordinary settings hold), and a few hundred MB of disk for a while.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ("torch", "diffusers", "transformers", "onnx", "optimum", "accelerate", "starlette", "uvicorn")
IMPORT_BAR_S = 0.5


def build_wheel(scratch: Path) -> Path:
    """The wheel of what the checkout holds, built from a copy so that nothing is left behind in it."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for folder in folders.values():
        shutil.copytree(ROOT / folder, scratch / "source" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, scratch / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(scratch), str(scratch / "source")]
    subprocess.run(command, check=True)
    return next(scratch.glob("latentrelay-*.whl"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run(program, *arguments)` in the fresh environment, in an empty folder."""
    scratch = tmp_path_factory.mktemp("base-install")
    wheel = build_wheel(scratch)
    venv.create(scratch / "venv", with_pip=True)
    (scratch / "empty").mkdir()
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def start(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(scratch / "venv" / "bin" / program), *arguments]
        return subprocess.run(command, cwd=scratch / "empty", env=settings, capture_output=True, text=True, timeout=900)

    installed = start("python", "-m", "pip", "install", "-q", "--no-input", str(wheel))
    assert installed.returncode == 0, installed.stderr
    return start


Run = Callable[..., subprocess.CompletedProcess[str]]


def test_nothing_heavy_came_along(run: Run) -> None:
    code = f"import importlib.util, json; print(json.dumps([n for n in {ABSENT!r} if importlib.util.find_spec(n)]))"
    assert json.loads(run("python", "-c", code).stdout) == []
    assert run("python", "-m", "pip", "check").returncode == 0


def test_a_picture_is_made_from_a_bundle(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    image = tmp_path / "out.png"
    done = run(
        "latentrelay", "generate", "-b", str(tiny_bundle), "-p", "a red cat", "--seed", "7", "-o", str(image), "--json"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["path_taken"], document["steps"]) == ("device", {"cloud": 0, "device": 25})
    pixels = np.asarray(Image.open(image))
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    assert pixels.std() > 1


def test_it_starts_where_a_cloud_stopped(run: Run, tiny_bundle: Path, tiny_cloud: str, tmp_path: Path) -> None:
    images = []
    for name, cloud in (("alone.png", ()), ("hybrid.png", ("--cloud", tiny_cloud, "--wire-dtype", "float32"))):
        image = tmp_path / name
        where = ("generate", "-b", str(tiny_bundle), "-p", "a red cat", "--seed", "7", "-o", str(image), "--json")
        done = run("latentrelay", *where, *cloud)
        assert done.returncode == 0, done.stderr
        images.append(np.asarray(Image.open(image)).astype(int))
    assert json.loads(done.stdout)["path_taken"] == "hybrid"
    assert np.abs(images[0] - images[1]).max() <= 1


def test_the_bundle_verifies_with_its_self_test(run: Run, tiny_bundle: Path) -> None:
    done = run("latentrelay", "verify", str(tiny_bundle), "--selftest", "--json")
    assert done.returncode == 0, done.stderr
    assert min(json.loads(done.stdout)["selftest_db"].values()) >= 60.0


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("build", "-d", "pixel-8", "-o", "bundle"), "export"),
        (("serve", "--port", "0"), "cloud"),
        (("evaluate", "--captions", "1"), "compress"),
        (("demo",), "export"),
    ],
)
def test_what_needs_more_names_the_extra(run: Run, arguments: tuple[str, ...], extra: str) -> None:
    done = run("latentrelay", *arguments, "--json")
    assert done.returncode == 2, done.stderr
    document = json.loads(done.stdout)
    assert (document["ok"], document["error"]) == (False, "MissingExtraError")
    assert f"latentrelay[{extra}]" in document["reason"]


def test_the_runtime_imports_in_half_a_second(run: Run, measured: Callable[[str, dict[str, Any]], Path]) -> None:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        assert run("python", "-c", "import latentrelay.runtime").returncode == 0
        seconds.append(time.perf_counter() - started)
    measured("import_time", {"what": "best of 5, whole process", "runtime_import_s": round(min(seconds), 3)})
    assert min(seconds) < IMPORT_BAR_S


def test_importing_the_runtime_loads_nothing_of_the_kind(run: Run) -> None:
    code = f"import sys, latentrelay.runtime; sys.exit(any(n in sys.modules for n in {ABSENT!r}))"
    assert run("python", "-c", code).returncode == 0
