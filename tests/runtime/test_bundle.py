"""Opening a bundle: one altered byte anywhere, links, strangers and external data outside are all refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from latentrelay.runtime import Bundle
from latentrelay.runtime.errors import BundleError, BundleLayoutError, BundleTamperedError, ManifestError
from latentrelay.runtime.manifest import replace_files
from latentrelay.runtime.onnx_paths import external_locations


def test_an_intact_bundle_opens(bundle_folder: Path) -> None:
    seen: list[str] = []
    bundle = Bundle.open(bundle_folder, on_file=lambda entry: seen.append(entry.path))
    assert bundle.path == bundle_folder.resolve()
    assert bundle.digest == bundle.manifest.digest
    assert seen == [entry.path for entry in bundle.files]
    assert "unet/model.onnx_data" in seen
    assert bundle.file("unet/step_full.onnx").is_file()
    with pytest.raises(BundleLayoutError):
        bundle.file("../manifest.json")


def test_one_altered_byte_in_any_file_is_found_and_named(bundle_folder: Path) -> None:
    for path in sorted(item for item in bundle_folder.rglob("*") if item.is_file()):
        good = path.read_bytes()
        name = path.relative_to(bundle_folder).as_posix()
        for position in {0, len(good) // 2, len(good) - 2}:
            bad = bytearray(good)
            bad[position] ^= 0x10
            path.write_bytes(bad)
            with pytest.raises((BundleTamperedError, ManifestError)) as caught:
                Bundle.open(bundle_folder)
            assert caught.value.path == name
            assert caught.value.exit_status == 3
        path.write_bytes(good)
    Bundle.open(bundle_folder)


def test_every_byte_of_the_manifest_counts(bundle_folder: Path) -> None:
    path = bundle_folder / "manifest.json"
    good = path.read_bytes()
    unseen = 0
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        try:
            Bundle.open(bundle_folder, verify=False)
        except BundleError:
            continue
        unseen += 1
        assert good[position : position + 1].isspace()  # indentation is no content
    assert unseen == 0


def test_sizes_are_checked_before_anything_is_read(bundle_folder: Path) -> None:
    path = bundle_folder / "unet/model.onnx_data"
    path.write_bytes(path.read_bytes() + b"\0")
    for verify in (True, False):
        with pytest.raises(BundleTamperedError, match=r"size of unet/model\.onnx_data") as caught:
            Bundle.open(bundle_folder, verify=verify)
        assert (caught.value.got, caught.value.expected) == (17, 16)


def test_without_verify_the_content_is_trusted_but_not_the_layout(bundle_folder: Path) -> None:
    (bundle_folder / "unet/model.onnx_data").write_bytes(b"0123456789abcdef")
    assert Bundle.open(bundle_folder, verify=False).manifest.name == "tiny"
    (bundle_folder / "stranger").write_bytes(b"")
    with pytest.raises(BundleLayoutError):
        Bundle.open(bundle_folder, verify=False)


def _link_file(folder: Path) -> None:
    target = folder / "unet/model.onnx_data"
    target.rename(folder.parent / "outside")
    target.symlink_to(folder.parent / "outside")


def _link_folder(folder: Path) -> None:
    (folder / "unet").rename(folder.parent / "unet")
    (folder / "unet").symlink_to(folder.parent / "unet", target_is_directory=True)


def _link_manifest(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "manifest.json")
    (folder / "manifest.json").symlink_to(folder.parent / "manifest.json")


LAYOUTS: list[tuple[str, Callable[[Path], object]]] = [
    ("unet/model.onnx_data", _link_file),
    ("unet", _link_folder),
    ("manifest.json", _link_manifest),
    ("dangling", lambda folder: (folder / "dangling").symlink_to("nowhere")),
    ("unet/pipe", lambda folder: os.mkfifo(folder / "unet/pipe")),
    ("unet/extra.onnx", lambda folder: (folder / "unet/extra.onnx").write_bytes(b"x")),
    ("selftest.safetensors", lambda folder: (folder / "selftest.safetensors").unlink()),
]


@pytest.mark.parametrize(("path", "change"), LAYOUTS, ids=[item[0] for item in LAYOUTS])
def test_links_strangers_and_gaps_are_refused(bundle_folder: Path, path: str, change: Callable[[Path], object]) -> None:
    change(bundle_folder)
    with pytest.raises(BundleLayoutError) as caught:
        Bundle.open(bundle_folder)
    assert caught.value.path == path


def test_a_bundle_reached_through_a_link_is_fine(bundle_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(bundle_folder, target_is_directory=True)
    assert Bundle.open(tmp_path / "alias").path == bundle_folder.resolve()


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_no_bundle_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ManifestError, match="no bundle at"):
        Bundle.open(tmp_path / name)


@pytest.mark.parametrize("location", ["../outside", "/etc/hostname", "sub/data", "missing", "..", ""])
def test_external_data_stays_beside_its_graph(bundle_folder: Path, kit: SimpleNamespace, location: str) -> None:
    graph = bundle_folder / "unet/step_full.onnx"
    model = onnx.load(graph, load_external_data=False)
    tensor = next(item for item in model.graph.initializer if item.name == "kernel")
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    graph.write_bytes(model.SerializeToString())
    (bundle_folder / "unet/sub").mkdir()
    (bundle_folder / "unet/sub/data").write_bytes(b"0" * 16)
    kit.reseal(bundle_folder)
    with pytest.raises(BundleLayoutError):
        Bundle.open(bundle_folder)


def test_external_data_is_found_wherever_a_tensor_can_hide(tmp_path: Path) -> None:
    def tensor(location: str) -> onnx.TensorProto:
        made = onnx.numpy_helper.from_array(np.zeros(4, np.float32), location)
        onnx.external_data_helper.set_external_data(made, location)
        made.ClearField("raw_data")
        return made

    helper = onnx.helper
    inner = helper.make_graph([helper.make_node("Constant", [], ["x"], value=tensor("sub"))], "inner", [], [])
    branch = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    several = helper.make_node("Odd", [], ["z"], tensors=[tensor("list")])
    function = helper.make_function(
        "d", "f", [], ["x"], [helper.make_node("Constant", [], ["x"], value=tensor("fn"))], []
    )
    graph = helper.make_graph([branch, several], "g", [], [], [tensor("main")])
    graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor("sparse"), dims=[4]))
    model = helper.make_model(graph, functions=[function])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert external_locations(tmp_path / "m.onnx") == {"sub", "list", "fn", "main", "sparse"}


def test_the_scan_of_damaged_graphs_ends_in_a_value_error(bundle_folder: Path) -> None:
    graph = bundle_folder / "unet/step_full.onnx"
    good = graph.read_bytes()
    refused = 0
    for size in range(0, len(good), 3):
        graph.write_bytes(good[:size])
        try:
            assert external_locations(graph) <= {"model.onnx_data"}
        except ValueError:
            refused += 1
    assert refused > len(good) // 3 - 20


def test_a_component_that_is_no_graph_is_refused(bundle_folder: Path, kit: SimpleNamespace) -> None:
    (bundle_folder / "vae_decoder/model.onnx").write_bytes(b"\xff\xff")
    kit.reseal(bundle_folder)
    with pytest.raises(BundleTamperedError, match="not an ONNX graph"):
        Bundle.open(bundle_folder)


def test_replace_files_seals_anew(bundle_folder: Path, kit: SimpleNamespace) -> None:
    manifest = Bundle.open(bundle_folder).manifest
    (bundle_folder / "extra").write_bytes(b"1")
    wider = replace_files(manifest, kit.list_files(bundle_folder))
    (bundle_folder / "manifest.json").write_bytes(wider.to_json_bytes())
    assert Bundle.open(bundle_folder).digest != manifest.digest
    shutil.rmtree(bundle_folder)
