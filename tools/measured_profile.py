"""From what was measured on a machine to its device profile: the ceiling, the student's size, the anchors, in words.

In: `Measured` (machine.py's facts, time_graphs.py's times). Out: a validated `DeviceProfile`. Every figure says whether
it was measured or is an estimate scaled from what was, and every derivation carries its arithmetic. It runs nothing.
"""

from __future__ import annotations

import json
import math
import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from latentrelay.device_profiles import SCHEMA_VERSION, DeviceProfile, list_profiles
from latentrelay.runtime.manifest import Manifest
from latentrelay.tools.machine import Machine
from latentrelay.tools.time_graphs import CPU, WARM_UPS, PartTimings, Timing, available_providers
from latentrelay.tools.unet_parts import WHOLE_MACS

FULL_UNET_M = 859.5
_BYTES = {"fp32": 4, "w8a8": 1}
_CEILING_SHARE = 0.75
_SOURCE = "measured-here"
# Students that the reference ships, largest first; the profile names the largest that is not above its target.
_RELEASED = ("phone-high", "phone-mid", "pi")
_NPU = {"QNNExecutionProvider": "Hexagon", "CoreMLExecutionProvider": "Neural Engine"}


@dataclass(frozen=True)
class Measured:
    """What was found out: the machine, its parts' times (planned with first), the file limit, a bundle's anchors."""

    machine: Machine
    parts: tuple[PartTimings, ...]
    largest_file: tuple[int, str]
    bundle_anchors: tuple[dict[str, Any], ...] = ()


def ceiling_mib(machine: Machine) -> tuple[int, str]:
    """What one application may hold, in MiB, and the derivation in words."""
    total, limit = machine.total_mib, machine.limit_mib
    within = min(total, limit) if limit is not None else total
    ceiling = int(within * _CEILING_SHARE)
    rest = f"A quarter is left to the rest of the system and to the page cache: 0.75 x {within} = {ceiling} MiB."
    if limit is not None and limit < total:
        return ceiling, f"{machine.limit_reason} leaves this process {limit} of {total} MiB (read here). {rest}"
    return ceiling, f"The system has {total} MiB (read here) and limits no process further. {rest}"


def target_of(full_ms: float, precision: str, ceiling: int, largest: int) -> dict[str, Any]:
    """The U-Net's size in parameters, what limits it, the derivation, and the split that it assumes.

    full_ms: the full U-Net, one call for one branch. Latency: 30 calls in 15 s with 10 of 25 steps in the cloud; where
    that leaves less than the smallest released student, 10 calls in 10 s with 20 of 25.
    """
    smallest = _released_sizes()[_RELEASED[-1]]
    split, call_ms = 10, 500
    if FULL_UNET_M * call_ms / full_ms * 1e6 < smallest:
        split, call_ms = 20, 1000
    calls = 2 * (25 - split)
    fast = _tenths(FULL_UNET_M * call_ms / full_ms)
    words = (
        f"{calls * call_ms // 1000} s for {25 - split} device steps of 2 branches = {calls} calls, {call_ms} ms each. "
        f"The full U-Net ({FULL_UNET_M}M) is estimated at {full_ms:.0f} ms a call in {precision} (below): "
        f"{FULL_UNET_M}M x {call_ms} / {full_ms:.0f} = {fast}M"
    )
    width = _BYTES[precision]
    limits = {
        "latency": min(fast, FULL_UNET_M),
        "memory": _tenths(ceiling * 0.5 * 2**20 / width / 1e6),
        "storage": _tenths(largest * 2**20 / width / 1e6),
    }
    limited_by = min(limits, key=lambda key: limits[key])
    words += f", more than it has, so {FULL_UNET_M}M." if fast > FULL_UNET_M else "."
    if limited_by == "memory":
        words += f" Half of the ceiling of {ceiling} MiB at {width} bytes a weight holds {limits['memory']}M only."
    if limited_by == "storage":
        words += f" A file of {largest} MiB at {width} bytes a weight holds {limits['storage']}M only."
    parameters = max(100_000, round(limits[limited_by] * 1e6))
    return {"parameters": parameters, "limited_by": limited_by, "derivation": words, "split": split}


def profile_of(name: str, measured: Measured, date: str) -> DeviceProfile:
    """The profile that follows from what was measured; `date` as 2026-11-23."""
    machine, plan = measured.machine, measured.parts[0]
    ceiling, ceiling_words = ceiling_mib(machine)
    largest, largest_words = measured.largest_file
    target = target_of(plan.planned_ms(), plan.precision, ceiling, largest)
    split = target.pop("split")
    npu = next((_NPU[each] for each in plan.providers if each in _NPU), None)
    document = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "title": f"{machine.product or machine.cpu}, {_counted(machine.cores, 'core')}, measured {date}",
        "vendor": machine.vendor,
        "chipset": machine.cpu,
        "os": machine.system,
        "form_factor": machine.form_factor,
        "student_class": student_class(target["parameters"]),
        "target_precision": plan.precision,
        "npu": {"count": 1, "name": npu} if npu else {"count": 0},
        "memory": {
            "total_mib": machine.total_mib,
            "application_ceiling_mib": ceiling,
            "ceiling_label": "estimate",
            "ceiling_derivation": ceiling_words,
            "ceiling_source": _SOURCE,
            "largest_file_mib": largest,
            "largest_file_reason": largest_words,
        },
        "support": {
            "fp16": machine.fp16,
            "int8": bool(machine.int8_flags),
            "int4": False,
            "static_shapes_only": npu is not None,
            "onnx_opset": 20,
        },
        "backend": {
            "name": "onnxruntime",
            "threads": min(machine.cores, 256),
            "instruction_set": "x64" if platform.machine() in ("x86_64", "AMD64") else "arm64",
            "execution_providers": [{"name": each} for each in _cpu_last(plan.providers)],
        },
        "target_unet_parameters": target,
        "defaults": {"height": 512, "width": 512, "num_steps": 25, "split": split},
        "latency": [*_anchors(measured), *measured.bundle_anchors],
        "sources": [{"id": _SOURCE, "title": _source_title(machine, date)}],
    }
    return DeviceProfile.model_validate_json(json.dumps(document), strict=True)


def _tenths(millions: float) -> float:
    return math.floor(millions * 10) / 10


def student_class(parameters: int) -> str:
    """The largest released class whose student is not above `parameters` (3 % are let pass), or the smallest."""
    sizes = _released_sizes()
    return next((name for name in _RELEASED if sizes[name] <= parameters * 1.03), _RELEASED[-1])


def _released_sizes() -> dict[str, int]:
    return {each.student_class: each.target_unet_parameters.parameters for each in list_profiles()}


def _anchors(measured: Measured) -> list[dict[str, Any]]:
    """First the whole U-Net in every precision, scaled; then what was timed."""
    machine = measured.machine
    threads = _counted(machine.cores, "thread")
    common = {"component": "unet", "device": f"{machine.cpu}, {threads}", "source": _SOURCE}
    whole, timed = [], []
    for parts in measured.parts:
        runs, number = parts.timings[0].runs, len(parts.parts)
        macs = sum(part.macs for part in parts.parts) / 1e9
        load = f"processor time {parts.cpu_share:.2f} of wall time x {threads}"
        busy = "; other work ran at the same time" if parts.busy else ""
        planned = f": counted by processor time, by wall time {parts.whole_ms():.0f} ms" if parts.busy else ""
        whole.append(
            common
            | {"model": "SD 1.5", "precision": parts.precision, "ms": round(parts.planned_ms(), 1), "label": "estimate"}
            | {
                "conditions": f"scaled from the {number} parts timed here, each by how many multiply-adds of its "
                f"kind and level the whole U-Net has ({sum(WHOLE_MACS.values()) / 1e9:.0f} G at 64x64 latents, "
                f"attention counted in); fastest runs {parts.whole_ms('fastest_ms'):.0f}, slowest "
                f"{parts.whole_ms('slowest_ms'):.0f} ms; {load}{busy}{planned}"
            }
        )
        timed.append(
            common
            | {"model": "SD 1.5, one resnet or transformer block of each kind", "precision": parts.precision}
            | {"ms": round(parts.parts_ms(), 1), "label": "measured"}
            | {
                "conditions": f"{number} graphs with random weights, {macs:.1f} G multiply-adds, batch 1, through "
                f"{parts.providers[0]}: sum of medians of {runs} runs after {WARM_UPS} warm-ups; fastest "
                f"{parts.parts_ms('fastest_ms'):.0f}, slowest {parts.parts_ms('slowest_ms'):.0f} ms; {load}{busy}"
            }
        )
    return [*whole, *timed]


def bundle_anchors(manifest: Manifest, machine: Machine, timings: list[Timing]) -> tuple[dict[str, Any], ...]:
    """What was timed of a bundle as anchors: a guided step and the text encoder by branch, the decoder by picture."""
    what = {"unet": "a guided step", "text_encoder": "both prompts", "vae_decoder": "one picture"}
    anchors = []
    for each in timings:
        calls = 1 if each.name == "vae_decoder" else manifest.guidance.branches
        share = f", divided by {calls} branches" if calls > 1 else ""
        anchors.append(
            {
                "component": each.name,
                "model": f"{manifest.source.model}, {manifest.image.height}x{manifest.image.width}",
                "precision": manifest.precision,
                "ms": max(0.001, round(each.ms / calls, 3)),
                "label": "measured",
                "device": f"{machine.cpu}, {_counted(machine.cores, 'thread')}",
                "source": _SOURCE,
                "conditions": f"bundle {manifest.digest[:19]}: {what[each.name]} {each.ms:.2f} ms{share}; median of "
                f"{each.runs} runs after {WARM_UPS} warm-ups, fastest {each.fastest_ms:.2f}, slowest "
                f"{each.slowest_ms:.2f} ms; processor time {each.cpu_share:.2f} of wall time x "
                f"{_counted(machine.cores, 'thread')}",
            }
        )
    return tuple(anchors)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _cpu_last(providers: tuple[str, ...]) -> list[str]:
    return [*(each for each in providers if each != CPU), CPU]


def _source_title(machine: Machine, date: str) -> str:
    tools = f"latentrelay {version('latentrelay')}, ONNX Runtime {version('onnxruntime')}, CPython"
    flags = ", ".join(machine.int8_flags) or "none that is known"
    return (
        f"`latentrelay devices measure`, {date}: {tools} {platform.python_version()}; {machine.cpu}, "
        f"{_counted(machine.cores, 'core')} ({machine.cores_reason}), {machine.system}; instructions for 8-bit "
        f"products: {flags}; execution providers: {', '.join(available_providers())}"
    )
