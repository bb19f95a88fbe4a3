"""Scenes: the splits are disjoint, seeds hold, and the renderer draws what the scene says."""

from __future__ import annotations

import time

import numpy as np
import pytest
from latentrelay.reference.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_PAIRS,
    RELATIONS,
    RGB,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
    in_split,
    render,
    sample_scenes,
)

SPLITS = ("train", "calibrate", "gate", "report")


def one(
    shape: str, colour: str = "red", size: str = "large", texture: str = "plain", background: str = "studio"
) -> Scene:
    radius = 0.215 if size == "large" else 0.135
    item = SceneObject(shape, colour, size, texture, (0.5, 0.5), radius, (0.0, 0.0, 0.0))
    return Scene((item,), None, background, 1.0)


def test_there_is_enough_to_tell_apart() -> None:
    assert (len(SHAPES), len(COLOURS), len(SIZES), len(TEXTURES), len(RELATIONS), len(BACKGROUNDS)) == (
        6,
        8,
        2,
        3,
        4,
        4,
    )
    assert {shape for shape, _ in HELD_OUT_PAIRS} == set(SHAPES)


def test_splits_share_no_scene() -> None:
    keys = {split: {scene.key for scene in sample_scenes(split, 1500, 0)} for split in SPLITS}
    for i, first in enumerate(SPLITS):
        for second in SPLITS[i + 1 :]:
            assert not keys[first] & keys[second]


def test_held_out_pairs_are_nowhere_else() -> None:
    for split in SPLITS:
        assert not any(scene.held_out for scene in sample_scenes(split, 500, 1))
    assert all(scene.held_out for scene in sample_scenes("held_out", 100, 1))


def test_a_pair_said_the_other_way_round_is_the_same_scene() -> None:
    scene = next(scene for scene in sample_scenes("train", 50, 2) if scene.relation == "left of")
    turned = Scene(scene.objects[::-1], "right of", scene.background, scene.light)
    assert turned.key == scene.key
    assert in_split(turned, "train")


def test_a_seed_gives_the_same_scenes_and_a_larger_count_extends_them() -> None:
    assert sample_scenes("gate", 20, 5) == sample_scenes("gate", 40, 5)[:20]
    assert sample_scenes("gate", 20, 5) != sample_scenes("gate", 20, 6)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of train"):
        sample_scenes("test", 1, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "ring"])
@pytest.mark.parametrize("colour", ["red", "cyan", "blue"])
def test_the_middle_of_a_plain_object_has_its_colour(shape: str, colour: str) -> None:
    middle = render([one(shape, colour)])[0, 62:70, 62:70].mean((0, 1))
    assert np.argmin(np.abs(RGB - middle).sum(1)) == COLOURS.index(colour)


def test_a_ring_shows_its_background_in_the_middle() -> None:
    ring = render([one("ring")])[0, 64, 64]
    assert ring.max() - ring.min() < 0.05


def test_area_grows_with_size() -> None:
    def covered(size: str) -> int:
        picture = render([one("square", "red", size)])[0]
        return int((picture[..., 0] - picture[..., 2] > 0.25).sum())

    assert 2.2 < covered("large") / covered("small") < 2.9


def test_textures_darken_parts_of_the_object() -> None:
    spread = {texture: render([one("square", texture=texture)])[0, 48:80, 48:80, 0].std() for texture in TEXTURES}
    assert spread["striped"] > 2 * spread["plain"]
    assert spread["dotted"] > 2 * spread["plain"]


def test_edges_are_antialiased_and_sizes_agree() -> None:
    scene = one("circle")
    large, small = render([scene], 128)[0], render([scene], 64)[0]
    pooled = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(pooled - small).max() < 0.2
    assert np.abs(pooled - small).mean() < 0.004


def test_rendering_is_the_same_alone_and_in_company_and_fast() -> None:
    scenes = sample_scenes("train", 60, 3)
    together = render(scenes)
    assert together.dtype == np.float32
    assert together.min() >= 0
    assert together.max() <= 1
    np.testing.assert_array_equal(together[7], render([scenes[7]])[0])
    started = time.process_time()
    render(scenes)
    assert 60 * 60 / (time.process_time() - started) > 2000  # pictures a minute of processor time
