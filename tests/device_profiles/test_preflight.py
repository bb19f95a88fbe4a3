"""Preflight: each limit by itself refuses and is named; what is exceeded most, or is nearest, limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from latentrelay.device_profiles import load_profile
from latentrelay.device_profiles.preflight import Predicted, ladder_dtype, ladder_mib, preflight, with_ladders

PHONE = load_profile("galaxy-s24")  # 3072 MiB, files of 2047 MiB, 580M parameters, fp16 and int8, some operators denied
FITS = Predicted("fp32", 290_000_000, 2_000_000_000, "unet/model.onnx_data", 1106.3, 3000.0, "steps", step_ms=150.0)


def test_what_fits_names_the_nearest_limit() -> None:
    verdict = preflight(PHONE, FITS)
    assert verdict.fits
    assert (verdict.limiting.name, verdict.limiting.part) == ("peak_memory", "steps")
    assert verdict.limiting.load == pytest.approx(3000 / 3072)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"peak_memory_mib": 3072.1}, "peak_memory"),
        ({"largest_file_mib": 2047.5}, "largest_file"),
        ({"parameters": 580_000_001}, "parameters"),
        ({"operators": {"unet": frozenset({"Add", "Loop"})}}, "operators"),
    ],
)
def test_each_limit_refuses_alone(change: dict[str, object], name: str) -> None:
    verdict = preflight(PHONE, replace(FITS, **change))  # type: ignore[arg-type]
    assert not verdict.fits
    assert verdict.limiting.name == name
    assert [check.name for check in verdict.checks if not check.fits] == [name]


def test_exactly_at_the_limit_fits() -> None:
    at = replace(FITS, peak_memory_mib=3072.0, largest_file_mib=2047.0, parameters=580_000_000)
    assert preflight(PHONE, at).fits


def test_the_limit_exceeded_most_is_named_and_denied_operators_with_their_component() -> None:
    over = replace(FITS, peak_memory_mib=6000.0, parameters=600_000_000)
    assert preflight(PHONE, over).limiting.name == "peak_memory"
    denied = preflight(PHONE, replace(FITS, operators={"text_encoder": frozenset({"Unique", "Scan", "Add"})}))
    assert denied.limiting.words == "text_encoder: Scan, Unique"


def test_a_precision_that_the_device_lacks_and_a_step_that_is_too_slow_refuse() -> None:
    generic = load_profile("generic-android")  # no int4
    assert preflight(generic, replace(FITS, precision="w4a16", peak_memory_mib=100.0)).limiting.name == "precision"
    assert preflight(PHONE, FITS, max_step_ms=149.0).limiting.name == "step_latency"
    assert preflight(PHONE, FITS, max_step_ms=150.0).fits


# 10 MiB a rung in float32: two arrays of two rungs and the step's own value, 50 MiB a stream
DEEP = [(2, 2, 320, 64, 64), (2, 2, 320, 64, 64)]


def test_ladders_by_hand() -> None:
    assert ladder_mib(DEEP, "float32") == 100.0
    assert ladder_mib(DEEP[:1], "float16") == 30.0
    assert ladder_mib([(1, 2, 4, 32, 32)], "float32") == pytest.approx(3 * 4 * 8192 / 2**20)
    assert ladder_mib([], "float32") == 0.0


def test_ladders_are_added_to_the_steps_and_refuse_with_figures() -> None:
    staged = replace(FITS, memory_by_stage={"text_encoder": 900.0, "steps": 3000.0, "vae_decoder": 2500.0})
    within = with_ladders(staged, DEEP[:1], "float32", graph_mib=10.0)
    assert (within.peak_memory_mib, within.ladder_mib, within.memory_by_stage["steps"]) == (3060.0, 50.0, 3060.0)
    assert preflight(PHONE, within).fits
    over = preflight(PHONE, with_ladders(staged, DEEP, "float32"))
    assert (over.fits, over.limiting.name, over.limiting.predicted) == (False, "peak_memory", 3100.0)
    assert "100.0 of them ladders" in over.limiting.words
    assert "ladders" not in preflight(PHONE, staged).limiting.words
    assert with_ladders(FITS, DEEP, "float32").peak_memory_mib == 3100.0  # no stages told


def test_ladders_may_hide_below_another_stage() -> None:
    staged = replace(FITS, memory_by_stage={"steps": 1000.0, "vae_decoder": 3000.0}, limiting_stage="vae_decoder")
    raised = with_ladders(staged, DEEP, "float32")
    assert (raised.peak_memory_mib, raised.limiting_stage) == (3000.0, "vae_decoder")


def test_half_precision_where_memory_asks_for_it() -> None:
    staged = replace(FITS, memory_by_stage={"steps": 3000.0})
    assert ladder_dtype(PHONE, staged, DEEP[:1]) == "float32"
    assert ladder_dtype(PHONE, staged, DEEP) == "float16"
    assert ladder_dtype(PHONE, staged, DEEP[:1], graph_mib=30.0) == "float16"
    assert preflight(PHONE, with_ladders(staged, DEEP, "float16")).fits
