"""The manifest's schema, its digest, and what the parser refuses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from latentrelay.runtime.digest import json_digest
from latentrelay.runtime.errors import BundleLayoutError, BundleTamperedError, ManifestError
from latentrelay.runtime.manifest import Manifest, check_path


@pytest.fixture
def document(bundle_folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((bundle_folder / "manifest.json").read_text())
    return loaded


def resealed(document: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in document.items() if key != "digest"}
    return {**rest, "digest": json_digest(rest)}


def test_round_trip_is_exact(bundle_folder: Path) -> None:
    text = (bundle_folder / "manifest.json").read_bytes()
    manifest = Manifest.from_json_bytes(text)
    assert manifest.to_json_bytes() == text
    assert manifest.sealed() == manifest
    assert manifest.schedule.timesteps == (999, 700, 400, 100)
    assert manifest.components["step_full"].inputs[4].role == "x0_prev"


def test_the_digest_covers_everything_else(document: dict[str, Any]) -> None:
    assert document["digest"] == resealed(document)["digest"]
    document["guidance"]["default"] = 2.25
    with pytest.raises(BundleTamperedError, match="own digest") as caught:
        Manifest.from_dict(document)
    assert caught.value.path == "manifest.json"
    assert Manifest.from_dict(resealed(document)).guidance.default == 2.25


DECODER = {"class_name": "AutoencoderTiny", "digest": "sha256:00", "scaling_factor": 1.0, "shift_factor": 0.0}
CHANGES: list[tuple[str, Any, str]] = [
    ("colour", 1, "unknown key colour"),
    ("latent.depth", 1, "unknown key latent.depth"),
    ("components.unet2", {"role": "unet"}, "components.unet2.path is missing"),
    ("name", 3, "name: got the number 3, expected str"),
    ("precision", None, "precision: got null"),
    ("schedule.num_steps", True, "schedule.num_steps: got a boolean, expected int"),
    ("schedule.num_steps", 5, "expected num_steps = 5"),
    ("schedule.timesteps", [1, "2", 3, 4], r"timesteps\[1\]: got a string"),
    ("schedule.sampler", "euler", "euler"),
    ("image.height", 17, "image: got 17x16"),
    ("latent.scaling_factor", 0, "scaling_factor"),
    ("prediction_type", "sample", "epsilon"),
    ("guidance.branches", 1, "branches"),
    ("tokenizer.pad_id", -1, "tokenizer"),
    ("components.step_full.inputs", [{"name": "a", "role": "a", "dtype": "float64", "shape": []}], "float64"),
    ("components.vae_decoder", None, "components.vae_decoder: got null"),
    ("schema_version", "2.0", "update latentrelay"),
    ("schema_version", 1.0, "schema_version"),
    ("schema_version", "1.x", "schema_version"),
    ("files", [], "not listed under files"),
    ("backend.session_options", {"x": [1]}, "session_options.x"),
    ("decoder", {"class_name": "AutoencoderTiny"}, "decoder.digest is missing"),
    ("decoder", {**DECODER, "scale": 1.0}, "unknown key decoder.scale"),
    ("decoder", {**DECODER, "scaling_factor": 0.0}, "decoder.scaling_factor: got 0"),
]


@pytest.mark.parametrize(("where", "value", "message"), CHANGES)
def test_what_breaks_the_schema_is_named(document: dict[str, Any], where: str, value: Any, message: str) -> None:
    *parents, last = where.split(".")
    target = document
    for key in parents:
        target = target[key]
    target[last] = value
    with pytest.raises(ManifestError, match=message) as caught:
        Manifest.from_dict(resealed(document))
    assert caught.value.exit_status == 3


@pytest.mark.parametrize("component", ["text_encoder", "step_full", "vae_decoder"])
def test_the_components_the_runtime_runs_must_be_there(document: dict[str, Any], component: str) -> None:
    del document["components"][component]
    with pytest.raises(ManifestError, match=f"{component} is missing"):
        Manifest.from_dict(resealed(document))


def test_repeated_and_doubled_files_are_refused(document: dict[str, Any]) -> None:
    entry = dict(document["files"][0])
    for extra, message in [
        (entry, "listed twice"),
        ({**entry, "path": entry["path"].upper()}, "listed twice"),
        ({**entry, "path": "manifest.json"}, "lists itself"),
        ({**entry, "path": "new", "sha256": "AB" * 32}, "sha256"),
        ({**entry, "path": "new", "bytes": -1}, "bytes"),
    ]:
        with pytest.raises(ManifestError, match=message):
            Manifest.from_dict(resealed({**document, "files": [*document["files"], extra]}))


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../b", "a//b", "", ".", "a\\b", "C:x", "a\nb", "x" * 300])
def test_paths_that_could_leave_the_bundle(document: dict[str, Any], path: str) -> None:
    with pytest.raises(BundleLayoutError, match="could leave"):
        check_path(path)
    document["files"].append({"path": path, "bytes": 0, "sha256": "0" * 64})
    with pytest.raises(BundleLayoutError):
        Manifest.from_dict(resealed(document))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b"null", b'{"a":1,"a":2}', b'{"a":NaN}', b"\xff\xfe", b"[" * 100_000]
)
def test_bytes_that_are_no_manifest(text: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json_bytes(text)


def test_too_large_is_refused_unparsed() -> None:
    with pytest.raises(ManifestError, match="too large"):
        Manifest.from_json_bytes(b" " * (4 * 2**20 + 1))


def test_a_writer_learns_of_numbers_that_json_lacks(bundle_folder: Path, kit: SimpleNamespace) -> None:
    with pytest.raises(ManifestError, match="cannot be written"):
        kit.make_manifest(bundle_folder, parity={"unet": {"snr_db": float("inf")}})


def test_a_decoder_of_its_own_has_a_scaling_of_its_own(document: dict[str, Any]) -> None:
    latent = document["latent"]
    plain = Manifest.from_dict(document)
    assert plain.decoder is None
    assert plain.decoder_scaling == (latent["scaling_factor"], latent["shift_factor"])
    document["decoder"] = DECODER
    light = Manifest.from_dict(resealed(document))
    assert light.decoder_scaling == (1.0, 0.0)
    assert light.latent == plain.latent
    assert light.to_dict()["decoder"] == DECODER
