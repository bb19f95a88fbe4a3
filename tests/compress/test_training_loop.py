"""The loop: the learning rate's shape, and a killed run ends where an unbroken one does, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from latentrelay.compress.training import BatchRng, Losses, Recipe, fit

RECIPE = Recipe(
    steps=12, batch=4, learning_rate=1e-2, warmup=3, decay=0.5, ema_decay=0.9, checkpoint_every=5, log_every=4
)


class Killed(Exception):
    """What a power cut looks like to the loop."""


def loss_of(module: torch.nn.Module, rng: BatchRng) -> Losses:
    inputs = torch.randn(RECIPE.batch, 3, generator=rng.torch) + float(rng.numpy.normal())
    return {"loss": (module(inputs) - inputs.sum(1, keepdim=True)).square().mean()}


def new_module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 1)


def test_learning_rate_rises_holds_and_falls() -> None:
    rates = [RECIPE.learning_rate_at(step) for step in range(RECIPE.steps)]
    assert rates[0] == pytest.approx(1e-2 / 3)
    assert rates[2] == rates[5] == pytest.approx(1e-2)
    assert rates[9] == pytest.approx(1e-2 / 2)
    assert rates[11] < 1e-3


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = fit(new_module(), loss_of, RECIPE, tmp_path / "whole")

    def dies(module: torch.nn.Module, rng: BatchRng) -> Losses:
        if rng.step == 8:
            raise Killed
        return loss_of(module, rng)

    with pytest.raises(Killed):
        fit(new_module(), dies, RECIPE, tmp_path / "broken")
    resumed = fit(new_module(), loss_of, RECIPE, tmp_path / "broken")
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    rows = [json.loads(line) for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == RECIPE.steps
    assert rows[-1]["loss"] > 0


def test_checkpoints_hand_out_the_average_not_the_live_weights(tmp_path: Path) -> None:
    seen: dict[int, torch.Tensor] = {}
    recipe = replace(RECIPE, steps=5)
    module = new_module()

    def keep(step: int, averaged: torch.nn.Module) -> None:
        seen[step] = next(averaged.parameters()).detach().clone()

    final = fit(module, loss_of, recipe, tmp_path, on_checkpoint=keep)
    assert torch.equal(seen[5], next(final.parameters()))


def test_what_follows_a_checkpoint_is_done_once_and_again_only_where_it_was_cut_off(tmp_path: Path) -> None:
    told: list[tuple[int, torch.Tensor]] = []

    def keep(step: int, averaged: torch.nn.Module) -> None:
        told.append((step, next(averaged.parameters()).detach().clone()))

    def dies(step: int, averaged: torch.nn.Module) -> None:
        keep(step, averaged)
        if step == 10:
            raise Killed

    with pytest.raises(Killed):
        fit(new_module(), loss_of, RECIPE, tmp_path, on_checkpoint=dies)
    fit(new_module(), loss_of, RECIPE, tmp_path, on_checkpoint=keep)
    assert [step for step, _ in told] == [5, 10, 10, 12]
    assert torch.equal(told[1][1], told[2][1])
    fit(new_module(), loss_of, RECIPE, tmp_path, on_checkpoint=keep)  # finished: nothing is done again
    assert len(told) == 4


def test_random_numbers_depend_on_seed_and_step_alone() -> None:
    assert BatchRng.of(1, 7).numpy.random() == BatchRng.of(1, 7).numpy.random()
    assert BatchRng.of(1, 7).numpy.random() != BatchRng.of(1, 8).numpy.random()
    first, second = (torch.randn(3, generator=BatchRng.of(1, 7).torch) for _ in range(2))
    assert torch.equal(first, second)
