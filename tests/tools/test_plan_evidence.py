"""Quality in a plan: what was measured, what adds up, and what nobody measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from latentrelay.runtime.errors import RequestError
from latentrelay.tools.plan_evidence import PACKAGED, Evidence, Setting

ROOT = Path(__file__).resolve().parents[2]
PLAIN = Setting(None, "phone-mid", "fp32", 8, 25, "dpmsolver++", 4.0, light_decoder=True)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return Evidence.load()


def _same(packaged: Any, measured: Any) -> None:
    """Every packaged figure stands in the measured document."""
    for key, value in packaged.items():
        assert measured[key] == value, key


def test_the_packaged_figures_are_those_under_docs_measured() -> None:
    document = json.loads(PACKAGED.read_text())
    for sweep in document["sweeps"]:
        measured = json.loads((ROOT / sweep["file"]).read_text())
        for row, full in zip(sweep["rows"], measured["rows"], strict=True):
            _same(row, full)
        _same(sweep["cloud_latents_decoded_on_device"], measured["cloud_latents_decoded_on_device"])
        for name in ("captions", "seed", "model_digest", "num_steps", "sampler", "guidance", "machine", "threads"):
            assert sweep[name] == measured[name]
        for name, student in sweep["students"].items():
            _same(student, measured["students"][name])
    for part in document["precisions"]:
        measured = json.loads((ROOT / part["file"]).read_text())
        rows = {row["precision"]: row for row in measured["rows"]}
        for row in part["rows"]:
            _same(row, rows[row["precision"]])
    for part in document["accelerated"]:
        measured = json.loads((ROOT / part["file"]).read_text())
        assert (part["split"], part["captions"]) == (measured["split"], measured["captions"])
        for row, chosen in zip(part["rows"], measured["chosen"], strict=True):
            own = {key: value for key, value in row.items() if key not in ("speedup", "predicted_over_full")}
            _same(own, chosen)


def test_the_sweep_with_most_captions_speaks(evidence: Evidence) -> None:
    found = evidence.quality(PLAIN)
    assert (found.label, found.captions) == ("measured", 512)
    assert found.source == "docs/measured/sweep.json"
    assert found.difference == pytest.approx(6e-05, abs=1e-5)
    assert found.loss == pytest.approx(0.0045111955915178555)
    other = evidence.quality(replace(PLAIN, split=5))
    assert (other.label, other.captions) == ("measured", 128)


def test_parts_add_up_where_each_was_measured_on_the_same_captions(evidence: Evidence) -> None:
    whole, sweep, precision = (
        evidence.quality(replace(PLAIN, precision="w8a8")),
        next(row for row in evidence.sweeps[1]["rows"] if (row["student"], row["split"]) == ("phone-mid", 8)),
        next(row for row in evidence.precisions[0]["rows"] if row["precision"] == "w8a8"),
    )
    assert (whole.label, whole.captions) == ("measured in parts", 128)
    assert whole.difference == pytest.approx(
        sweep["attribute_accuracy_difference"] + precision["attribute_accuracy_difference"]
    )
    assert whole.interval == pytest.approx(
        [
            a + b
            for a, b in zip(
                sweep["attribute_accuracy_difference_95"], precision["attribute_accuracy_difference_95"], strict=True
            )
        ]
    )
    assert whole.psnr_db == precision["psnr_db"]


def test_predicted_steps_are_known_by_their_method_and_number(evidence: Evidence) -> None:
    run = evidence.accelerated[1]["rows"][2]
    wanted = replace(PLAIN, precision="w8a8", settings=run["settings"], computed=int(run["computed_steps"]))
    assert evidence.quality(wanted).label == "measured in parts"
    assert evidence.quality(replace(wanted, computed=5)).interval is None
    assert evidence.quality(replace(wanted, settings="another")).interval is None


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "w8a8", "split": 5},
        {"precision": "w8a8", "student": "pi"},
        {"precision": "w6a16"},
        {"student": "own:sha256:00"},
        {"split": 3},
        {"num_steps": 50},
        {"sampler": "ddim"},
        {"guidance": 7.5},
        {"light_decoder": False},
        {"model_digest": "sha256:00"},
    ],
)
def test_what_nobody_measured_has_no_quality(evidence: Evidence, change: dict[str, Any]) -> None:
    found = evidence.quality(replace(PLAIN, **change))
    assert (found.label, found.difference, found.interval, found.loss) == ("not measured", None, None, None)
    assert found.source


def test_all_steps_in_the_cloud_ask_the_decoder_alone(evidence: Evidence) -> None:
    whole = evidence.quality(replace(PLAIN, split=25))
    assert whole == evidence.quality(replace(PLAIN, split=25, precision="w4a8", student="pi"))
    assert whole.difference == pytest.approx(0.00015, abs=1e-5)


def test_other_kernels_are_named(evidence: Evidence) -> None:
    found = evidence.quality(replace(PLAIN, precision="w8a8", kernels="onnxruntime-arm"))
    assert "onnxruntime-x64" in found.source
    assert "onnxruntime-arm" in found.source
    assert "kernels" not in evidence.quality(replace(PLAIN, precision="w8a8", kernels="onnxruntime-x64")).source


def test_a_sweep_of_ones_own_stands_in_for_the_packaged_ones(tmp_path: Path) -> None:
    document = json.loads((ROOT / "docs/measured/sweep_splits.json").read_text())
    document["rows"] = [row for row in document["rows"] if row["student"] == "pi"]
    own = tmp_path / "sweep.json"
    own.write_text(json.dumps(document))
    evidence = Evidence.load(own)
    assert evidence.quality(replace(PLAIN, student="pi")).source == str(own)
    assert evidence.quality(PLAIN).interval is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [1]}', '{"rows": [{}]}'])
def test_what_is_no_sweep_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(text)
    with pytest.raises(RequestError, match="sweep"):
        Evidence.load(path)
    with pytest.raises(RequestError, match="sweep"):
        Evidence.load(tmp_path / "none.json")
