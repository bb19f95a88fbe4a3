"""`latentrelay verify`: an intact bundle, and one byte changed in every file of it in turn, the manifest included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x01
    path.write_bytes(data)


def refused(done: Any, error: str, path: str) -> str:
    """The reason; standard output held the refusal and nothing else."""
    document = done.json
    assert done.status == 3
    assert (document["ok"], document["error"], document["path"]) == (False, error, path)
    return str(document["reason"])


def test_an_intact_bundle(tiny_bundle: Path, command: Run) -> None:
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    document = command("verify", tiny_bundle, "--json").json
    assert document == {"ok": True, "digest": manifest["digest"], "files": len(manifest["files"])}
    said = command("verify", tiny_bundle)
    assert said.status == 0
    assert all(entry["path"] in said.out for entry in manifest["files"])


def test_the_self_test_runs_every_graph(tiny_bundle: Path, command: Run) -> None:
    figures = command("verify", tiny_bundle, "--selftest", "--json").json["selftest_db"]
    assert {"text_encoder", "unet", "step_full", "vae_decoder"} == set(figures)
    assert min(figures.values()) >= 60.0


def test_one_altered_byte_in_any_file_is_refused(bundle: Path, command: Run) -> None:
    listed = json.loads((bundle / "manifest.json").read_text())["files"]
    kinds = {Path(entry["path"]).suffix or Path(entry["path"]).name for entry in listed}
    assert {".onnx", ".onnx_data", ".json", ".safetensors", ".txt"} <= kinds
    for entry in listed:
        path = bundle / entry["path"]
        before = path.read_bytes()
        for offset in (0, len(before) // 2, len(before) - 1):
            flip(path, offset)
            reason = refused(command("verify", bundle, "--json"), "BundleTamperedError", entry["path"])
            assert "sha256" in reason
            path.write_bytes(before)
    assert command("verify", bundle, "--json").status == 0


def test_a_manifest_altered_anywhere_is_refused(bundle: Path, command: Run) -> None:
    path = bundle / "manifest.json"
    before = path.read_bytes()
    for offset in range(0, len(before), len(before) // 40):
        flip(path, offset)
        done = command("verify", bundle, "--json")
        assert (done.status, done.json["ok"]) == (3, False), f"byte {offset}: {before[offset : offset + 20]!r}"
        assert done.json["path"]
        path.write_bytes(before)


def test_a_value_changed_in_the_manifest_breaks_its_own_digest(bundle: Path, command: Run) -> None:
    path = bundle / "manifest.json"
    text = path.read_text()
    assert '"licence": "unknown"' in text or '"licence":"unknown"' in text
    path.write_text(text.replace('"unknown"', '"unknowm"', 1))
    assert "digest" in refused(command("verify", bundle, "--json"), "BundleTamperedError", "manifest.json")


def test_missing_extra_and_linked_files_are_refused(bundle: Path, command: Run, tmp_path: Path) -> None:
    plan = bundle / "plan.json"
    kept = plan.read_bytes()
    plan.unlink()
    refused(command("verify", bundle, "--json"), "BundleLayoutError", "plan.json")
    (tmp_path / "elsewhere.json").write_bytes(kept)
    plan.symlink_to(tmp_path / "elsewhere.json")
    refused(command("verify", bundle, "--json"), "BundleLayoutError", "plan.json")
    plan.unlink()
    plan.write_bytes(kept)
    (bundle / "unet" / "more.bin").write_bytes(b"x")
    refused(command("verify", bundle, "--json"), "BundleLayoutError", "unet/more.bin")


def test_no_bundle_at_all(command: Run, tmp_path: Path) -> None:
    refused(command("verify", tmp_path / "none", "--json"), "ManifestError", "manifest.json")


def test_a_process_says_the_same(bundle: Path, process: Run) -> None:
    assert process("verify", bundle, "--json").json["ok"] is True
    flip(bundle / "unet" / "model.onnx_data", 100)
    done = process("verify", bundle, "--json")
    refused(done, "BundleTamperedError", "unet/model.onnx_data")
    assert done.err.startswith("latentrelay: ")
