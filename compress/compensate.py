"""Quantisation-error compensation: tables that take a quantised network's own error back, fitted on recorded runs.

A reconstruction in the spirit of TCEC (arXiv 2508.12094) and its neighbours, not a reproduction. The error e = q - r of
the deployed network is regressed, per step and channel, on what the step graph holds anyway: `affine` on the branch's
own output and 1 (K and b), `joint` also on the other guidance branch, the latents and the solver's memory. Rivals with
the same tables: `gain` (K alone, the ratio fit) and `ptqd` (arXiv 2305.10657: one slope a step and a bias, fitted after
guidance). Rows from `closed_from` on are fitted in closed loop: from the latents that the corrected quantised run has
to the float run's next latents. Nothing here decides what ships; see compensation_gate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from latentrelay.compress.compensation_rows import METHODS, Method, branch_tables, closed_row, open_row
from latentrelay.compress.denoising_chain import (
    Correction,
    Denoiser,
    Floats,
    Start,
    chain,
    compensated,
    guided,
    solver_step,
)
from latentrelay.compress.error_moments import REGRESSORS, Doubles, Moments
from latentrelay.compress.errors import CompensationError
from latentrelay.compress.solver_tables import SolverRow, SolverTable
from latentrelay.compress.trajectory import Identity, Trajectories, Trajectory

_LEAST_POWER = 1e-12


@dataclass(frozen=True, eq=False)
class Compensation:
    """Tables for `e = (1 - gain) q - offset - mixing . (q_other, latents, x0_prev)`, per step, branch and channel.

    `gain`, `offset` (N, 2, C), `mixing` (N, 2, 3, C) or None, float64. `identity` and `timesteps` say what they were
    fitted for; `guidance` is the scale outside which the method does not hold, or None for any; rows from `closed_from`
    on (N: none) belong to the solver's schedule as well as to the network.
    """

    method: Method
    gain: Doubles
    offset: Doubles
    mixing: Doubles | None
    identity: Identity
    timesteps: tuple[int | float, ...]
    closed_from: int
    guidance: float | None = None

    def apply(self, noise_pred: Floats, step: int, latents: Floats, x0_prev: Floats | None) -> Floats:
        """The corrected noise prediction, as the step graph computes it. See `Correction`."""
        mixing = None if self.mixing is None else self.mixing[step]
        return compensated(noise_pred, self.gain[step], self.offset[step], mixing, latents, x0_prev)

    def mixing_row(self, step: int) -> Doubles:
        """(2, 3, C), zeros where nothing mixes."""
        return np.zeros((2, 3, self.gain.shape[2])) if self.mixing is None else self.mixing[step]

    @property
    def rows(self) -> tuple[int, ...]:
        """The steps that are changed at all."""
        changed = np.abs(self.gain).sum(axis=(1, 2)) + np.abs(self.offset).sum(axis=(1, 2))
        if self.mixing is not None:
            changed = changed + np.abs(self.mixing).sum(axis=(1, 2, 3))
        return tuple(int(step) for step in np.flatnonzero(changed))

    def tables(self) -> dict[str, Doubles]:
        """The Plan's arrays by name; without `compensation_mixing` where nothing mixes, empty where nothing changes."""
        if not self.rows:
            return {}
        tables = {"compensation_gain": self.gain, "compensation_offset": self.offset}
        if self.mixing is not None and self.mixing.any():
            tables["compensation_mixing"] = self.mixing
        return tables

    def only(self, steps: Sequence[int]) -> Compensation:
        """Zeros in all rows but these."""
        kept = np.zeros(len(self.gain), dtype=bool)
        kept[list(steps)] = True
        mixing = None if self.mixing is None else np.where(kept[:, None, None, None], self.mixing, 0.0)
        gain, offset = (np.where(kept[:, None, None], table, 0.0) for table in (self.gain, self.offset))
        return replace(self, gain=gain, offset=offset, mixing=mixing)

    def require(self, identity: Identity) -> None:
        """Raise CompensationError, `.field` naming it, where the tables are for another model, sampler or schedule."""
        identity.require(self.identity.to_json(), "the compensation", CompensationError)

    def interpolated(self, identity: Identity, timesteps: Sequence[int | float]) -> Compensation:
        """For another number of steps: rows looked up by model timestep, since open-loop rows describe the network.

        Rows fitted in closed loop describe the schedule too and are left at 0: fit them again. Raises CompensationError
        where anything but the number of steps differs, and for tables that were fitted after guidance.
        """
        self.require(replace(identity, num_steps=self.identity.num_steps))
        if len(timesteps) != identity.num_steps:
            raise CompensationError("timesteps", got=len(timesteps), expected=identity.num_steps, field="num_steps")
        if tuple(timesteps) == self.timesteps:
            return self
        known, asked = np.array(self.timesteps[: self.closed_from], float)[::-1], np.array(timesteps, float)
        size = (len(asked), *self.gain.shape[1:])
        if not len(known):
            return replace(none(identity, timesteps, self.gain.shape[2]), method=self.method)
        beyond = asked < known[0]  # later than every open-loop row

        def at(table: Doubles) -> Doubles:
            flat = table[: self.closed_from].reshape(len(known), -1)[::-1]
            columns = [np.where(beyond, 0.0, np.interp(asked, known, column)) for column in flat.T]
            return np.stack(columns, axis=1).reshape(len(asked), *table.shape[1:])

        mixing = None if self.mixing is None else at(self.mixing)
        if mixing is not None:
            mixing[0, :, 2] = 0.0  # the first step has no memory to read
        return Compensation(
            self.method,
            at(self.gain).reshape(size),
            at(self.offset).reshape(size),
            mixing,
            identity,
            tuple(timesteps),
            len(asked),
            self.guidance,
        )


def none(identity: Identity, timesteps: Sequence[int | float], channels: int) -> Compensation:
    """Tables of zeros."""
    zeros = np.zeros((identity.num_steps, 2, channels))
    return Compensation("none", zeros, zeros, None, identity, tuple(timesteps), identity.num_steps)


def measure(runs: Trajectories, denoiser: Denoiser, table: SolverTable) -> Moments:
    """The deployed network's errors on the float runs' own latents (open loop): one call a step and run, a file at a
    time. Each run counts by the inverse of its guided error at that step, because dB are averaged over runs."""
    moments: Moments | None = None
    for run in runs:
        if moments is None:
            moments = Moments.zeros(len(table.rows), run.latents.shape[2])
        memory = run.x0_prev
        for step, latents, noise_pred in run:
            got = denoiser(latents, step, run.prompt_embeds)
            error = got - noise_pred
            power = float(np.mean(np.square(guided(error, runs.identity.guidance), dtype=np.float64)))
            moments.add(step, got, error, latents, _read_memory(table, memory), 1.0 / max(power, _LEAST_POWER))
            _, memory = solver_step(table.rows[step], latents, guided(noise_pred, runs.identity.guidance), memory)
    if moments is None:
        raise CompensationError("there is nothing to fit on", got="no runs", expected="recorded runs")
    return moments


def fit(moments: Moments, method: Method, identity: Identity, table: SolverTable) -> Compensation:
    """Open loop: the tables of one method from a network's moments; steps without samples get rows of 0."""
    if method not in METHODS:
        raise CompensationError("unknown method", got=method, expected=" | ".join(METHODS))
    num_steps, channels = moments.sums.shape[:2]
    if num_steps != identity.num_steps or num_steps != len(table.rows):
        raise CompensationError(
            "another number of steps", got=num_steps, expected=identity.num_steps, field="num_steps"
        )
    plain = none(identity, table.timesteps, channels)
    if method == "none":
        return plain
    corrections = np.zeros((num_steps, 2, len(REGRESSORS), channels))
    for step in range(num_steps):
        if moments.runs[step]:
            memory = table.needs_x0_prev and step > 0
            corrections[step] = open_row(moments.sums[step], method, identity.guidance, memory)
    return _from_corrections(
        replace(plain, method=method), corrections, identity.guidance if method == "ptqd" else None
    )


def fit_closed_loop(
    base: Compensation,
    runs: Trajectories,
    denoiser: Denoiser,
    table: SolverTable,
    first: int,
    method: Method = "joint",
) -> Compensation:
    """Refit the rows `first` .. N-1 of `base` one after the other, each on the states that the corrected run has there.

    Per step: the e that takes the quantised run's latents to the float run's next latents through the solver's row is
    the target (for DPM-Solver++(2M) with the memory that the corrected run has). Regressors: the two branches' outputs
    and 1, for "joint" also the latents and the memory. `base` is not modified.
    """
    base.require(runs.identity)
    if not 0 <= first < len(table.rows):
        raise CompensationError("no such step", got=first, expected=f"0..{len(table.rows) - 1}")
    guidance, result = runs.identity.guidance, replace(base, method=method, closed_from=min(first, base.closed_from))
    result = replace(result, guidance=guidance)
    starts = (advance(run, first, denoiser, table, guidance, base) for run in runs)
    states = [(start.latents, start.x0_prev) for start in starts]
    for step in range(first, len(table.rows)):
        moments = Moments.zeros(len(table.rows), base.gain.shape[2])
        outputs: dict[int, Floats] = {}
        for i, run in enumerate(runs):
            if step < run.split:
                continue
            latents, memory = states[i]
            outputs[i] = denoiser(latents, step, run.prompt_embeds)
            target = run.latents[step + 1 - run.split]
            error = guided(outputs[i], guidance) - wanted(table.rows[step], latents, memory, target)
            power = max(float(np.mean(np.square(error, dtype=np.float64))), _LEAST_POWER)
            both = np.concatenate([error, error])  # all of it in the unconditional error; nothing in the direction's
            moments.add(step, outputs[i], both, latents, _read_memory(table, memory), 1.0 / power)
        result = _with_closed_row(result, step, moments.sums[step], method, guidance, table)
        for i, noise_pred in outputs.items():
            latents, memory = states[i]
            e = guided(result.apply(noise_pred, step, latents, memory), guidance)
            states[i] = solver_step(table.rows[step], latents, e, memory)
    return result


def advance(
    run: Trajectory, first: int, denoiser: Denoiser, table: SolverTable, guidance: float, base: Correction | None
) -> Start:
    """Where a run through `denoiser` and `base` stands before step `first`; its start where that lies later."""
    latents, memory = run.latents[0], run.x0_prev
    if first > run.split:
        for done in chain(denoiser, table, run.start, guidance, base):
            latents, memory = done.next_latents, done.next_x0_prev
            if done.step == first - 1:
                break
    return Start(max(first, run.split), latents, memory, run.prompt_embeds)


def wanted(row: SolverRow, latents: Floats, memory: Floats | None, target: Floats) -> Floats:
    """The e (1, C, h, w) with which the row takes latents and memory to the target latents."""
    rest = target.astype(np.float64) - row.a * latents
    if row.c != 0.0 and memory is not None:
        rest = rest - row.c * memory
    found: Floats = (rest / row.b).astype(np.float32)
    return found


def _with_closed_row(
    base: Compensation, step: int, moments: Doubles, method: Method, guidance: float, table: SolverTable
) -> Compensation:
    correction = closed_row(moments, method, guidance, table.needs_x0_prev and step > 0)
    gain, offset, mixing = branch_tables(correction[None])
    gains, offsets = base.gain.copy(), base.offset.copy()
    mixings = np.zeros((len(gains), 2, 3, gains.shape[2])) if base.mixing is None else base.mixing.copy()
    gains[step], offsets[step], mixings[step] = gain[0], offset[0], mixing[0]
    return replace(base, gain=gains, offset=offsets, mixing=mixings)


def _from_corrections(plain: Compensation, corrections: Doubles, guidance: float | None) -> Compensation:
    gain, offset, mixing = branch_tables(corrections)
    mixes = plain.method == "joint"
    return replace(plain, gain=gain, offset=offset, mixing=mixing if mixes else None, guidance=guidance)


def _read_memory(table: SolverTable, memory: Floats | None) -> Floats | None:
    """What a step graph of this solver is given."""
    return memory if table.needs_x0_prev else None
