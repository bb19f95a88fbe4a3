"""Artefacts of older schemas that every later version must read and run; tests/golden/README.md says more."""

from pathlib import Path

import numpy as np
from latentrelay.runtime import Bundle, Handoff, Session, generate, initial_noise

GOLDEN = Path(__file__).parents[1] / "golden"
BUNDLE_DIGEST = "sha256:e3b7ea0bca2f5ffbca05db008e1c318b395d2b204e60dd260b291b7b3e2b1da8"
HANDOFF_DIGEST = "19e5fcdf14675b78a33b7b69884d9df8b3fd4be4d1ce07a50983751b9974645b"
LATENTS = [-0.03241758, 0.27205765, 0.39809793, -0.17473441, 0.13541561, 0.2445285, 0.02100583, -0.03994347]
LATENTS += [0.39286757, 0.05496022, -0.08930553, 0.07237615, 0.33763438, 0.40445566, 0.23261014, 0.42145882]


def test_the_bundle_opens_and_passes_its_selftest() -> None:
    bundle = Bundle.open(GOLDEN / "bundle-1.0")
    assert bundle.digest == BUNDLE_DIGEST
    assert bundle.manifest.schema_version == "1.0"
    with Session(bundle) as session:
        assert session.selftest().ok


def test_the_seed_means_the_same_noise() -> None:
    np.testing.assert_allclose(initial_noise(7, (1, 4, 2, 2))[0, 0, 0], [-0.82013452, 0.39563116], atol=2e-6)


def test_the_bundle_makes_the_same_latents() -> None:
    result = generate(GOLDEN / "bundle-1.0", "a red circle", negative_prompt="blue", seed=7)
    np.testing.assert_allclose(result.latents.ravel(), LATENTS, atol=1e-5)


def test_the_handoff_parses_fits_and_finishes() -> None:
    blob = (GOLDEN / "handoff-1.0.safetensors").read_bytes()
    handoff = Handoff.from_bytes(blob)
    assert handoff.digest() == HANDOFF_DIGEST
    assert handoff.to_bytes() == blob
    assert (handoff.meta.next_step, handoff.meta.seed, handoff.meta.guidance) == (2, 7, 2.0)
    assert handoff.meta.additional_metadata == {"note": "golden"}
    result = generate(GOLDEN / "bundle-1.0", "a red circle", negative_prompt="blue", handoff=handoff)
    np.testing.assert_allclose(result.latents.ravel(), LATENTS, atol=2e-3)  # float16 on the wire


PREDICTING_DIGEST = "sha256:07d7b2ed2707bd2e8df358f7b45a5ff270122b5c14f79cf3fcf17c6189fa16ca"
PREDICTED = [-0.07545317, 0.23049423, 0.35715535, -0.21844482, 0.09853852, 0.20823261, -0.01664354, -0.07780952]
PREDICTED += [0.36151466, 0.02296014, -0.12170168, 0.04031392, 0.3096388, 0.37608802, 0.20509459, 0.39302737]


def test_the_bundle_with_predicted_steps_makes_the_same_latents_in_the_same_way() -> None:
    bundle = Bundle.open(GOLDEN / "bundle-1.3")
    assert bundle.digest == PREDICTING_DIGEST
    assert bundle.manifest.schema_version == "1.3"
    with Session(bundle) as session:
        assert session.selftest().ok
        result = generate(session, "a red circle", negative_prompt="blue", seed=7)
        assert dict(result.kinds) == {"full": 2, "predicted": 1, "recomputed": 1}
        np.testing.assert_allclose(result.latents.ravel(), PREDICTED, atol=2e-3)  # float16 ladders
        plain = generate(session, "a red circle", negative_prompt="blue", seed=7, predict=False)
    np.testing.assert_allclose(plain.latents.ravel(), LATENTS, atol=1e-5)
