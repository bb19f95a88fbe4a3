"""`latentrelay devices check`: what fits and what does not, by the exit status and one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import latentrelay.device_profiles
import pytest
import torch
from latentrelay.device_profiles import load_profile
from latentrelay.reference.pipeline import reference_path
from latentrelay.runtime.errors import RequestError
from latentrelay.tools.devices_check import _operators, ladder_shapes, run

SHIPPED = Path(latentrelay.device_profiles.__file__).parent


def check(capsys: pytest.CaptureFixture[str], name: str, **more: Any) -> tuple[int, dict[str, Any]]:
    arguments: dict[str, Any] = {"geometry": None, "model": None, "as_json": True, **more}
    status = run(name, **arguments)
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, document


def test_the_reference_fits_a_phone_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    status, document = check(capsys, "galaxy-s24", model="reference", student="none")
    assert (status, document["fits"]) == (0, True)
    predicted = document["predicted"]
    assert predicted["parameters"] == 8_765_028
    assert predicted["bytes"] > 4 * predicted["all_parameters"]
    assert 90 < predicted["peak_memory_mib"] < 200  # 130 to 132 were measured
    assert predicted["step_ms"] > 0
    assert "estimate" in predicted["step_ms_source"]


def test_the_reference_is_checked_as_build_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    """With the student released for the profile's class and the light decoder."""
    _, document = check(capsys, "raspberry-pi-5", model="reference")
    assert document["predicted"]["parameters"] == 999_924
    assert document["predicted"]["peak_memory_mib"] < 110


def test_sd14_unpruned_is_refused_with_the_part_that_limits(capsys: pytest.CaptureFixture[str]) -> None:
    status, document = check(capsys, "generic-android", geometry="sd14", student="none")
    assert (status, document["fits"]) == (3, False)
    assert (document["limiting"], document["limiting_part"]) == ("parameters", "unet")
    assert "330,000,000" in document["reason"]
    assert "attention scores 2 x 8 x 4096 x 4096" in document["predicted"]["largest_activation"]["steps"]
    assert document["predicted"]["parameters"] == 859_520_964
    assert document["predicted"]["peak_memory_mib"] > document["allowed"]["peak_memory_mib"]


def test_a_device_too_small_for_anything_says_what_the_closest_would_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (SHIPPED / "pixel-8.toml").read_text()
    lines = [
        "aliases = []" if line.startswith("aliases = ")
        else "application_ceiling_mib = 64" if line.startswith("application_ceiling_mib")
        else line.replace('"pixel-8"', '"small-phone"') if line.startswith("name = ") else line
        for line in text.splitlines()
    ]  # fmt: skip
    (tmp_path / "small-phone.toml").write_text("\n".join(lines) + "\n")
    status, document = check(capsys, "small-phone", model=str(reference_path()), profiles=tmp_path)
    assert (status, document["limiting"]) == (3, "peak_memory")
    assert "the closest that can be built has" in document["reason"]


def test_a_model_or_a_geometry_not_both_and_not_none() -> None:
    for given in ({"geometry": None, "model": None}, {"geometry": "sd14", "model": "reference"}):
        with pytest.raises(RequestError, match="exactly one"):
            run("galaxy-s24", **given)  # type: ignore[arg-type]


def test_a_single_file_is_sent_to_the_geometry(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--geometry sd14"):
        run("galaxy-s24", geometry=None, model=str(tmp_path / "model.safetensors"))


def test_operators_are_those_of_a_bundle(tiny_bundle: Path) -> None:
    onnx = pytest.importorskip("onnx")
    found = _operators(load_profile("pixel-8"))
    files = {"text_encoder": "text_encoder/model", "unet": "unet/step_full", "vae_decoder": "vae_decoder/model"}
    for part, path in files.items():
        graph = onnx.load(str(tiny_bundle / f"{path}.onnx"), load_external_data=False).graph
        assert {node.op_type for node in graph.node} <= found[part], part


def test_ladders_of_predicted_steps_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    _, plain = check(capsys, "galaxy-s24", geometry="sd14", student="none")
    _, deep = check(capsys, "galaxy-s24", geometry="sd14", student="none", predict="auto")
    _, whole = check(capsys, "galaxy-s24", geometry="sd14", student="none", predict="whole_output")
    assert "ladder_mib" not in plain["predicted"]
    # two arrays of three rungs and the step's own value, of two branches of 320 channels, for feature and probe
    assert deep["predicted"]["ladder_dtype"] == "float16"  # SD 1.4 as it is passes the memory anyway
    assert deep["predicted"]["ladder_mib"] == 2 * (2 * 3 * 2 + 4) * 2 * 320 * 64 * 64 / 2**20
    steps = [each["predicted"]["memory_mib_by_stage"]["steps"] for each in (plain, deep)]
    assert steps[1] - steps[0] == pytest.approx(deep["predicted"]["ladder_mib"])
    assert whole["predicted"]["ladder_mib"] < deep["predicted"]["ladder_mib"]
    with pytest.raises(RequestError, match="target"):
        check(capsys, "galaxy-s24", geometry="sd14", student="none", predict="all")


def test_ladders_that_fit_are_float32_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    _, document = check(capsys, "galaxy-s24", model="reference", student="none", predict="deep_feature")
    assert document["predicted"]["ladder_dtype"] == "float32"
    run("galaxy-s24", geometry=None, model="reference", student="none", predict="deep_feature")
    assert "MiB of ladders in float32" in " ".join(capsys.readouterr().out.split())


def test_ladders_are_those_of_the_exported_graph(tiny: Any, tmp_path: Path) -> None:
    from latentrelay.compress.geometry import from_folder
    from latentrelay.export.ladder_memory import widest_ladders
    from latentrelay.export.onnx_graphs import UNetGraph, export_onnx

    pipeline = tiny.make_pipeline(tmp_path / "parts")
    pipeline.save_pretrained(tmp_path / "source")
    shape = from_folder(tmp_path / "source")
    size = (4, shape.rows, shape.columns)
    states = torch.zeros(2, pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.hidden_size)
    export_onnx(
        UNetGraph(pipeline.unet),
        [torch.zeros(2, *size), torch.tensor(1.0), states],
        tmp_path / "model.onnx",
        inputs=["sample", "timestep", "encoder_hidden_states"],
        outputs=["out_sample"],
        opset=20,
    )
    for target, streams in (("deep_feature", ("deep_feature",)), ("whole_output", ("whole_output",))):
        assert ladder_shapes(shape, target) == widest_ladders(tmp_path / "model.onnx", streams, "P1", size)
