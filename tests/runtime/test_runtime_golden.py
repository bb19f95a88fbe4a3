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


LEVELS_DIGEST = "sha256:361bb05ff4153a076c384cff7bf5ed0b41f012b8e09adc8c14d2287a95194114"
NORMAL = [0.22838561, 0.50205028, 0.61533606, 0.10047016, 0.37077126, 0.45863947, 0.27863747, 0.2295552]
NORMAL += [0.54760182, 0.30436191, 0.2005133, 0.31689855, 0.48372528, 0.5266788, 0.41621459, 0.53760868]
HOT = [-0.05681253, 0.21272877, 0.32430786, -0.18280077, 0.09416119, 0.17769969, 0.00656728, -0.04009645]
HOT += [0.26197231, 0.04585869, -0.04640866, 0.05699724, 0.20357105, 0.23729956, 0.15055946, 0.24588196]


def test_the_bundle_with_levels_makes_the_same_latents_at_each_and_has_its_preview() -> None:
    bundle = Bundle.open(GOLDEN / "bundle-1.4")
    assert bundle.digest == LEVELS_DIGEST
    assert bundle.manifest.schema_version == "1.4"
    preview = bundle.manifest.preview
    assert preview is not None
    assert (preview.factors[0], preview.bias) == ((0.75, 0.125, 0.0, 0.0), (0.625, 0.625, 0.5))
    with Session(bundle) as session:
        assert session.selftest().ok
        start, embeds = session.initial_latents(7), session.encode("a red circle", "blue")
        for level, predicted, latents in (("normal", 2, NORMAL), ("hot", 3, HOT)):
            events = list(session.run_steps(start, None, 0, embeds, 2.0, level=level))
            assert [event.kind for event in events].count("predicted") == predicted
            np.testing.assert_allclose(events[-1].latents.ravel(), latents, atol=1e-5)
        assert session.mask(2, level="hot") is not None
        assert session.mask(2) is None


def test_older_bundles_have_normal_masks_alone_and_no_preview() -> None:
    with Session(Bundle.open(GOLDEN / "bundle-1.3")) as session:
        assert session.manifest.preview is None
        assert session.mask(0, level="hot") == session.mask(0)
        assert session.step_graphs(2, level="hot") == ("step_full",)
