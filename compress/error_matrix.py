"""How far a feature drifts between steps: E[c, i], the relative L1 error of reusing step c's feature at step i.

In: recorded features of whole runs, one run at a time, (n, 2, C, h, w) from some first step on: the network's output,
the deep feature, anything that a predicted step might take over from an earlier one. Out: an `ErrorMatrix` (N, N),
upper triangle, the mean over runs and guidance branches of ||f_c - f_i||_1 / ||f_i||_1, in float64. Nothing but sums
is kept of a run. What the schedule of ERTACache (arXiv 2508.21091, a reconstruction) is searched on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.compress.errors import ScheduleError
from latentrelay.compress.predicted_chain import StagedDenoiser
from latentrelay.compress.trajectory import Trajectory
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
SCHEMA_VERSION = "1.0"


@dataclass(frozen=True, eq=False)
class ErrorMatrix:
    """`values` (N, N) float64: E[c, i] for c < i, NaN where no run covers both steps, 0 on the diagonal, NaN below it.

    `norms` (N,) is the mean |f_i|, NaN where no run covers the step; `runs` is how many runs were read.
    """

    name: str
    values: Doubles
    norms: Doubles
    runs: int

    def to_json(self, digits: int | None = None) -> dict[str, Any]:
        """A plain mapping; NaN becomes null, `digits` significant digits (None: all of them)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "runs": self.runs,
            "norms": _plain(self.norms, digits),
            "values": [_plain(row, digits) for row in self.values],
        }

    def save(self, path: Path) -> None:
        """Write it as JSON, all or nothing; reading it back gives the same bits."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(json.dumps(self.to_json(), allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(path)

    @classmethod
    def load(cls, path: Path) -> ErrorMatrix:
        """Read one. Raises ScheduleError for a file that is damaged or of another version."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["schema_version"] != SCHEMA_VERSION:
                raise ScheduleError(f"{path} is of another version", got=document["schema_version"], expected="1.0")
            values = np.array([[_number(value) for value in row] for row in document["values"]], np.float64)
            norms = np.array([_number(value) for value in document["norms"]], np.float64)
            found = cls(str(document["name"]), values, norms, int(document["runs"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ScheduleError(f"{path} holds no error matrix: {error}", do="Profile again.") from error
        if values.ndim != 2 or values.shape != (len(norms), len(norms)):
            raise ScheduleError(f"{path} holds no error matrix", got=values.shape, expected=f"({len(norms)},) twice")
        return found


def error_matrix(
    runs: Iterable[tuple[int, NDArray[Any]]], num_steps: int, name: str = "", branches: Sequence[int] = (0, 1)
) -> ErrorMatrix:
    """Read runs one after another: (first step, features (n, B, C, ...) of that step and the n - 1 after it).

    A run contributes to the entries whose two steps it covers, each of its `branches` with its own quotient. Raises
    ScheduleError for no runs, a run past `num_steps` and features that are not finite.
    """
    total, seen = np.zeros((num_steps, num_steps)), np.zeros((num_steps, num_steps))
    sizes, count = np.zeros(num_steps), 0
    for first, features in runs:
        n = len(features)
        if not 0 <= first <= first + n <= num_steps:
            raise ScheduleError("a run's steps", got=f"{first}..{first + n}", expected=f"within 0..{num_steps}")
        for branch in branches:
            drift, size = _drift(features[:, branch])
            if not np.isfinite(drift).all():
                raise ScheduleError(f"run {count} has features that are NaN, Inf or all zero", expected="numbers")
            total[first : first + n, first : first + n] += drift
            seen[first : first + n, first : first + n] += 1
            sizes[first : first + n] += size
        count += 1
    if not count:
        raise ScheduleError("there is nothing to profile", got="no runs", expected="recorded runs")
    upper = np.triu(np.ones(total.shape, dtype=bool)) & (seen > 0)
    values = np.where(upper, total / np.maximum(seen, 1), np.nan)
    norms = np.where(seen.diagonal() > 0, sizes / np.maximum(seen.diagonal(), 1), np.nan)
    return ErrorMatrix(name, values, norms, count)


def recorded_outputs(runs: Iterable[Trajectory]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """What `error_matrix` reads, of the whole output: each run's own noise predictions (n, 2, C, h, w)."""
    for run in runs:
        yield run.split, run.noise_pred


def deep_features(runs: Iterable[Trajectory], staged: StagedDenoiser) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """What `error_matrix` reads, of the deep feature: (n, 2, Cf, h, w) of a network on each run's latents, one call a
    step; a run at a time is held."""
    for run in runs:
        yield run.split, np.stack([staged.full(at, step, run.prompt_embeds).feature for step, at, _ in run])


def velocity(noise_pred: NDArray[Any], latents: NDArray[Any], alpha_cumprod: float) -> NDArray[Any]:
    """The v of an epsilon prediction: v = (eps - sigma x) / alpha, x the latents; the shape that both broadcast to.

    What to profile and reuse of such a network in place of its output: under DDIM, reusing epsilon is nothing but a
    run on the computed steps alone. With alpha^2 = alpha_cumprod, sigma^2 = 1 - alpha_cumprod.
    """
    alpha, sigma = np.sqrt(alpha_cumprod), np.sqrt(1.0 - alpha_cumprod)
    result: NDArray[Any] = (noise_pred - sigma * latents) / alpha
    return result


def _drift(features: NDArray[Any]) -> tuple[Doubles, Doubles]:
    """(n, C, ...) -> (n, n) the quotient of every pair c <= i, zeros below, and (n,) mean |f_i|."""
    flat = features.reshape(len(features), -1).astype(np.float64)
    size = np.abs(flat).mean(1)
    found = np.zeros((len(flat), len(flat)))
    with np.errstate(divide="ignore", invalid="ignore"):
        for c in range(len(flat)):
            found[c, c:] = np.abs(flat[c:] - flat[c]).mean(1) / size[c:]
    return found, size


def _plain(values: Doubles, digits: int | None) -> list[float | None]:
    rounded = (value if digits is None else float(f"{value:.{digits}g}") for value in values.tolist())
    return [None if value != value else value for value in rounded]


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
