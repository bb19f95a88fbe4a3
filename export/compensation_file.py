"""A fitted compensation on disk: every candidate's tables and held-out scores, and which of them ships.

compensation.json holds the scores, compensation.safetensors the tables as `<candidate>/<table>`. The candidates that
were dropped are kept too, for reports that compare them on other prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from latentrelay.compress.compensation_gate import Outcome
from latentrelay.compress.denoising_chain import Floats, compensated
from latentrelay.export.bundle_folder import write_json
from latentrelay.export.stages import read_json
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

SCORES, TABLES = "compensation.json", "compensation.safetensors"
PLAIN = "none"
Verdict = Literal["kept", "dropped"]


@dataclass(frozen=True, eq=False)
class TableCorrection:
    """A plan's tables as a `Correction`; empty tables change nothing."""

    tables: Mapping[str, NDArray[np.float64]]

    def apply(self, noise_pred: Floats, step: int, latents: Floats, x0_prev: Floats | None) -> Floats:
        """As the step graph computes it."""
        if not self.tables:
            return noise_pred
        mixing = self.tables.get("compensation_mixing")
        rows = (self.tables["compensation_gain"][step], self.tables["compensation_offset"][step])
        return compensated(noise_pred, *rows, None if mixing is None else mixing[step], latents, x0_prev)


@dataclass(frozen=True, eq=False)
class FittedCompensation:
    """What was read: `name` of the candidate that ships, held-out PSNR in dB and tables by candidate, and `report`."""

    name: str
    scores_db: Mapping[str, float]
    candidates: Mapping[str, Mapping[str, NDArray[np.float64]]]
    report: Mapping[str, Any]

    @property
    def tables(self) -> Mapping[str, NDArray[np.float64]]:
        """Of the one that ships; empty where none does."""
        return self.candidates.get(self.name, {})

    @property
    def without_db(self) -> float:
        """The held-out PSNR without any compensation."""
        return self.scores_db[PLAIN]

    @property
    def verdicts(self) -> tuple[tuple[str, float, Verdict], ...]:
        """(candidate, its held-out PSNR, kept or dropped) of every real candidate."""
        return tuple(
            (name, score, "kept" if name == self.name else "dropped")
            for name, score in self.scores_db.items()
            if name != PLAIN
        )


def save_outcome(folder: Path, outcome: Outcome) -> None:
    """Write both files into `folder`."""
    gain, low, high = outcome.gain_db
    write_json(
        folder / SCORES,
        {
            "kept": outcome.name,
            "gain_db": _number(gain),
            "gain_db_95": [_number(low), _number(high)],
            "held_out_runs": len(outcome.scores[PLAIN].psnr_db),
            "psnr_db": {name: _number(score.mean) for name, score in outcome.scores.items()},
            "rows": {name: list(each.rows) for name, each in outcome.candidates.items()},
        },
    )
    arrays = {
        f"{name}/{table}": np.ascontiguousarray(array)
        for name, candidate in outcome.candidates.items()
        for table, array in candidate.tables().items()
    }
    save_file(arrays or {"": np.zeros(0)}, folder / TABLES)


def _number(value: float) -> float | None:
    """For JSON: None where one held-out run gives no interval, or a candidate's run stopped being numbers."""
    return round(value, 3) if math.isfinite(value) else None


def load_outcome(folder: Path) -> FittedCompensation:
    """What `save_outcome` wrote."""
    report = read_json(folder, SCORES)
    scores = {name: -math.inf if score is None else score for name, score in report["psnr_db"].items()}
    candidates: dict[str, dict[str, NDArray[np.float64]]] = {name: {} for name in report["psnr_db"]}
    for key, array in load_file(folder / TABLES).items():
        name, _, table = key.rpartition("/")
        if table:
            candidates[name][table] = array
    verdict = "dropped: no gain on held-out runs with 95 % confidence" if report["kept"] == PLAIN else "kept"
    return FittedCompensation(report["kept"], scores, candidates, {**report, "verdict": verdict})
