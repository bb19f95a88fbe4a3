"""Recorded runs of the edge segment: what calibration, compensation and the step schedule are fitted on.

In: prompts, seeds, splits, a `CloudSegment` that computes the steps before each split and the float `Denoiser` of the
edge. Out: a folder with one safetensors file a prompt (written beside its place and renamed) that holds every step's
latents (n+1, 1, C, h, w) and both branches' noise predictions (n, 2, C, h, w). A killed recording goes on where it was;
another model's or schedule's folder is refused. Reading goes file by file, so memory is one run's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from latentrelay.compress.denoising_chain import Denoiser, Floats, Start, chain
from latentrelay.compress.errors import TrajectoryError
from latentrelay.compress.solver_tables import SolverTable
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

__all__ = [
    "CloudHandoff",
    "CloudSegment",
    "Denoiser",
    "Feeds",
    "Identity",
    "Trajectories",
    "Trajectory",
    "record",
    "step_feeds",
]

SCHEMA_VERSION = "1.0"
IDENTITY_JSON = "identity.json"
Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class CloudHandoff:
    """What crosses at a split: latents (1, C, h, w), x0_prev (1, C, h, w) where the solver has memory and the split is
    not 0, and the prompt's states (2, T, D), the negative prompt's first. All float32 here."""

    latents: Floats
    x0_prev: Floats | None
    prompt_embeds: Floats


class CloudSegment(Protocol):
    """The steps before the split, computed by the full-size model."""

    def __call__(self, prompt: str, seed: int, split: int) -> CloudHandoff:
        """Steps 0 .. split-1 of the run of a prompt and a seed; at split 0 the initial noise."""
        ...


@dataclass(frozen=True)
class Identity:
    """What a folder of runs was made with. `source` and `network` are digests ("sha256:<hex>") of the cloud's model and
    of the edge's network; `scheduler_digest` is the scheduler configuration's."""

    source: str
    network: str
    sampler: str
    scheduler_digest: str
    num_steps: int
    guidance: float

    def to_json(self) -> dict[str, Any]:
        """A plain mapping."""
        return dataclasses.asdict(self)

    def require(self, found: Mapping[str, Any], where: str, error: type[TrajectoryError] = TrajectoryError) -> None:
        """Raise `error`, its `.field` the first entry of `found` that is not this identity's."""
        for name, mine in self.to_json().items():
            if found.get(name) != mine:
                raise error(
                    f"{where} belongs to another {name.replace('_', ' ')}",
                    got=found.get(name),
                    expected=mine,
                    do="Give another folder, or remove this one to make it again.",
                    field=name,
                )


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One run from `split` to the end, n = N - split steps: `latents` (n+1, 1, C, h, w), the last the result;
    `noise_pred` (n, 2, C, h, w), before guidance; `x0_prev` (1, C, h, w) the memory at the split, or None."""

    prompt: str
    seed: int
    split: int
    prompt_embeds: Floats
    x0_prev: Floats | None
    latents: Floats
    noise_pred: Floats

    @property
    def start(self) -> Start:
        """Where the run began, to run it again through another denoiser."""
        return Start(self.split, self.latents[0], self.x0_prev, self.prompt_embeds)

    def __iter__(self) -> Iterator[tuple[int, Floats, Floats]]:
        """(step in the whole run, its latents (1, C, h, w), the float noise prediction (2, C, h, w))."""
        for i, noise_pred in enumerate(self.noise_pred):
            yield self.split + i, self.latents[i], noise_pred


@dataclass(frozen=True)
class Trajectories:
    """Recorded runs in the order they were asked for; iterating reads one file at a time."""

    folder: Path
    identity: Identity
    files: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path | str, identity: Identity) -> Trajectories:
        """Every run in a folder. Raises TrajectoryError where it is another identity's, or holds none."""
        place = Path(folder)
        _check_identity(place, identity)
        files = tuple(sorted(path.name for path in place.glob("[0-9a-f]*.safetensors")))
        if not files:
            raise TrajectoryError(f"no runs in {place}", expected="*.safetensors", do="Record them first.")
        return cls(place, identity, files)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Trajectory]:
        for name in self.files:
            found = _read(self.folder / name)
            if found is None:
                raise TrajectoryError(
                    f"{self.folder / name} is missing or damaged", do="Record again; the rest is kept."
                )
            yield found

    def take(self, count: int) -> Trajectories:
        """The first `count` runs."""
        return dataclasses.replace(self, files=self.files[:count])

    def feeds(self, table: SolverTable) -> Iterator[tuple[int, Feeds]]:
        """(step, the U-Net's inputs) of every step of every run, a run at a time: for activation ranges."""
        for run in self:
            for step, latents, _ in run:
                yield step, step_feeds(table, latents, step, run.prompt_embeds)


def step_feeds(table: SolverTable, latents: Floats, step: int, prompt_embeds: Floats) -> Feeds:
    """The U-Net's inputs of one step: sample (2, C, h, w), timestep (), encoder_hidden_states (2, T, D), float32."""
    scaled = latents * np.float32(table.rows[step].s)
    return {
        "sample": np.concatenate([scaled] * len(prompt_embeds)),
        "timestep": np.array(table.timesteps[step], dtype=np.float32),
        "encoder_hidden_states": prompt_embeds,
    }


def record(
    folder: Path | str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    splits: Sequence[int],
    cloud: CloudSegment,
    denoiser: Denoiser,
    table: SolverTable,
    identity: Identity,
    progress: Callable[[int, int], None] | None = None,
) -> Trajectories:
    """Record what is missing and return all that was asked for: prompt i from seeds[i], at splits[i % len(splits)].

    `denoiser` is the float network of the edge, guided by `identity.guidance`. `splits` must begin with 0, since a
    bundle serves every split and each step needs samples. progress(done, asked). Raises TrajectoryError for a folder of
    another identity, splits without 0, and a run that stops being numbers.
    """
    _check_request(prompts, seeds, splits, table, identity)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    _check_identity(place, identity, write=True)
    files = []
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        split = splits[i % len(splits)]
        path = place / f"{_name(prompt, seed, split)}.safetensors"
        if _read(path) is None:
            _write(path, _run(prompt, seed, split, cloud, denoiser, table, identity.guidance))
        files.append(path.name)
        if progress is not None:
            progress(i + 1, len(prompts))
    return Trajectories(place, identity, tuple(files))


def _run(
    prompt: str, seed: int, split: int, cloud: CloudSegment, denoiser: Denoiser, table: SolverTable, guidance: float
) -> Trajectory:
    handoff = cloud(prompt, seed, split)
    start = Start(split, handoff.latents, handoff.x0_prev, handoff.prompt_embeds)
    steps = list(chain(denoiser, table, start, guidance))
    latents = [handoff.latents, *(step.next_latents for step in steps)]
    channels_and_size = handoff.latents.shape[1:]
    noise_pred = np.stack([s.noise_pred for s in steps]) if steps else np.zeros((0, 2, *channels_and_size), np.float32)
    return Trajectory(prompt, seed, split, handoff.prompt_embeds, handoff.x0_prev, np.stack(latents), noise_pred)


def _check_request(
    prompts: Sequence[str], seeds: Sequence[int], splits: Sequence[int], table: SolverTable, identity: Identity
) -> None:
    if not prompts or len(prompts) != len(seeds):
        raise TrajectoryError("prompts and seeds do not pair", got=f"{len(prompts)} and {len(seeds)}", expected="equal")
    if len(table.rows) != identity.num_steps:
        raise TrajectoryError("the table is another schedule's", got=len(table.rows), expected=identity.num_steps)
    if not splits or splits[0] != 0:
        expected = "0 first: a bundle serves every split, and each step needs samples"
        raise TrajectoryError("the splits leave steps without samples", got=list(splits), expected=expected)


def _name(prompt: str, seed: int, split: int) -> str:
    asked = json.dumps([prompt, seed, split], ensure_ascii=False)
    return hashlib.sha256(asked.encode()).hexdigest()[:24]


def _check_identity(folder: Path, identity: Identity, write: bool = False) -> None:
    path = folder / IDENTITY_JSON
    if not path.is_file():
        if not write:
            raise TrajectoryError(f"{folder} holds no recorded runs", expected=IDENTITY_JSON, do="Record them first.")
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        document = {"schema_version": SCHEMA_VERSION, **identity.to_json()}
        beside.write_text(json.dumps(document, sort_keys=True) + "\n", encoding="utf-8")
        beside.replace(path)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrajectoryError(f"{path} cannot be read: {error}", do="Remove the folder and record again.") from error
    if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION:
        raise TrajectoryError(f"{path} is of another version", expected=SCHEMA_VERSION, do="Record again elsewhere.")
    identity.require(found, str(folder))


def _write(path: Path, run: Trajectory) -> None:
    arrays = {"prompt_embeds": run.prompt_embeds, "latents": run.latents, "noise_pred": run.noise_pred}
    if run.x0_prev is not None:
        arrays["x0_prev"] = run.x0_prev
    about = json.dumps({"prompt": run.prompt, "seed": run.seed, "split": run.split}, ensure_ascii=False, sort_keys=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: np.ascontiguousarray(each) for name, each in arrays.items()}, beside, metadata={"run": about})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: Path) -> Trajectory | None:
    """None where there is no such file, or no whole one."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["run"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return Trajectory(
            about["prompt"],
            about["seed"],
            about["split"],
            arrays["prompt_embeds"],
            arrays.get("x0_prev"),
            arrays["latents"],
            arrays["noise_pred"],
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
