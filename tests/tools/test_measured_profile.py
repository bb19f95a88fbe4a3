"""From times to a profile: the arithmetic by hand, the words that carry it, and what a busy machine changes."""

from __future__ import annotations

from typing import Any

import pytest
from latentrelay.device_profiles import load_profile
from latentrelay.tools.machine import Machine
from latentrelay.tools.measured_profile import Measured, ceiling_mib, profile_of, student_class, target_of
from latentrelay.tools.time_graphs import CPU, PartTimings, Timing
from latentrelay.tools.unet_parts import PARTS

DATE = "2026-11-23"


def machine(**changes: Any) -> Machine:
    facts = {"cpu": "Example", "product": "", "vendor": "unknown", "system": "Debian", "form_factor": "desktop"}
    facts |= {"cores": 4, "cores_reason": "all that there are", "total_mib": 16384, "limit_mib": None}
    facts |= {"limit_reason": None, "int8_flags": ("avx_vnni",), "fp16": False}
    return Machine(**(facts | changes))


def parts(precision: str, whole_ms: float, share: float = 1.0, providers: tuple[str, ...] = (CPU,)) -> PartTimings:
    """Every part as fast as it must be for the whole U-Net to take `whole_ms`."""
    rate = whole_ms / sum(part.macs * part.weight for part in PARTS)
    times = [part.macs * rate for part in PARTS]
    timings = tuple(Timing(part.name, ms, 0.9 * ms, 1.5 * ms, 7, share) for part, ms in zip(PARTS, times, strict=True))
    return PartTimings(precision, PARTS, timings, providers)


def test_the_ceiling_is_three_quarters_of_what_the_process_is_left() -> None:
    ceiling, words = ceiling_mib(machine())
    assert ceiling == 12288
    assert "0.75 x 16384 = 12288 MiB" in words
    ceiling, words = ceiling_mib(machine(limit_mib=4096, limit_reason="the control group"))
    assert ceiling == 3072
    assert "the control group leaves this process 4096 of 16384 MiB" in words
    assert ceiling_mib(machine(limit_mib=99999, limit_reason="RLIMIT_AS"))[0] == 12288


def test_the_target_of_a_laptop_is_limited_by_latency() -> None:
    target = target_of(870.0, "w8a8", 12288, 2047)
    assert (target["parameters"], target["limited_by"], target["split"]) == (493_900_000, "latency", 10)
    assert "15 s for 15 device steps of 2 branches = 30 calls, 500 ms each" in target["derivation"]
    assert "859.5M x 500 / 870 = 493.9M." in target["derivation"]


def test_a_slow_machine_takes_fewer_steps() -> None:
    """Above 859.5 x 500 / 165 = 2605 ms, 10 calls of a second instead of 30 of half a second."""
    assert target_of(2600.0, "fp32", 12288, 2047)["split"] == 10
    target = target_of(5200.0, "fp32", 12288, 2047)
    assert (target["parameters"], target["split"]) == (165_200_000, 20)
    assert "10 s for 5 device steps of 2 branches = 10 calls, 1000 ms each" in target["derivation"]


def test_a_fast_machine_gets_the_full_network_and_no_more() -> None:
    target = target_of(100.0, "w8a8", 12288, 2047)
    assert (target["parameters"], target["limited_by"]) == (859_500_000, "latency")
    assert "more than it has, so 859.5M" in target["derivation"]


def test_memory_and_files_limit_too() -> None:
    target = target_of(400.0, "fp32", 3072, 2047)  # 1536 MiB / 4 bytes = 402.6M; a file holds 536.6M
    assert (target["parameters"], target["limited_by"]) == (402_600_000, "memory")
    assert "3072 MiB at 4 bytes a weight holds 402.6M only" in target["derivation"]
    target = target_of(400.0, "fp32", 12288, 2047)
    assert (target["parameters"], target["limited_by"]) == (536_600_000, "storage")


@pytest.mark.parametrize(
    ("millions", "name"),
    [(859, "phone-high"), (580, "phone-high"), (570, "phone-high"), (490, "phone-mid"), (40, "pi")],
)
def test_the_class_is_the_largest_student_that_fits(millions: int, name: str) -> None:
    assert student_class(millions * 1_000_000) == name


def test_a_profile_of_two_precisions() -> None:
    measured = Measured(machine(), (parts("w8a8", 870), parts("fp32", 1300)), (2047, "One file."))
    profile = profile_of("my-box", measured, DATE)
    assert (profile.target_precision, profile.student_class, profile.defaults.split) == ("w8a8", "phone-mid", 10)
    assert (profile.memory.total_mib, profile.memory.application_ceiling_mib) == (16384, 12288)
    assert profile.title == "Example, 4 cores, measured 2026-11-23"
    assert profile.latency_ms("unet") == 870.0
    shown = [(each.model[:12], each.precision, each.label) for each in profile.latency]
    assert shown == [
        ("SD 1.5", "w8a8", "estimate"),
        ("SD 1.5", "fp32", "estimate"),
        ("SD 1.5, one ", "w8a8", "measured"),
        ("SD 1.5, one ", "fp32", "measured"),
    ]
    assert profile.latency[2].ms == pytest.approx(870 * sum(p.macs for p in PARTS) / 401.64e9, rel=1e-3)
    words = profile.latency[0].conditions
    assert words is not None
    assert "fastest runs 783, slowest 1305 ms" in words
    assert "processor time 1.00 of wall time x 4 threads" in words
    assert "other work" not in words


def test_without_8_bit_products_float32_is_planned_with() -> None:
    measured = Measured(machine(int8_flags=()), (parts("fp32", 1300),), (2047, "One file."))
    profile = profile_of("my-box", measured, DATE)
    assert (profile.target_precision, profile.support.int8) == ("fp32", False)


def test_a_busy_machine_is_planned_by_processor_time() -> None:
    busy = parts("fp32", 4000, share=0.25)
    assert (busy.busy, busy.planned_ms(), busy.whole_ms()) == (True, pytest.approx(1000), pytest.approx(4000))
    profile = profile_of("my-box", Measured(machine(), (busy,), (2047, "One file.")), DATE)
    assert profile.latency[0].ms == pytest.approx(1000, abs=0.1)
    assert "by wall time 4000 ms" in str(profile.latency[0].conditions)
    assert "859.5M x 500 / 1000" in profile.target_unet_parameters.derivation
    assert profile.latency[1].label == "measured"
    assert profile.latency[1].ms == pytest.approx(busy.parts_ms(), abs=0.1)


def test_a_processor_that_waits_for_an_accelerator_is_not_busy() -> None:
    waiting = parts("fp32", 200, share=0.1, providers=("CoreMLExecutionProvider", CPU))
    assert not waiting.busy
    profile = profile_of("my-mac", Measured(machine(), (waiting,), (2047, "One file.")), DATE)
    assert profile.npu.name == "Neural Engine"
    assert profile.support.static_shapes_only
    assert [each.name for each in profile.backend.execution_providers] == ["CoreMLExecutionProvider", CPU]


def test_the_shipped_laptop_follows_from_its_own_figure() -> None:
    """The same rule on the same 870 ms gives the shipped profile's size to 1 %."""
    shipped = load_profile("x86-laptop-vnni").target_unet_parameters.parameters
    assert target_of(870.0, "w8a8", 8192, 2047)["parameters"] == pytest.approx(shipped, rel=0.01)
