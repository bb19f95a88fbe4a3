"""Digests and sampler rules."""

import hashlib
from pathlib import Path

import diffusers
import numpy as np
import pytest
from latentrelay.runtime.digest import canonical_json, json_digest, sha256_file, weights_digest
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.samplers import SAMPLERS, sampler_for, sampler_reason, sampler_rule, scheduler_digest


def test_canonical_json_is_one_byte_form() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "ü"}) == '{"a":"ü","b":[1,2.5]}'.encode()
    assert json_digest({"a": 1}) == "sha256:" + hashlib.sha256(b'{"a":1}').hexdigest()
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()


def test_weights_digest_by_hand() -> None:
    array = np.array([[1.0, 2.0]], np.float32)
    by_hand = hashlib.sha256(b"unet.w\0<f4\0" + b"1,2\0" + array.tobytes()).hexdigest()
    assert weights_digest([("unet.w", array)]) == "sha256:" + by_hand


def test_weights_digest_ignores_order_and_storage_but_not_values_names_or_shapes() -> None:
    a, b = np.array([1.5, -2.0], np.float32), np.arange(3)
    reference = weights_digest([("a", a), ("b", b)])
    assert weights_digest([("b", b.astype(np.int32)), ("a", a.astype(np.float16))]) == reference
    assert weights_digest([("a", a), ("b", b), ("te.text_model.embeddings.position_ids", b)]) == reference
    others = [[("a", a + 1e-6), ("b", b)], [("a", a.reshape(1, 2)), ("b", b)], [("A", a), ("b", b)], [("a", a)]]
    assert all(weights_digest(other) != reference for other in others)
    with pytest.raises(ValueError, match="two arrays"):
        weights_digest([("a", a), ("a", a)])
    with pytest.raises(ValueError, match="complex64"):
        weights_digest([("a", a.astype(np.complex64))])


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_a_diffusers_scheduler_that_takes_its_overrides(name: str) -> None:
    rule = SAMPLERS[name]
    scheduler = getattr(diffusers, rule.scheduler_class).from_config({}, **rule.overrides)
    assert {key: scheduler.config[key] for key in rule.overrides} == dict(rule.overrides)


def test_sampler_for_says_when_it_is_not_the_sources_own() -> None:
    assert sampler_for("DDIMScheduler") == "ddim"
    assert sampler_for("PNDMScheduler") == sampler_for("DPMSolverMultistepScheduler") == "dpmsolver++"
    assert sampler_reason("DDIMScheduler") is None
    assert "PNDMScheduler" in (sampler_reason("PNDMScheduler") or "")
    with pytest.raises(RequestError, match=r"dpmsolver\+\+ \| ddim"):
        sampler_rule("euler")


def test_scheduler_digest_counts_what_counts() -> None:
    config = {"beta_start": 0.1, "trained_betas": np.array([0.5, 0.25]), "_diffusers_version": "1", "x": None}
    reference = scheduler_digest("A", config)
    assert scheduler_digest("A", {"beta_start": 0.1, "trained_betas": [0.5, 0.25], "_other": 3}) == reference
    assert scheduler_digest("B", config) != reference
    assert scheduler_digest("A", {**config, "beta_start": 0.2}) != reference
    clipped = scheduler_digest("A", {**config, "lambda_min_clipped": -float("inf")})
    assert clipped not in (reference, scheduler_digest("A", {**config, "lambda_min_clipped": float("inf")}))
