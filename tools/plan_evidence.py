"""What is known about quality: sweeps over the splits, rows by precision, and runs with predicted steps, all measured.

In: the packaged figures of the reference's students (plan_reference.json, cut from docs/measured/), or a sweep.json of
one's own. Out: `Evidence.quality(...)`, the loss of one combination against all steps in the cloud. A combination that
nobody measured has none: nothing is interpolated. Only measured parts of one and the same combination are added up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrelay.runtime.errors import RequestError

PACKAGED = Path(__file__).with_name("plan_reference.json")
MEASURED, IN_PARTS, IN_DB, UNMEASURED = "measured", "measured in parts", "measured in dB only", "not measured"
_SWEEP_KEYS = ("rows", "cloud_latents_decoded_on_device", "num_steps", "captions", "seed", "model_digest")
_ROW_KEYS = ("student", "split", "attribute_accuracy_difference", "attribute_accuracy_difference_95", "psnr_db")


@dataclass(frozen=True)
class Quality:
    """Attribute accuracy less that of all steps in the cloud with its own decoder (0.01 is one point; below 0 worse),
    with its 95 % interval; dB where measured, `psnr_to` says against what. None where nobody measured."""

    label: str
    source: str
    difference: float | None = None
    interval: tuple[float, float] | None = None
    psnr_db: float | None = None
    psnr_to: str | None = None
    captions: int | None = None

    @property
    def known(self) -> bool:
        """Whether the combination's accuracy was measured."""
        return self.interval is not None

    @property
    def loss(self) -> float | None:
        """The loss that is ruled out with 95 % confidence to be exceeded: the interval's worse end, 0 at least."""
        return None if self.interval is None else max(0.0, -self.interval[0])

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; absent figures are null."""
        return {
            "label": self.label,
            "source": self.source,
            "accuracy_difference": self.difference,
            "accuracy_difference_95": list(self.interval) if self.interval else None,
            "loss": self.loss,
            "psnr_db": self.psnr_db,
            "psnr_to": self.psnr_to,
            "captions": self.captions,
        }


@dataclass(frozen=True)
class Setting:
    """What a device runs, as far as quality depends on it. `student` by its released name or its U-Net's digest;
    `settings` name the predicted steps' method and `computed` how many of the device's steps are computed (None: all).
    `kernels` are the device's, named where a figure comes from others.
    """

    model_digest: str | None
    student: str
    precision: str
    split: int
    num_steps: int
    sampler: str
    guidance: float
    light_decoder: bool
    settings: str | None = None
    computed: int | None = None
    kernels: str | None = None


class Evidence:
    """All figures, asked by combination."""

    def __init__(
        self,
        sweeps: Sequence[Mapping[str, Any]],
        precisions: Sequence[Mapping[str, Any]],
        accelerated: Sequence[Mapping[str, Any]],
    ) -> None:
        self.sweeps = sorted(sweeps, key=lambda sweep: -int(sweep["captions"]))  # the surest first
        self.precisions, self.accelerated = precisions, accelerated

    @classmethod
    def load(cls, own_sweep: Path | None = None) -> Evidence:
        """The packaged figures; with `own_sweep`, its rows in the place of the packaged sweeps. Raises RequestError."""
        document = json.loads(PACKAGED.read_text(encoding="utf-8"))
        sweeps = document["sweeps"] if own_sweep is None else [_own_sweep(own_sweep)]
        return cls(sweeps, document["precisions"], document["accelerated"])

    def students(self) -> dict[str, Mapping[str, Any]]:
        """Name -> parameters, bytes and FLOPs of every student that a sweep ran."""
        each = (item for sweep in self.sweeps for item in sweep.get("students", {}).items())
        return {name: {**entry, "name": name} for name, entry in each}

    def name_of(self, digest: str | None) -> str | None:
        """The name of the student with these weights, or None."""
        found = (name for name, entry in self.students().items() if digest and entry.get("digest") == digest)
        return next(found, None)

    def splits(self, student: str, num_steps: int) -> list[int]:
        """Every split that was swept with a student, N among them."""
        mine = [sweep for sweep in self.sweeps if sweep["num_steps"] == num_steps]
        return sorted({row["split"] for sweep in mine for row in sweep["rows"] if row["student"] == student})

    def quality(self, wanted: Setting) -> Quality:
        """The quality of one combination, from one figure or from the parts that were measured of just that."""
        sweep = next((each for each in self.sweeps if _fits(each, wanted) and _swept(each, wanted)), None)
        if sweep is None:
            return Quality(UNMEASURED, "no sweep ran this student and split with this model, sampler and decoder")
        if wanted.split == wanted.num_steps:
            return _of_sweep(sweep, sweep["cloud_latents_decoded_on_device"])  # no step on the device: no U-Net there
        if wanted.precision == "fp32" and wanted.computed is None:
            return _of_sweep(sweep, _swept(sweep, wanted) or {})
        return self._in_parts(wanted)

    def _in_parts(self, wanted: Setting) -> Quality:
        """Sweep, precision and prediction added up, where each was measured at this split on the same captions."""
        parts: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
        if wanted.precision != "fp32":
            parts += _first(self.precisions, wanted, lambda row: row["precision"] == wanted.precision)
        if wanted.computed is not None:
            mine = [each for each in self.accelerated if each["precision"] == wanted.precision]
            parts += _first(
                mine, wanted, lambda row: (row["settings"], row["computed_steps"]) == (wanted.settings, wanted.computed)
            )
        missing = (wanted.precision != "fp32") + (wanted.computed is not None) - len(parts)
        if missing:
            return Quality(UNMEASURED, "this precision or mask was not measured at this split")
        captions = {(part["captions"], part["seed"], part["data_split"]) for part, _ in parts}
        for sweep in self.sweeps:
            if _fits(sweep, wanted) and captions == {(sweep["captions"], sweep["seed"], sweep.get("data_split"))}:
                row = _swept(sweep, wanted)
                if row is not None:
                    return _summed([(sweep, row), *parts], wanted.kernels)
        return Quality(UNMEASURED, "its parts were measured on different captions")


def _own_sweep(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"the sweep cannot be read ({error})", got=str(path), expected="a sweep.json") from error
    rows = document.get("rows") if isinstance(document, dict) else None
    missing = [key for key in _SWEEP_KEYS if not isinstance(document, dict) or key not in document]
    if not missing and (not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows)):
        missing = ["rows"]
    if not missing:
        missing = [f"rows[].{key}" for row in rows or () for key in _ROW_KEYS if key not in row]
    if missing:
        raise RequestError(
            "this is no sweep", got=f"{path} without {missing[0]}", expected="what `latentrelay evaluate --sweep` wrote"
        )
    return {"file": str(path), "data_split": "report", **document}


def _fits(sweep: Mapping[str, Any], wanted: Setting) -> bool:
    light = sweep.get("device_decoder", "light") == "light"
    same = {"num_steps": wanted.num_steps, "sampler": wanted.sampler, "guidance": wanted.guidance}
    return (
        all(sweep.get(key, value) == value for key, value in same.items())
        and (wanted.model_digest is None or sweep["model_digest"] == wanted.model_digest)
        and light == wanted.light_decoder
    )


def _swept(sweep: Mapping[str, Any], wanted: Setting) -> Mapping[str, Any] | None:
    if wanted.split == wanted.num_steps:
        row: Mapping[str, Any] = sweep["cloud_latents_decoded_on_device"]
        return row
    rows = (row for row in sweep["rows"] if (row["student"], row["split"]) == (wanted.student, wanted.split))
    return next(rows, None)


def _first(documents: Sequence[Mapping[str, Any]], wanted: Setting, matches: Any) -> list[tuple[Any, Any]]:
    for document in documents:
        fits = (document["student"], document["split"], document["num_steps"], document["sampler"]) == (
            wanted.student,
            wanted.split,
            wanted.num_steps,
            wanted.sampler,
        )
        if fits and document["guidance"] == wanted.guidance and wanted.model_digest in (None, document["model_digest"]):
            found = [(document, row) for row in document["rows"] if matches(row)]
            if found:
                return found[:1]
    return []


def _of_sweep(sweep: Mapping[str, Any], row: Mapping[str, Any]) -> Quality:
    low, high = row["attribute_accuracy_difference_95"]
    return Quality(
        MEASURED,
        str(sweep["file"]),
        row["attribute_accuracy_difference"],
        (low, high),
        row["psnr_db"],
        "pictures of the all-cloud run",
        sweep["captions"],
    )


def _summed(parts: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], kernels: str | None) -> Quality:
    """Differences on the same captions add up exactly; the sum of the intervals is at least as wide as theirs."""
    rows = [row for _, row in parts]
    ran = sorted({str(document["kernels"]) for document, _ in parts if "kernels" in document})
    beside = f" (on the kernels of {', '.join(ran)}; this device has {kernels})" if kernels not in (None, *ran) else ""
    lows, highs = zip(*(row["attribute_accuracy_difference_95"] for row in rows), strict=True)
    return Quality(
        IN_PARTS,
        " + ".join(dict.fromkeys(str(document["file"]) for document, _ in parts)) + beside,
        sum(row["attribute_accuracy_difference"] for row in rows),
        (sum(lows), sum(highs)),
        rows[-1]["psnr_db"],
        "latents of the same student, every step computed, in the same precision"
        if "settings" in rows[-1]
        else "latents of the same student in float32",
        parts[0][0]["captions"],
    )
