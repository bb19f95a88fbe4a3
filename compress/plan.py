"""The Plan: every decision and table that compression hands to export, as `plan.json` and `plan.safetensors`.

Two frozen stages: `recipe` (decided before export: source, profile, schedule, one solver row a step, a mask per split,
precision, corrections with their evidence) and `tables` (arrays fitted on the exported graphs). JSON holds decisions
(floats round-trip exactly), safetensors holds arrays. It is a record and a contract; it computes nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from latentrelay.compress.errors import PlanError
from latentrelay.compress.plan_json import parse_plan_record, plan_record_to_json
from latentrelay.compress.plan_prediction import check_prediction
from latentrelay.compress.solver_tables import SolverRow, SolverTable
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

SCHEMA_VERSION = "1.4"
_OLDER: dict[str, dict[str, Any]] = {  # what a recipe of an older version says by leaving it out
    "1.0": {"compression": {}, "prediction": {}},
    "1.1": {"prediction": {}},
    "1.2": {"prediction": {}},
    "1.3": {},
}
Level = Literal["normal", "hot"]
PLAN_JSON, PLAN_TABLES = "plan.json", "plan.safetensors"


@dataclass(frozen=True)
class PlanSource:
    """The source pipeline: where it came from, its model digest ("sha256:<hex>") and its family ("sd1", "sd2")."""

    model: str
    digest: str
    family: str


@dataclass(frozen=True)
class SplitMask:
    """One supported split k: what each device step k..N-1 is ("full" computes the network, "predicted" does not).
    `level` "hot": another mask of the same split with fewer computed steps, for a device that must give off less heat.
    """

    split: int
    mask: tuple[Literal["full", "predicted"], ...]
    level: Level = "normal"


@dataclass(frozen=True)
class Evidence:
    """A correction's held-out error with and without it, in `metric`, and whether it was kept."""

    name: str
    error_without: float
    error_with: float
    verdict: Literal["kept", "dropped"]
    metric: str


@dataclass(frozen=True)
class Recipe:
    """Everything decided before export. `solver` and `timesteps` have one entry a step, the first step first.

    `compression` is what was done to the source's networks (see tools/compress.py for its keys); empty: nothing.
    `quantisation` holds `precision` and, where it is not fp32, the rule of every layer (see compress/precision.py).
    `prediction` says what the predicted steps of `splits` predict and how, and why (compress/prediction_gate.py); its
    `rows` are the masks' rows of the mask-dependent tables, by "8" for a split's normal mask and "8 hot" for its hot
    one. Empty where every step is computed.
    """

    source: PlanSource
    profile: Mapping[str, Any]
    sampler: str
    scheduler_class: str
    scheduler_digest: str
    num_steps: int
    timesteps: tuple[int | float, ...]
    init_noise_sigma: float
    solver: tuple[SolverRow, ...]
    splits: tuple[SplitMask, ...]
    quantisation: Mapping[str, Any] = field(default_factory=lambda: {"precision": "fp32"})
    corrections: tuple[Evidence, ...] = ()
    compression: Mapping[str, Any] = field(default_factory=dict)
    prediction: Mapping[str, Any] = field(default_factory=dict)

    @property
    def solver_table(self) -> SolverTable:
        """The solver rows with their timesteps, as the step graph takes them."""
        return SolverTable(self.solver, self.timesteps, self.init_noise_sigma)


@dataclass(frozen=True, eq=False)
class Tables:
    """Arrays that the step graph gathers by step, all float64.

    `guidance_multiplier` (N,): 1 leaves the scale as asked. `compensation_gain` K and `compensation_offset` b, both
    (N, branches, C) or both None: the network's output q is corrected to (1 - K) q - b; rows of zeros change nothing.
    `compensation_mixing` (N, 2, 3, C), with them or None, is subtracted too: per branch, times the other branch's
    output, the step's latents and the solver's memory (zeros in row 0 and where the solver has none).

    Predicted steps, all by mask row and step, (R, N, ...), row 0 for a run without any: `ladder_update` (M, 1 + M), at
    a computed step rung o becomes U[o, 0] y + sum U[o, 1 + p] L_p; `candidates` (P, M), a predicted step's rows of
    coefficients over the rungs; `rectifier_gain`, `rectifier_offset` (2, C) and `rectifier_mixing` (2, 1 + 2 M, C), as
    the compensation's, mixing over the other branch, the latents, the memory and the branches' rungs from 1 on;
    `grid_solver` (7), in SolverRow's order, and `grid_timesteps` (), another grid in the place of the recipe's.
    """

    guidance_multiplier: NDArray[np.float64]
    compensation_gain: NDArray[np.float64] | None = None
    compensation_offset: NDArray[np.float64] | None = None
    compensation_mixing: NDArray[np.float64] | None = None
    ladder_update: NDArray[np.float64] | None = None
    candidates: NDArray[np.float64] | None = None
    rectifier_gain: NDArray[np.float64] | None = None
    rectifier_offset: NDArray[np.float64] | None = None
    rectifier_mixing: NDArray[np.float64] | None = None
    grid_solver: NDArray[np.float64] | None = None
    grid_timesteps: NDArray[np.float64] | None = None

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """Those that are there, by name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def __eq__(self, other: object) -> bool:
        """Bit for bit, dtype and shape included."""
        if not isinstance(other, Tables):
            return NotImplemented
        mine, theirs = self.arrays(), other.arrays()
        return mine.keys() == theirs.keys() and all(
            (mine[name].dtype, mine[name].shape, mine[name].tobytes())
            == (theirs[name].dtype, theirs[name].shape, theirs[name].tobytes())
            for name in mine
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Plan:
    """Recipe and tables of one bundle. Raises PlanError when they contradict each other."""

    recipe: Recipe
    tables: Tables
    schema_version: str = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check(self)

    def save(self, folder: Path | str) -> None:
        """Write plan.json (canonical, so equal plans are equal bytes) and plan.safetensors into `folder`."""
        document = {"schema_version": self.schema_version, "recipe": plan_record_to_json(self.recipe)}
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        arrays = {name: np.ascontiguousarray(array) for name, array in sorted(self.tables.arrays().items())}
        blob = save_tensors(arrays)
        Path(folder, PLAN_JSON).write_text(text + "\n", encoding="utf-8")
        Path(folder, PLAN_TABLES).write_bytes(blob)

    @classmethod
    def load(cls, folder: Path | str) -> Plan:
        """Read a plan back, bit for bit; PlanError on a missing file, an unknown key or another schema version."""
        try:
            document = json.loads(Path(folder, PLAN_JSON).read_text(encoding="utf-8"))
            arrays = load_tensors(Path(folder, PLAN_TABLES).read_bytes())
        except (OSError, ValueError) as error:
            raise PlanError(f"the plan in {folder} cannot be read: {error}. Build the bundle again.") from error
        except Exception as error:  # safetensors raises a class of its own, outside the standard tree
            raise PlanError(f"{PLAN_TABLES} in {folder} is malformed: {error}. Build the bundle again.") from error
        if not isinstance(document, dict) or set(document) != {"schema_version", "recipe"}:
            raise PlanError(f"{PLAN_JSON}: expected the keys schema_version and recipe. Build the bundle again.")
        version, recipe = document["schema_version"], document["recipe"]
        if version != SCHEMA_VERSION and version not in _OLDER:
            raise PlanError(f"{PLAN_JSON}: schema_version is {version!r}, expected {SCHEMA_VERSION}")
        if isinstance(recipe, dict):
            recipe = {**_OLDER.get(version, {}), **recipe}
        if version in _OLDER:
            recipe = _with_levels(recipe)
        known = {f.name for f in dataclasses.fields(Tables)}
        if not {"guidance_multiplier"} <= set(arrays) <= known:
            raise PlanError(
                f"{PLAN_TABLES}: got arrays {sorted(arrays)}, expected guidance_multiplier and at most {sorted(known)}"
            )
        return cls(parse_plan_record(Recipe, recipe), Tables(**arrays))


def _with_levels(recipe: Any) -> Any:
    """A recipe from before 1.4, whose masks say no level: they are normal."""
    splits = recipe.get("splits") if isinstance(recipe, dict) else None
    if not isinstance(splits, list):
        return recipe
    return {**recipe, "splits": [{"level": "normal", **each} if isinstance(each, dict) else each for each in splits]}


def full_plan(
    source: PlanSource,
    profile: Mapping[str, Any],
    sampler: str,
    scheduler_class: str,
    digest: str,
    table: SolverTable,
    compression: Mapping[str, Any] | None = None,
) -> Plan:
    """The plain plan: every step computed in full, fp32, no corrections, every split 0..N supported.

    `digest` is the scheduler's configuration digest ("sha256:<hex>"); `compression` as in `Recipe`.
    """
    num_steps = len(table.rows)
    full: tuple[Literal["full", "predicted"], ...] = tuple("full" for _ in range(num_steps))
    recipe = Recipe(
        source=source,
        profile=dict(profile),
        sampler=sampler,
        scheduler_class=scheduler_class,
        scheduler_digest=digest,
        num_steps=num_steps,
        timesteps=table.timesteps,
        init_noise_sigma=table.init_noise_sigma,
        solver=table.rows,
        splits=tuple(SplitMask(k, full[k:]) for k in range(num_steps + 1)),
        compression=dict(compression or {}),
    )
    return Plan(recipe, Tables(np.ones(num_steps, dtype=np.float64)))


def _check(plan: Plan) -> None:
    recipe, multiplier = plan.recipe, plan.tables.guidance_multiplier
    lengths = {"timesteps": len(recipe.timesteps), "solver": len(recipe.solver)}
    for name, length in lengths.items():
        if length != recipe.num_steps or length < 1:
            raise PlanError(f"recipe.{name}: got {length} entries, expected num_steps = {recipe.num_steps}")
    for split in recipe.splits:
        if not 0 <= split.split <= recipe.num_steps or len(split.mask) != recipe.num_steps - split.split:
            raise PlanError(f"recipe.splits: split {split.split} has {len(split.mask)} steps, expected N - split")
    if multiplier.dtype != np.float64 or multiplier.shape != (recipe.num_steps,):
        got = f"{multiplier.dtype} {multiplier.shape}"
        raise PlanError(f"tables.guidance_multiplier: got {got}, expected float64 ({recipe.num_steps},)")
    _check_compensation(plan.tables, recipe)
    check_prediction(plan)
    numbers = [value for row in recipe.solver for value in dataclasses.astuple(row)]
    if not (np.isfinite(numbers).all() and np.isfinite(multiplier).all()):
        raise PlanError("the plan holds NaN or Inf, expected finite numbers. Fit the tables again.")


def _check_compensation(tables: Tables, recipe: Recipe) -> None:
    gain, offset, num_steps = tables.compensation_gain, tables.compensation_offset, recipe.num_steps
    if gain is None and offset is None and tables.compensation_mixing is None:
        return
    if gain is None or offset is None:
        raise PlanError("tables: compensation_gain and compensation_offset belong together, got one without the other")
    for name, array in (("compensation_gain", gain), ("compensation_offset", offset)):
        fits = array.ndim == 3 and array.shape[:2] == (num_steps, 1 if recipe.sampler == "lcm" else 2)
        if array.dtype != np.float64 or not fits or array.shape != gain.shape:
            raise PlanError(
                f"tables.{name}: got {array.dtype} {array.shape}, expected float64 ({num_steps}, branches, channels)"
            )
        if not np.isfinite(array).all():
            raise PlanError(f"tables.{name} holds NaN or Inf, expected finite numbers. Fit the tables again.")
    if tables.compensation_mixing is not None:
        _check_mixing(tables.compensation_mixing, gain.shape, recipe)


def _check_mixing(mixing: NDArray[np.float64], shape: tuple[int, ...], recipe: Recipe) -> None:
    expected = (shape[0], 2, 3, shape[2])
    if mixing.dtype != np.float64 or mixing.shape != expected or shape[1] != 2:
        raise PlanError(
            f"tables.compensation_mixing: got {mixing.dtype} {mixing.shape}, expected float64 {expected} and 2 branches"
        )
    if not np.isfinite(mixing).all():
        raise PlanError("tables.compensation_mixing holds NaN or Inf, expected finite numbers. Fit the tables again.")
    unread = mixing[:, :, 2] if not recipe.solver_table.needs_x0_prev else mixing[:1, :, 2]
    if unread.any():
        raise PlanError(
            "tables.compensation_mixing reads the solver's memory where there is none, expected zeros there"
        )
