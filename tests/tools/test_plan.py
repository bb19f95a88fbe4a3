"""A plan from end to end: rows by hand, bundles, a cloud that is asked; what is printed, written and refused."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrelay.device_profiles import load_profile
from latentrelay.runtime.bundle import Bundle
from latentrelay.runtime.errors import CloudUnavailableError, RequestError
from latentrelay.runtime.manifest import Manifest
from latentrelay.tools import plan
from latentrelay.tools.networks import NETWORKS, Network
from latentrelay.tools.plan_cloud import CloudSpeed, OtherModelError, Price, parse_price
from latentrelay.tools.plan_evidence import Evidence
from latentrelay.tools.plan_options import of_bundles, of_released
from latentrelay.tools.plan_rows import Row, rows
from latentrelay.tools.plan_times import EPYC_CALL_MS, NoFigureError, is_this_machine
from latentrelay.tools.plan_wire import ANSWER_HEADERS, handoff_bytes, usual_timesteps
from PIL import Image

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "bundle-1.3"
CLOUD = CloudSpeed(20.0, "given", "a test")
Planned = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return Evidence.load()


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Planned:
    """`planned("raspberry-pi-5", ["4g"], ...)`: the exit status and the JSON object."""

    def run(device: str, networks: list[str], **options: Any) -> tuple[int, dict[str, Any]]:
        status = plan.run(device, networks, as_json=True, **options)
        return status, json.loads(capsys.readouterr().out)

    return run


def released(evidence: Evidence, link: Network = NETWORKS["4g"], **options: Any) -> list[Row]:
    """The reference's rows on a Raspberry Pi 5."""
    found = of_released(load_profile("raspberry-pi-5"), evidence, "reference")
    return rows(found, [link], CLOUD, evidence, options.pop("price", None), **options)


def one(found: list[Row], split: int, *, precision: str = "fp32", predicted: bool = False) -> Row:
    """The phone-mid row of a split."""
    mine = [row for row in found if (row.option.student, row.split) == ("phone-mid", split)]
    return next(row for row in mine if row.option.precision == precision and bool(row.mask.predicted) == predicted)


def test_a_rows_latency_is_the_sum_of_its_parts_and_what_could_overlap_is_told(evidence: Evidence) -> None:
    row = one(released(evidence), 8)
    parts, times = row.parts, row.option.times
    assert parts["cloud_steps"] == 160.0
    assert parts["cloud_queue"] == 0.0
    assert parts["transfer"] == pytest.approx(NETWORKS["4g"].transfer_ms(row.up_bytes, row.down_bytes))
    assert parts["device_steps"] == pytest.approx(17 * times.step_ms)
    away = parts["cloud_steps"] + parts["transfer"]
    assert away > parts["text_encoder"] > 0
    assert row.total_ms == pytest.approx(sum(parts.values()))
    assert row.overlapped_ms == pytest.approx(away + parts["device_steps"] + parts["decode"])
    assert row.to_dict()["can_overlap"] == ["text_encoder"]
    slow = dataclasses.replace(row.option, times=dataclasses.replace(times, text_ms=1e6))
    waiting = one(rows([slow], [NETWORKS["4g"]], CLOUD, evidence, None), 8)
    assert waiting.overlapped_ms == pytest.approx(1e6 + parts["device_steps"] + parts["decode"])


def test_a_row_without_a_cloud_takes_the_devices_parts_one_after_another(evidence: Evidence) -> None:
    row = one(released(evidence), 0)
    device = row.parts["text_encoder"] + row.parts["device_steps"] + row.parts["decode"]
    assert row.total_ms == row.overlapped_ms == pytest.approx(device)
    assert (row.up_bytes, row.down_bytes, row.parts["transfer"], row.cloud_ms) == (0, 0, 0.0, 0.0)
    assert row.to_dict()["can_overlap"] == []


def test_all_steps_in_the_cloud_are_one_row_that_decodes_only(evidence: Evidence) -> None:
    last = [row for row in released(evidence) if row.split == 25]
    assert len(last) == 1
    assert last[0].parts["device_steps"] == last[0].parts["text_encoder"] == 0.0
    assert last[0].mask.computed == 0


def test_offline_leaves_the_device_alone(evidence: Evidence) -> None:
    assert {row.split for row in released(evidence, NETWORKS["offline"])} == {0}


def test_predicted_steps_take_their_share_of_a_computed_one(evidence: Evidence) -> None:
    found = released(evidence)
    row, times = one(found, 8, predicted=True), one(found, 8, predicted=True).option.times
    assert (row.mask.computed, row.mask.predicted, row.mask.label) == (4, 13, "4 of 17 computed")
    assert times.predicted_ms is not None
    assert times.predicted_ms < 0.05 * times.step_ms
    assert row.parts["device_steps"] == pytest.approx(4 * times.step_ms + 13 * times.predicted_ms)


def test_a_student_timed_on_the_known_machine_is_scaled_by_both_machines_figures(evidence: Evidence) -> None:
    profile = load_profile("x86-laptop-vnni")
    known = [(each.ms, each.precision) for each in profile.latency if each.device.endswith("1 thread")]
    assert known == [(EPYC_CALL_MS, "fp32")]  # the machine of the packaged sweeps
    option = next(each for each in of_released(load_profile("raspberry-pi-5"), evidence, "reference"))
    swept = [
        (row["device_seconds"] - row["device_decode_seconds"]) / sweep["num_steps"]
        for sweep in evidence.sweeps
        for row in sweep["rows"]
        if (row["student"], row["split"]) == (option.student, 0)
    ]
    assert option.times.step_ms == pytest.approx(1e3 * min(swept) * 10_400 / EPYC_CALL_MS)
    assert option.times.label == "estimate"
    assert "10400 ms" in option.times.source


def test_bytes_follow_the_wire_format() -> None:
    steps, shape = usual_timesteps(25), (4, 64, 64)
    assert handoff_bytes(steps, 0, shape) == 0
    latents = 4 * 64 * 64 * 2
    whole, memory = handoff_bytes(steps, 25, shape), handoff_bytes(steps, 8, shape)
    assert 0 < whole - latents - ANSWER_HEADERS < 2048
    assert memory - whole == pytest.approx(latents, abs=128)
    assert handoff_bytes(steps, 8, shape, needs_x0_prev=False) == pytest.approx(whole, abs=8)
    assert handoff_bytes(steps, 25, shape, dtype="float32") - whole == pytest.approx(latents, abs=8)


def test_a_price_is_for_an_hour_or_a_step(evidence: Evidence) -> None:
    assert parse_price("2.5") == parse_price("2.5/hour") == Price(2.5, "hour")
    assert parse_price("0.001/step") == Price(0.001, "step")
    assert parse_price(None) is None
    hourly = one(released(evidence, price=Price(3.6, "hour")), 8)
    assert hourly.cost == pytest.approx(3.6 / 3600 * 0.16)
    assert one(released(evidence, price=Price(0.5, "step")), 8).cost == 4.0
    assert one(released(evidence), 8).cost is None
    for words in ("", "x", "-1", "1/day", "nan", "inf"):
        with pytest.raises(RequestError, match="no such price"):
            parse_price(words)


def test_energy_is_left_out_unless_the_devices_power_is_known(evidence: Evidence) -> None:
    assert "device_energy_j" not in one(released(evidence), 8).to_dict()
    row = one(released(evidence, device_watts=5.0), 8)
    busy_ms = sum(row.parts[name] for name in ("text_encoder", "device_steps", "decode"))
    assert row.device_energy_j == pytest.approx(5e-3 * busy_ms)


def test_json_holds_the_frontier_and_the_choice(planned: Planned) -> None:
    status, document = planned("raspberry-pi-5", ["4g", "wifi"], price="2.5", max_latency_s=2.0, cloud_step_ms=12.0)
    assert status == 0
    assert document["ok"]
    chosen, front = document["chosen"], document["frontier"]
    assert chosen["latency_ms"] <= 2000
    assert chosen["network"] == "4g"
    assert {row["network"] for row in front} == {"4g", "wifi"} == set(document["by_network"])
    met = [row for row in document["rows"] if row["meets_goals"] and row["network"] == "4g"]
    losses = [row["quality"]["loss"] for row in met if row["quality"]["loss"] is not None]
    assert chosen["quality"]["loss"] == min(losses)
    assert all(row["quality"]["accuracy_difference"] is not None for row in front)
    hidden = [row for row in document["rows"] if row["quality"]["accuracy_difference"] is None]
    assert hidden
    assert not any(row["on_frontier"] for row in hidden)
    assert "device_energy_j" not in chosen
    assert chosen["commands"][0].startswith("latentrelay build --device raspberry-pi-5 --student phone-mid")


def test_nothing_meets_the_goals_is_exit_status_3_with_the_nearest_miss(planned: Planned) -> None:
    status, document = planned("raspberry-pi-5", ["3g"], max_latency_s=0.05)
    assert (status, document["ok"], document["chosen"]) == (3, False, None)
    nearest = document["nearest_miss"]
    measured = [row["latency_ms"] for row in document["rows"] if row["quality"]["loss"] is not None]
    assert nearest["latency_ms"] == min(measured)
    assert document["reason"].startswith("no measured row meets a picture in 0.05 s; the nearest takes")


def test_the_plan_is_printed_and_plotted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.png"
    status = plan.run("galaxy-s24", ["4g", "offline"], max_latency_s=1.0, cloud_step_ms=20.0, output=path)
    out = capsys.readouterr().out
    assert status == 0
    assert "Chosen: phone-mid" in out
    assert "galaxy-s24 on offline" in out
    assert "rows have no measured accuracy" in out
    picture = Image.open(io.BytesIO(path.read_bytes()))
    assert picture.format == "PNG"
    assert min(picture.size) > 400
    assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 50  # drawn, not blank


def test_a_bundle_is_timed_here_and_has_no_quality_that_nobody_measured(tiny_bundle: Path, planned: Planned) -> None:
    status, document = planned("pixel-8", ["wifi"], bundles=[tiny_bundle], here=True, cloud_step_ms=1e5)
    assert status == 3
    assert "none was measured" in document["reason"]
    assert {row["device_label"] for row in document["rows"]} == {"measured"}
    assert {row["quality"]["label"] for row in document["rows"]} == {"not measured"}
    assert document["frontier"] == []
    status, document = planned(
        "pixel-8", ["wifi"], bundles=[tiny_bundle], here=True, cloud_step_ms=1e5, unmeasured=True
    )
    assert status == 0
    assert document["chosen"]["quality"]["loss"] is None
    assert document["chosen"]["commands"] == [f"latentrelay generate --bundle {tiny_bundle} --split 0 -p PROMPT"]


def test_masks_are_planned_with_where_their_time_is_known(tmp_path: Path, evidence: Evidence) -> None:
    profile = load_profile("raspberry-pi-5")
    option = of_bundles([GOLDEN], profile, evidence, here=False)[0]
    assert [(mask.split, mask.computed, mask.predicted) for mask in option.masks] == [(0, 2, 2), (1, 2, 1)]
    assert option.times.predicted_ms is None
    assert not any(row.mask.predicted for row in rows([option], [NETWORKS["lan"]], CLOUD, evidence, None))
    report = {"chosen": "a method", "splits": {"1": {"computed_steps": 2, "psnr_db": 31.5}}}
    folder = _with_quality(tmp_path, {"prediction": {**report, "costs_ms": {"full_ms": 10.0, "whole_ms": 1.0}}})
    option = of_bundles([folder], profile, evidence, here=False)[0]
    assert option.times.predicted_ms == pytest.approx(0.1 * option.times.step_ms)
    found = [row for row in rows([option], [NETWORKS["lan"]], CLOUD, evidence, None) if row.mask.predicted]
    assert {(row.split, row.quality.label, row.quality.psnr_db) for row in found} == {
        (0, "not measured", None),
        (1, "measured in dB only", 31.5),
    }
    assert not any(row.quality.known for row in found)


def _with_quality(folder: Path, quality: dict[str, Any]) -> Path:
    """The golden bundle with other figures in its manifest."""
    target = folder / "bundle"
    shutil.copytree(GOLDEN, target)
    manifest = Manifest.from_json_bytes((target / "manifest.json").read_bytes())
    changed = dataclasses.replace(manifest, quality=quality, digest="").sealed()
    (target / "manifest.json").write_bytes(changed.to_json_bytes())
    Bundle.open(target)
    return target


def test_a_cloud_is_asked_and_another_model_refused(
    tiny_bundle: Path, tiny_cloud: str, dead_url: str, planned: Planned
) -> None:
    status, document = planned(
        "pixel-8", ["lan"], bundles=[tiny_bundle], cloud=tiny_cloud, unmeasured=True, price="0.1/step"
    )
    assert status == 0
    assert document["cloud"]["url"] == tiny_cloud
    assert tiny_cloud in document["cloud"]["source"]
    with pytest.raises(OtherModelError, match="another model"):
        plan.run("pixel-8", ["lan"], cloud=tiny_cloud)
    with pytest.raises(CloudUnavailableError):
        plan.run("pixel-8", ["lan"], cloud=dead_url)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_cost": 1.0}, "--max-cost needs a price"),
        ({"max_latency_s": -1.0}, "--max-latency"),
        ({"max_latency_s": float("nan")}, "--max-latency"),
        ({"cloud_step_ms": 0.0}, "--cloud-step-ms"),
        ({"cloud": "http://x", "cloud_step_ms": 1.0}, "Give one of them"),
        ({"here": True}, "--here"),
        ({"model": "mine"}, "--bundle"),
        ({"networks": []}, "--network"),
    ],
)
def test_what_makes_no_sense_is_said(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        plan.run("pixel-8", options.pop("networks", ["4g"]), **options)


def test_a_device_without_a_figure_is_not_guessed(evidence: Evidence) -> None:
    profile = load_profile("pixel-8").model_copy(update={"latency": ()})
    with pytest.raises(NoFigureError, match="devices measure"):
        of_released(profile, evidence, "reference")
    assert not is_this_machine(profile)


def test_the_command_plans_and_says_what_it_was_asked_for_wrongly(command: Callable[..., Any]) -> None:
    found = command("plan", "--device", "raspberry-pi-5", "--network", "70:12", "--cloud-step-ms", 12, "--json")
    assert (found.status, found.json["networks"][0]["name"]) == (0, "70:12")
    missed = command("plan", "--device", "raspberry-pi-5", "--network", "4g", "--max-latency", 0.01, "--json")
    assert (missed.status, missed.json["chosen"]) == (3, None)
    assert missed.json["nearest_miss"]["student"] == "pi"
    wrong = command("plan", "--device", "raspberry-pi-5", "--network", "nowhere", "--json")
    assert wrong.status == 2
    assert "RTT_MS:MBIT" in wrong.json["reason"]
    assert command("plan", "--device", "no-such-device", "--network", "4g").status == 2
