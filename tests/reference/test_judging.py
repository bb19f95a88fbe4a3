"""Scores by hand: who is matched to whom, what a missing object costs, and the distance between Gaussians."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from latentrelay.reference import judge as judging
from latentrelay.reference.captions import Caption, NamedObject
from latentrelay.reference.judge import Judge, Reading, Statistics, frechet_distance, score
from latentrelay.reference.scenes import sample_scenes

RED = {"shape": "circle", "colour": "red", "size": "large", "texture": "plain"}
BLUE = {"shape": "star", "colour": "blue", "size": "small", "texture": "dotted"}
PAIR = Caption(
    "",
    (NamedObject("circle", "red", "large", None), NamedObject("star", "blue", None, "dotted")),
    "left of",
    "sand",
)


def test_a_right_reading_is_exact_whichever_way_round_it_is_said() -> None:
    seen = Reading("horizontal", "sand", (RED, BLUE))
    turned = Caption("", PAIR.objects[::-1], "right of", "sand")
    for caption in (PAIR, turned):
        found = score(seen, caption)
        assert found.accuracy == 1
        assert found.exact


def test_the_relation_decides_the_match() -> None:
    """Mirrored: matched by the relation, so every attribute of both objects is wrong; relation and background right."""
    found = score(Reading("horizontal", "sand", (BLUE, RED)), PAIR)
    assert found.right["relation"] == [True]
    assert found.right["colour"] == [False, False]
    assert found.accuracy == pytest.approx(2 / 8)
    assert not found.exact


def test_without_the_relation_the_attributes_decide() -> None:
    found = score(Reading("vertical", "sand", (BLUE, RED)), PAIR)
    assert found.right["relation"] == [False]
    assert found.right["colour"] == [True, True]
    assert found.accuracy == pytest.approx(7 / 8)


def test_a_missing_object_is_wrong_in_everything() -> None:
    found = score(Reading("single", "studio", (BLUE,)), PAIR)
    assert found.right == {
        "shape": [False, True],
        "colour": [False, True],
        "size": [False],
        "texture": [True],
        "relation": [False],
        "background": [False],
    }
    nothing = score(Reading("none", "sand", ()), PAIR)
    assert nothing.accuracy == pytest.approx(1 / 8)


def test_an_extra_object_costs_the_exact_scene_alone() -> None:
    caption = Caption("", (NamedObject("star", "blue", None, None),), None, None)
    found = score(Reading("vertical", "sand", (RED, BLUE)), caption)
    assert found.accuracy == 1
    assert not found.exact


def test_summary_pools_attributes_and_averages_pictures() -> None:
    whole = score(Reading("horizontal", "sand", (RED, BLUE)), PAIR)
    half = score(Reading("none", "sand", ()), PAIR)
    found = judging.summarise([whole, half])
    assert found.attribute_accuracy == pytest.approx((1 + 1 / 8) / 2)
    assert found.exact_scene_rate == 0.5
    assert found.by_attribute["shape"] == 0.5
    assert found.by_attribute["background"] == 1


def test_frechet_distance_by_hand() -> None:
    eye = np.eye(3)
    near, far = Statistics(np.zeros(3), eye), Statistics(np.array([3.0, 0, 4]), 4 * eye)
    assert frechet_distance(near, near) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(near, far) == pytest.approx(25 + 3 * (2 - 1) ** 2)


def test_truth_leaves_empty_places_unscored() -> None:
    scenes = sample_scenes("report", 40, 3)
    wanted = judging.truth(scenes)
    singles = torch.tensor([len(scene.objects) == 1 for scene in scenes])
    assert (wanted["shape_1"][singles] == -100).all()
    assert (wanted["shape_1"][~singles] >= 0).all()


def test_judge_round_trips_through_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Judge().eval()
    judging.save_judge(judge, tmp_path)
    pictures = judging.pictures_of(sample_scenes("report", 3, 0))
    loaded = judging.load_judge(tmp_path)
    assert torch.allclose(judge.features(pictures), loaded.features(pictures), atol=2e-2)
    readings, features = judging.read(loaded, pictures)
    assert len(readings) == 3
    assert features.shape == (3, judging.FEATURES)


def test_blur_keeps_the_mean_and_takes_the_detail() -> None:
    pictures = judging.pictures_of(sample_scenes("report", 2, 1))
    soft = judging.blur(pictures, 1.5)
    assert soft.shape == pictures.shape
    assert torch.allclose(soft.mean(), pictures.mean(), atol=5e-3)

    def detail(values: torch.Tensor) -> float:
        return float((values[..., 1:] - values[..., :-1]).square().mean())

    assert detail(soft) < 0.5 * detail(pictures)


def test_wrong_picture_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"128, 128"):
        judging.read(Judge(), torch.zeros(1, 3, 64, 64))
