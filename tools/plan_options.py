"""What a device could run: the bundles given, or the released students in the precisions that were measured.

In: bundles or none, the profile, the evidence. Out: `Option`s with times and masks. A bundle is verified before it is
planned with; a student without a bundle gets the profile's figures, scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentrelay.device_profiles.schema import DeviceProfile
from latentrelay.runtime.bundle import Bundle
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.manifest import Manifest
from latentrelay.runtime.prediction_check import FULL, PREDICTED
from latentrelay.tools.plan_evidence import Evidence
from latentrelay.tools.plan_rows import Mask, Option
from latentrelay.tools.plan_times import DeviceTimes, measured, own_anchors, scaled, work_of, work_of_student
from latentrelay.tools.plan_wire import usual_timesteps

_OWN_SPLITS = 5


def of_bundles(
    folders: Sequence[Path],
    profile: DeviceProfile,
    evidence: Evidence,
    *,
    here: bool,
    progress: Callable[[str], None] = lambda words: None,
) -> list[Option]:
    """An option a bundle; with `here` its parts are timed now. Raises BundleError, SessionError, NoFigureError."""
    found = []
    for folder in folders:
        manifest = Bundle.open(folder).manifest
        student, entry = _student_of(manifest, evidence)
        if here:
            progress(f"timing {folder.name}")
            times = measured(folder)
        else:
            share = _predicted_over_full(manifest)
            times = own_anchors(profile, manifest, share) or scaled(
                profile, manifest.precision, work_of(manifest, entry, evidence.sweeps), share
            )
        found.append(_option(folder, manifest, student, times, profile, evidence))
    return found


def of_released(profile: DeviceProfile, evidence: Evidence, model: str) -> list[Option]:
    """The reference's students: fp32 and the profile's precision, every precision and mask that was measured of one.

    Raises RequestError for another model, NoFigureError.
    """
    if model != "reference":
        raise RequestError("a model of your own is planned with its bundles", got=model, do="Give --bundle DIR.")
    found = []
    for name, entry in evidence.students().items():
        known = [row["precision"] for each in evidence.precisions if each["student"] == name for row in each["rows"]]
        for precision in dict.fromkeys(("fp32", *known, profile.target_precision)):
            found.append(_released(name, entry, precision, profile, evidence))
    return found


def _released(
    name: str, entry: Mapping[str, Any], precision: str, profile: DeviceProfile, evidence: Evidence
) -> Option:
    sweep = next(each for each in evidence.sweeps if name in each.get("students", {}))
    steps = int(sweep["num_steps"])
    runs = [
        (each, row)
        for each in evidence.accelerated
        if (each["student"], each["precision"], each["num_steps"]) == (name, precision, steps)
        for row in each["rows"]
    ]
    share = max((row["predicted_over_full"] for _, row in runs), default=None)
    sizes = [row for each in evidence.precisions if each["student"] == name for row in each["rows"]]
    own = next((row["bundle_bytes"] for row in sizes if row["precision"] == precision), None)
    return Option(
        name=name,
        student=name,
        precision=precision,
        num_steps=steps,
        sampler=str(sweep["sampler"]),
        guidance=float(sweep["guidance"]),
        model_digest=str(sweep["model_digest"]),
        light_decoder=sweep["device_decoder"] == "light",
        latent_shape=(4, 16, 16),
        downscale=8,
        timesteps=usual_timesteps(steps),
        needs_x0_prev=sweep["sampler"] == "dpmsolver++",
        times=scaled(profile, precision, work_of_student(entry, evidence.sweeps), share),
        bytes=int(own or entry["bundle_bytes"]) if own or precision == "fp32" else None,
        splits=tuple(evidence.splits(name, steps)),
        masks=tuple(_measured_mask(each, row) for each, row in runs),
        kernels=profile.backend.kernels,
        speedups={row["settings"]: row["speedup"] for _, row in runs},
    )


def _measured_mask(run: Mapping[str, Any], row: Mapping[str, Any]) -> Mask:
    device, computed = run["num_steps"] - run["split"], int(row["computed_steps"])
    label = f"{computed} of {device} computed"
    return Mask(run["split"], label, computed, device - computed, row["settings"])


def _option(
    folder: Path,
    manifest: Manifest,
    student: str,
    times: DeviceTimes,
    profile: DeviceProfile,
    evidence: Evidence,
) -> Option:
    steps, latent = manifest.schedule.num_steps, manifest.latent
    masks = _masks(manifest)
    own = {0, steps, *(mask.split for mask in masks), profile.defaults.split}
    swept = evidence.splits(student, steps) or [round(steps * part / _OWN_SPLITS) for part in range(_OWN_SPLITS)]
    return Option(
        name=folder.name or str(folder),
        student=student,
        precision=manifest.precision,
        num_steps=steps,
        sampler=manifest.schedule.sampler,
        guidance=manifest.guidance.default,
        model_digest=manifest.source.digest,
        light_decoder=manifest.decoder is not None,
        latent_shape=(latent.channels, latent.height, latent.width),
        downscale=latent.downscale,
        timesteps=manifest.schedule.timesteps,
        needs_x0_prev=manifest.schedule.needs_x0_prev,
        times=times,
        bytes=sum(entry.bytes for entry in manifest.files),
        splits=tuple(sorted(split for split in {*own, *swept} if split <= steps)),
        masks=masks,
        bundle=folder,
        kernels=profile.backend.kernels,
    )


def _masks(manifest: Manifest) -> tuple[Mask, ...]:
    report = manifest.quality.get("prediction")
    report = report if isinstance(report, Mapping) else {}
    by_split = report.get("splits") if isinstance(report.get("splits"), Mapping) else {}
    found = []
    for mask in manifest.prediction.masks if manifest.prediction else ():
        computed, level = mask.mask.count(FULL), str(getattr(mask, "level", "normal"))
        told = by_split.get(str(mask.split), {}) if by_split and level == "normal" else {}
        label = f"{computed} of {len(mask.mask)} computed" + (f", {level}" if level != "normal" else "")
        same = told.get("computed_steps") == computed
        found.append(
            Mask(
                mask.split,
                label,
                computed,
                mask.mask.count(PREDICTED),
                str(report["chosen"]) if same and "chosen" in report else None,
                float(told["psnr_db"]) if same and "psnr_db" in told else None,
                level,
            )
        )
    return tuple(found)


def _predicted_over_full(manifest: Manifest) -> float | None:
    """A predicted step's time over a computed one's, as timed when the bundle was built."""
    report = manifest.quality.get("prediction")
    costs = report.get("costs_ms") if isinstance(report, Mapping) else None
    if manifest.prediction is None or not isinstance(costs, Mapping):
        return None
    kind = "whole_ms" if manifest.prediction.target == "whole_output" else "deep_ms"
    extra = costs.get("choice_ms", 0.0) if manifest.prediction.probe else 0.0
    return (costs[kind] + extra) / costs["full_ms"] if kind in costs and costs.get("full_ms") else None


def _student_of(manifest: Manifest, evidence: Evidence) -> tuple[str, Mapping[str, Any] | None]:
    """The student's released name and figures where its weights are a released one's; else its own name, no figures."""
    told = manifest.additional_metadata.get("student")
    told = told if isinstance(told, Mapping) else {}
    known = evidence.name_of(told.get("digest"))
    if known is not None:
        return known, evidence.students()[known]
    return f"own:{told.get('digest') or manifest.digest}", None
