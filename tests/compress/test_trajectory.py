"""Recorded runs: complete, resumed where they stopped, refused for another identity, read one at a time."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.compress.denoising_chain import Start, chain, final_latents, guided
from latentrelay.compress.errors import TrajectoryError
from latentrelay.compress.solver_tables import SolverRow, SolverTable
from latentrelay.compress.trajectory import CloudHandoff, Identity, Trajectories, record

SHAPE = (1, 2, 3, 3)
ROWS = (
    SolverRow(a=0.9, b=-0.3, c=0.0, n=0.0, p=1.0, q=-0.5, s=0.5),
    SolverRow(a=0.8, b=-0.2, c=0.1, n=0.0, p=1.1, q=-0.4, s=1.0),
    SolverRow(a=0.7, b=-0.1, c=0.2, n=0.0, p=1.2, q=-0.3, s=2.0),
)
TABLE = SolverTable(ROWS, (900, 500, 100), 1.0)
IDENTITY = Identity("sha256:aa", "sha256:bb", "dpmsolver++", "sha256:cc", 3, 4.0)


class Network:
    """tanh of the latents plus what the prompt's states say; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, latents: Any, step: int, prompt_embeds: Any) -> Any:
        self.calls += 1
        shift = prompt_embeds.mean(axis=(1, 2))[:, None, None, None]
        return np.tanh(np.concatenate([latents, latents]) + shift + np.float32(0.1 * step)).astype(np.float32)


def cloud(prompt: str, seed: int, split: int) -> CloudHandoff:
    """The network's own first steps from a seeded start."""
    rng = np.random.default_rng(seed)
    states = np.stack([np.zeros((2, 2)), np.full((2, 2), len(prompt) / 10)]).astype(np.float32)
    latents = rng.standard_normal(SHAPE).astype(np.float32)
    memory = None
    for step in chain(Network(), TABLE, Start(0, latents, None, states), IDENTITY.guidance):
        if step.step == split:
            break
        latents, memory = step.next_latents, step.next_x0_prev
    return CloudHandoff(latents, memory if split else None, states)


def made(
    folder: Path, denoiser: Network, prompts: tuple[str, ...] = ("a", "bb", "ccc"), /, **changes: Any
) -> Trajectories:
    identity = dataclasses.replace(IDENTITY, **changes)
    return record(folder, prompts, range(len(prompts)), (0, 2), cloud, denoiser, TABLE, identity)


def test_a_run_holds_what_the_solver_did(tmp_path: Path) -> None:
    whole, half, _ = made(tmp_path, Network())
    assert (whole.split, half.split) == (0, 2)
    assert whole.latents.shape == (4, *SHAPE)
    assert whole.noise_pred.shape == (3, 2, *SHAPE[1:])
    assert whole.x0_prev is None
    assert half.x0_prev is not None
    assert half.latents.shape == (2, *SHAPE)
    x, memory = whole.latents[0].astype(np.float64), 0.0
    for row, noise_pred in zip(ROWS, whole.noise_pred.astype(np.float64), strict=True):
        e = noise_pred[:1] + 4.0 * (noise_pred[1:] - noise_pred[:1])
        x, memory = row.a * x + row.b * e + row.c * memory, row.p * x + row.q * e
    np.testing.assert_allclose(whole.latents[-1], x, atol=1e-6)
    assert [step for step, _, _ in half] == [2]


def test_a_split_run_is_the_whole_run_from_there(tmp_path: Path) -> None:
    whole = next(iter(record(tmp_path / "0", ["a"], [7], [0], cloud, Network(), TABLE, IDENTITY)))
    handoff = cloud("a", 7, 2)
    start = Start(2, handoff.latents, handoff.x0_prev, handoff.prompt_embeds)
    np.testing.assert_array_equal(final_latents(chain(Network(), TABLE, start, 4.0), start), whole.latents[-1])


def test_a_killed_recording_goes_on(tmp_path: Path) -> None:
    first = Network()
    made(tmp_path, first, ("a", "bb"))
    damaged = sorted(tmp_path.glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    second = Network()
    again = made(tmp_path, second)
    assert (first.calls, len(again), len(list(again))) == (4, 3, 3)
    assert second.calls in (3 + 3, 3 + 1)  # the third prompt and the damaged one, nothing else
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    third = Network()
    made(tmp_path, third)
    assert third.calls == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", "sha256:dd"),
        ("network", "sha256:dd"),
        ("sampler", "ddim"),
        ("scheduler_digest", "sha256:dd"),
        ("guidance", 7.5),
    ],
)
def test_another_identity_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    made(tmp_path, Network())
    with pytest.raises(TrajectoryError, match=f"another .*expected {value}") as refused:
        made(tmp_path, Network(), **{field: value})
    assert refused.value.field == field
    assert refused.value.exit_status == 3
    with pytest.raises(TrajectoryError):
        Trajectories.open(tmp_path, dataclasses.replace(IDENTITY, **{field: value}))  # type: ignore[arg-type]


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    def ask(splits: tuple[int, ...], seeds: tuple[int, ...] = (1,), identity: Identity = IDENTITY) -> None:
        record(tmp_path, ["a"], seeds, splits, cloud, Network(), TABLE, identity)

    with pytest.raises(TrajectoryError, match="each step needs samples"):
        ask((2,))
    with pytest.raises(TrajectoryError, match="do not pair"):
        ask((0,), (1, 2))
    with pytest.raises(TrajectoryError, match="another schedule"):
        ask((0,), identity=dataclasses.replace(IDENTITY, num_steps=4))
    with pytest.raises(TrajectoryError, match="no recorded runs"):
        Trajectories.open(tmp_path, IDENTITY)


def test_a_run_that_stops_being_numbers_names_the_step(tmp_path: Path) -> None:
    def broken(latents: Any, step: int, prompt_embeds: Any) -> Any:
        return np.full((2, *SHAPE[1:]), np.nan if step == 1 else 0.0, dtype=np.float32)

    with pytest.raises(TrajectoryError, match=r"step 1: .*36 values"):
        record(tmp_path, ["a"], [1], [0], cloud, broken, TABLE, IDENTITY)
    assert not list(tmp_path.glob("*.safetensors"))


def test_feeds_are_the_networks_inputs(tmp_path: Path) -> None:
    runs = made(tmp_path, Network())
    feeds = list(runs.feeds(TABLE))
    assert [step for step, _ in feeds] == [0, 1, 2, 2, 0, 1, 2]
    run = next(iter(runs))
    step, last = feeds[2]
    np.testing.assert_array_equal(last["sample"], np.concatenate([run.latents[2]] * 2) * np.float32(2.0))
    assert float(last["timestep"]) == 100.0
    assert step == 2
    np.testing.assert_array_equal(last["encoder_hidden_states"], run.prompt_embeds)
    assert [run.prompt for run in runs.take(2)] == ["a", "bb"]
    assert len(Trajectories.open(runs.folder, IDENTITY)) == 3


def test_guidance_by_hand() -> None:
    noise_pred = np.array([1.0, 3.0], dtype=np.float32).reshape(2, 1, 1, 1)
    assert guided(noise_pred, 4.0).item() == 9.0
