"""The examples run as they stand, on a pipeline folder that nobody prepared for them."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrelay.runtime import Bundle

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
slow = pytest.mark.slow


def main_of(name: str) -> Callable[..., None]:
    """The example's `main`."""
    main: Callable[..., None] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return main


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("export_raspberry_pi", "raspberry-pi-5"),
        pytest.param("export_android", "galaxy-s24", marks=slow),
        pytest.param("export_iphone", "iphone-15-pro", marks=slow),
        pytest.param("export_laptop", "x86-laptop-vnni", marks=slow),
    ],
)
def test_an_export_script_makes_a_bundle_for_its_device(
    name: str, profile: str, tiny: Any, tiny_pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_pipeline(tiny_pipeline, tmp_path / "model")
    main_of(name)(str(tmp_path / "model"), str(tmp_path / "bundle"))
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.profile["name"] == profile
    assert capsys.readouterr().out.strip().endswith(bundle.digest)


def test_every_family_of_shipped_profiles_has_a_script() -> None:
    assert {path.stem for path in EXAMPLES.glob("export_*.py")} == {
        "export_android",
        "export_iphone",
        "export_laptop",
        "export_raspberry_pi",
    }


def test_the_app_example_finishes_on_the_device(
    tiny_bundle: Path,
    tiny_cloud: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    main_of("finish_on_device")(str(tiny_bundle), "a red circle", tiny_cloud)
    assert capsys.readouterr().out == "out.png: hybrid, 12 steps there, 13 here\n"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
