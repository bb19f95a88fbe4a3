"""Handoff schema 1.0 and 1.1: the same fields, two ways to write them, and what a newer minor version brings."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from latentrelay.runtime import generate
from latentrelay.runtime.errors import HandoffFormatError
from latentrelay.runtime.handoff import WIRE_VERSIONS, Handoff, HandoffMeta
from latentrelay.runtime.timestep_runs import MAX_TIMESTEPS, from_runs, to_runs

GOLDEN = Path(__file__).parents[1] / "golden"
DIGEST_1_1 = "c39097862aab56a57923353880dfbda5daa8714e67d8547e92ab1f6de08e61fe"


def metadata(blob: bytes) -> dict[str, Any]:
    length = int.from_bytes(blob[:8], "little")
    document: dict[str, Any] = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["latentrelay"])
    return document


def with_metadata(blob: bytes, document: dict[str, Any]) -> bytes:
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    header["__metadata__"]["latentrelay"] = json.dumps(document)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + blob[8 + length :]


@pytest.mark.parametrize("version", WIRE_VERSIONS)
def test_both_versions_carry_the_same(kit: SimpleNamespace, version: str) -> None:
    changes = {"additional_metadata": {"note": [1]}, "shift_factor": 0.0, "guidance": 7.25, "seed": 2**64 - 1}
    handoff = kit.make_handoff("float16", schema_version=version, **changes)
    again = Handoff.from_bytes(handoff.to_bytes())
    assert again.meta == handoff.meta
    assert again.to_bytes() == handoff.to_bytes()
    plain = dataclasses.replace(again.meta, schema_version="")
    assert plain == dataclasses.replace(kit.make_meta(dtype="float16", **changes), schema_version="")


def test_1_1_leaves_out_what_is_at_its_default_and_shortens_the_rest(kit: SimpleNamespace) -> None:
    old = metadata(kit.make_handoff(schema_version="1.0", shift_factor=0.0).to_bytes())
    new = metadata(kit.make_handoff(schema_version="1.1", shift_factor=0.0).to_bytes())
    left_out = {"additional_metadata", "generator", "latent_space", "shift_factor"}
    assert set(old) - set(new) == left_out
    assert set(new) <= set(old)
    long = {"num_steps": 6, "timesteps": (999.0, 800.0, 600.0, 400.0, 200.0, 0.0)}
    assert metadata(kit.make_handoff(schema_version="1.0", **long).to_bytes())["timesteps"] == list(long["timesteps"])
    assert metadata(kit.make_handoff(schema_version="1.1", **long).to_bytes())["timesteps"] == [999, [800, -200, 5]]
    blob = kit.make_handoff(schema_version="1.1", guidance=2.0).to_bytes()
    assert b'\\"guidance\\":2,' in blob
    assert b'\\"init_noise_sigma\\":1,' in blob
    kept = metadata(kit.make_handoff(schema_version="1.1", latent_space="taesd", shift_factor=0.5).to_bytes())
    assert (kept["latent_space"], kept["shift_factor"]) == ("taesd", 0.5)


@pytest.mark.parametrize("num_steps", [4, 20, 25, 28, 30, 50])
def test_a_latent_of_sd_1_stays_below_the_bar(num_steps: int) -> None:
    """33,792 bytes for 4x64x64 float16 without solver memory, 67,584 with it: 1 KiB and 2 KiB beside the arrays."""
    timesteps = tuple(float(each) for each in np.linspace(0, 999, num_steps + 1).round()[::-1][:-1])
    meta = HandoffMeta(
        model_family="sd1",
        model_digest="sha256:" + "a" * 64,
        scheduler_class="DPMSolverMultistepScheduler",
        scheduler_digest="sha256:" + "b" * 64,
        num_steps=num_steps,
        timesteps=timesteps,
        next_step=num_steps // 2,
        prediction_type="epsilon",
        guidance=7.5,
        scaling_factor=0.18215,
        shift_factor=0.0,
        seed=2**63 + 1,
        init_noise_sigma=1.0,
        height=512,
        width=512,
        dtype="float16",
        prompt_salt="c" * 32,
        prompt_digest="d" * 64,
        producer={"name": "latentrelay.cloud", "version": "10.10.10"},
        schema_version="1.1",
    )
    latents = np.zeros((1, 4, 64, 64), np.float16)
    assert len(Handoff(latents, None, meta).to_bytes()) <= 33_792
    assert len(Handoff(latents, latents, meta).to_bytes()) <= 67_584


TIMESTEPS: list[tuple[list[float], list[Any]]] = [
    ([], []),
    ([5.0], [5]),
    ([999.0, 666.0, 333.0, 0.0], [[999, -333, 4]]),
    ([99.0, 66.0, 33.0], [99, 66, 33]),
    ([999.0, 799.0, 599.0, 399.0, 199.0], [[999, -200, 5]]),
    ([10, 5], [10, 5]),
    ([3, 2, 1], [3, 2, 1]),  # a run would be longer
    ([999, 959, 919, 879, 10, 9], [[999, -40, 4], 10, 9]),
    ([0.5, 1.0, 1.5, 2.0], [0.5, 1, 1.5, 2]),  # not whole: no run, so that reading is exact
    ([1000, 1000, 1000, 1000, 7.5], [[1000, 0, 4], 7.5]),
    ([999, 749, 500, 250], [999, 749, 500, 250]),
]


@pytest.mark.parametrize(("timesteps", "items"), TIMESTEPS)
def test_timesteps_are_written_the_shorter_way(timesteps: list[float], items: list[Any]) -> None:
    assert to_runs(timesteps) == items
    assert from_runs(items) == timesteps


def test_any_list_of_timesteps_comes_back() -> None:
    dice = np.random.default_rng(0)
    for size in [*range(1, 30), 200, 1000]:
        numbers = [float(each) for each in np.cumsum(dice.integers(1, 4, size)) * dice.choice([1, 33])]
        assert from_runs(to_runs(numbers)) == numbers
        assert len(json.dumps(to_runs(numbers))) <= len(json.dumps([int(each) for each in numbers]))


BAD_ITEMS: list[Any] = [
    "999",
    [[999, -1]],
    [[999, -1, 2, 3]],
    [[999, -1, 0]],
    [[999, -1, -5]],
    [[999, -1, 2.0]],
    [[999, -1, True]],
    [[999, None, 2]],
    [[999, -1, MAX_TIMESTEPS + 1]],
    [[0, 1, MAX_TIMESTEPS], 5],
    [[0, 1, 2**62]],
    [True],
    [None],
    [1e300],
    [[[1]]],
    {"a": 1},
]


@pytest.mark.parametrize("items", BAD_ITEMS, ids=[repr(item)[:30] for item in BAD_ITEMS])
def test_other_items_are_refused_before_they_take_memory(kit: SimpleNamespace, items: Any) -> None:
    with pytest.raises(ValueError, match="timesteps"):
        from_runs(items)
    blob = kit.make_handoff(schema_version="1.1").to_bytes()
    with pytest.raises(HandoffFormatError):
        Handoff.from_bytes(with_metadata(blob, {**metadata(blob), "timesteps": items}))


def test_runs_are_no_timesteps_of_1_0(kit: SimpleNamespace) -> None:
    blob = kit.make_handoff(schema_version="1.0").to_bytes()
    with pytest.raises(HandoffFormatError, match="timesteps"):
        Handoff.from_bytes(with_metadata(blob, {**metadata(blob), "timesteps": [[999, -1, 4]]}))


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_unknown_keys_belong_to_newer_versions_only(kit: SimpleNamespace, version: str) -> None:
    blob = kit.make_handoff(schema_version=version).to_bytes()
    with pytest.raises(HandoffFormatError, match="unknown key colour"):
        Handoff.from_bytes(with_metadata(blob, {**metadata(blob), "colour": "red"}))


def test_a_newer_versions_keys_survive_the_round_trip(kit: SimpleNamespace) -> None:
    blob = kit.make_handoff("float16", schema_version="1.1").to_bytes()
    newer = {
        **metadata(blob),
        "schema_version": "1.9",
        "colour": {"deep": [1.5, None]},
        "additional_metadata": {"x": 1},
    }
    handoff = Handoff.from_bytes(with_metadata(blob, newer))
    assert handoff.meta.extra == {"colour": {"deep": [1.5, None]}}
    assert metadata(handoff.to_bytes()) == newer


def test_the_golden_handoff_of_1_1_parses_fits_and_finishes() -> None:
    blob = (GOLDEN / "handoff-1.1.safetensors").read_bytes()
    handoff = Handoff.from_bytes(blob)
    old = Handoff.from_bytes((GOLDEN / "handoff-1.0.safetensors").read_bytes())
    assert handoff.digest() == DIGEST_1_1
    assert handoff.to_bytes() == blob
    assert handoff.meta == dataclasses.replace(old.meta, schema_version="1.1")
    np.testing.assert_array_equal(handoff.latents, old.latents)
    made, same = (
        generate(GOLDEN / "bundle-1.0", "a red circle", negative_prompt="blue", handoff=each) for each in (handoff, old)
    )
    np.testing.assert_array_equal(made.latents, same.latents)
