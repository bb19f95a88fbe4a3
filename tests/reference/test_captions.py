"""Captions say what the scene holds, and the tokenizer knows every word of the grammar."""

from __future__ import annotations

from pathlib import Path

import pytest
from latentrelay.reference.captions import (
    INVERSE,
    MAX_LENGTH,
    learn_merges,
    sample_captions,
    vocabulary_words,
    write_tokenizer,
)
from transformers import CLIPTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_captions_name_what_is_in_the_scene() -> None:
    for scene, caption in sample_captions("train", 400, 0):
        relation, objects = scene.relation, scene.objects
        if caption.relation != relation:
            assert relation is not None
            assert caption.relation == INVERSE[relation]
            objects = objects[::-1]
        for said, item in zip(caption.objects, objects, strict=True):
            assert (
                said.named().items()
                <= {
                    "shape": item.shape,
                    "colour": item.colour,
                    "size": item.size,
                    "texture": item.texture,
                }.items()
            )
        assert caption.background in (None, scene.background)


def test_captions_are_seeded_and_varied() -> None:
    first = [caption.text for _, caption in sample_captions("report", 300, 4)]
    assert first == [caption.text for _, caption in sample_captions("report", 300, 4)]
    assert len(set(first)) > 280


def test_every_word_is_one_token_and_every_caption_fits(tokenizer: CLIPTokenizer) -> None:
    for word in vocabulary_words():
        assert len(tokenizer(word).input_ids) == 3, word
    lengths = [len(tokenizer(caption.text).input_ids) for _, caption in sample_captions("train", 3000, 1)]
    assert max(lengths) < MAX_LENGTH


def test_other_text_survives_letter_by_letter(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("a zebra, naïve 日本").input_ids
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == "azebra,naïve日本"


def test_merges_are_learnt_from_the_words_alone() -> None:
    assert learn_merges(["ab", "abc"]) == [("a", "b"), ("a", "b</w>"), ("ab", "c</w>")]
