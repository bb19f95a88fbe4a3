"""Planned predicted steps on disk: prediction.json (settings, masks, evidence, report) and prediction.safetensors.

What `plan_prediction` decided, so that a second build takes it over. Where nothing was let through, settings, masks and
tables are empty and the report says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from latentrelay.compress.plan import Evidence
from latentrelay.compress.plan_json import parse_plan_record, plan_record_to_json
from latentrelay.compress.plan_prediction import mask_key, mask_name
from latentrelay.compress.prediction_gate import PredictionOutcome
from latentrelay.export.bundle_folder import write_json
from latentrelay.export.stages import read_json
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from latentrelay.compress.plan_prediction import MaskKey

DECISIONS, TABLES = "prediction.json", "prediction.safetensors"
Mask = tuple[Literal["full", "predicted"], ...]


@dataclass(frozen=True, eq=False)
class PlannedPrediction:
    """What was read: `recipe` as `Recipe.prediction`, masks by (split, level), the plan's tables by name, the evidence
    for every part, and `report` for the manifest."""

    recipe: Mapping[str, Any]
    masks: Mapping[MaskKey, Mask]
    tables: Mapping[str, NDArray[np.float64]]
    evidence: tuple[Evidence, ...]
    report: Mapping[str, Any]


def save_prediction(folder: Path, outcome: PredictionOutcome) -> None:
    """Write both files into `folder`."""
    write_json(
        folder / DECISIONS,
        {
            "recipe": plan_record_to_json(outcome.recipe()),
            "masks": {mask_name(*key): list(mask) for key, mask in outcome.masks().items()},
            "evidence": [plan_record_to_json(each) for each in outcome.evidence],
            "report": plan_record_to_json(outcome.report),
        },
    )
    arrays = {name: np.ascontiguousarray(array) for name, array in outcome.tables().items()}
    save_file(arrays or {"": np.zeros(0)}, folder / TABLES)


def load_prediction(folder: Path) -> PlannedPrediction:
    """What `save_prediction` wrote."""
    document = read_json(folder, DECISIONS)
    return PlannedPrediction(
        document["recipe"],
        {mask_key(name): tuple(mask) for name, mask in document["masks"].items()},
        {name: array for name, array in load_file(folder / TABLES).items() if name},
        tuple(parse_plan_record(Evidence, each, "evidence") for each in document["evidence"]),
        document["report"],
    )
