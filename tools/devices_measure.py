"""`latentrelay devices measure`: a profile of the machine this runs on, with what was timed and what follows from it.

In: nothing but the machine (and, if given, a bundle whose graphs are timed too). Out: one TOML file that `devices
validate` accepts and `build --device FILE` takes. Needs the base install only. Timed are the parts of SD 1.5's U-Net
(unet_parts.py); the whole U-Net and the size of the device's student are scaled from them and labelled so.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from latentrelay.device_profiles import DeviceProfile
from latentrelay.runtime.errors import REFUSED, LatentRelayError, RequestError
from latentrelay.tools.console import counting, emit, err, printable, table
from latentrelay.tools.machine import Machine, largest_file, read_machine
from latentrelay.tools.measured_profile import Measured, bundle_anchors, ceiling_mib, profile_of
from latentrelay.tools.profile_file import profile_file
from latentrelay.tools.time_graphs import (
    CPU,
    MIN_RUNS,
    PartTimings,
    Timing,
    available_providers,
    chosen_providers,
    time_bundle,
    time_parts,
)
from latentrelay.tools.unet_parts import PARTS, Part

NEEDED_MIB = 1536


class TooSmallError(LatentRelayError):
    """The machine leaves less memory than the largest part of SD 1.5's U-Net needs at 512x512."""

    exit_status = REFUSED


def run(
    output: Path,
    *,
    bundle: Path | None = None,
    provider: list[str] | None = None,
    runs: int = 7,
    overwrite: bool = False,
    as_json: bool = False,
    parts: tuple[Part, ...] = PARTS,
) -> None:
    """Measure, write the profile and say what is in it. With fewer `parts`, the U-Net's time is theirs only."""
    if runs < MIN_RUNS:
        raise RequestError("too few runs for a median", got=runs, expected=f"{MIN_RUNS} or more")
    machine, providers = read_machine(), chosen_providers(provider or [])
    with profile_file(output, overwrite=overwrite) as write:
        ceiling, _ = ceiling_mib(machine)
        if ceiling < NEEDED_MIB:
            raise TooSmallError(
                "this machine is too small for SD 1.5 at 512x512, which this measurement runs parts of",
                got=f"a ceiling of {ceiling} MiB for one application",
                expected=f"{NEEDED_MIB} MiB or more",
                do="Copy a smaller device's profile and change its numbers, or lift the memory limit.",
            )
        measured = _measure(machine, providers, output.absolute().parent, bundle, runs, parts)
        now = datetime.now(UTC)
        profile = profile_of(output.stem, measured, now.date().isoformat())
        write(profile, _comment(profile, now))
    _report(profile, measured, output, as_json)


def _measure(
    machine: Machine, providers: tuple[str, ...], folder: Path, bundle: Path | None, runs: int, parts: tuple[Part, ...]
) -> Measured:
    rounds = [False, True] if providers == (CPU,) and machine.int8_flags else [False]
    with counting("measuring", len(parts) * len(rounds)) as advance:

        def progress(words: str) -> None:
            advance(words, 1)

        anchors: tuple[dict[str, Any], ...] = ()
        if bundle is not None:
            opened, timings = time_bundle(bundle, providers=providers, threads=machine.cores, runs=runs)
            anchors = bundle_anchors(opened.manifest, machine, timings)
        timed = [
            time_parts(parts, int8=int8, providers=providers, threads=machine.cores, runs=runs, progress=progress)
            for int8 in rounds
        ]
    timed.sort(key=lambda each: each.planned_ms())
    return Measured(machine, tuple(timed), largest_file(folder), anchors)


def _comment(profile: DeviceProfile, now: datetime) -> str:
    return (
        f"Written by `latentrelay devices measure` on {now:%Y-%m-%d %H:%M} UTC, on this machine:\n{profile.chipset}.\n"
        'What says "measured" was timed here; what says "estimate" is scaled from it as its conditions say.'
    )


def _report(profile: DeviceProfile, measured: Measured, output: Path, as_json: bool) -> None:
    machine, plan = measured.machine, measured.parts[0]
    document = {
        "ok": True,
        "name": profile.name,
        "path": str(output),
        "profile": profile.model_dump(mode="json"),
        "measured": {
            "machine": asdict(machine),
            "providers": list(plan.providers),
            "available_providers": list(available_providers()),
            "cpu_share": round(min(each.cpu_share for each in measured.parts), 3),
            "busy": any(each.busy for each in measured.parts),
            "unet_ms": {each.precision: round(each.planned_ms(), 1) for each in measured.parts},
            "parts": [_row(parts, each) for parts in measured.parts for each in parts.timings],
        },
    }
    if any(each.busy for each in measured.parts):
        err.print(
            "[yellow]busy:[/] other work had the processor too; what is scaled from the times counts processor time "
            "instead of wall time. Measure again when the machine is quiet."
        )

    def show(console: Any) -> None:
        rows = [
            [f"{each.name}, {parts.precision}", f"{each.ms:.1f}", f"{each.fastest_ms:.1f} .. {each.slowest_ms:.1f}"]
            for parts in measured.parts
            for each in parts.timings
        ]
        rows += [
            [f"SD 1.5's whole U-Net, {parts.precision}: estimate", f"{parts.planned_ms():.0f}", ""]
            for parts in measured.parts
        ]
        target = profile.target_unet_parameters
        console.print(table(["part of the U-Net", "ms", "fastest .. slowest"], rows))
        console.print(
            f"{printable(machine.cpu)}: cores {machine.cores} ({machine.cores_reason}); "
            f"{profile.memory.application_ceiling_mib} of {machine.total_mib} MiB for an application; "
            f"{profile.target_precision}; U-Net of {target.parameters / 1e6:.0f}M, limited by {target.limited_by}"
        )
        console.print(
            f"profile: [bold]{printable(output)}[/]\n"
            f"use it: latentrelay build --device {printable(output)} -o bundles/{profile.name}"
        )

    emit(document, as_json, show)


def _row(parts: PartTimings, each: Timing) -> dict[str, Any]:
    return {"precision": parts.precision} | {
        key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(each).items()
    }
