"""Captions for Scenes: a small grammar with paraphrases, and the tokenizer that knows its words.

In: a scene and a generator. Out: a `Caption`: the text and exactly which attributes it names, so that a judge scores
what was asked for and nothing else. The tokenizer is CLIP's byte-pair scheme over a vocabulary of its own; other text
still tokenizes, letter by letter.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from latentrelay.reference.scenes import Scene, SceneObject, Split, sample_scenes

MAX_LENGTH = 32
NEGATIVE = ""

SHAPE_WORDS = {
    "circle": ("circle", "circle", "ball"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "ring", "hoop"),
    "cross": ("cross", "cross", "plus"),
}
COLOUR_WORDS = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "white": ("white",),
}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
TEXTURE_WORDS = {"plain": ("plain", "smooth"), "striped": ("striped",), "dotted": ("dotted", "spotted")}
TEXTURE_PHRASES = {"striped": "with stripes", "dotted": "with dots"}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BACKGROUND_WORDS = {
    "studio": ("in a studio", "in a grey room"),
    "dusk": ("at dusk", "at nightfall"),
    "meadow": ("on a meadow", "in a field"),
    "sand": ("on sand", "in a desert"),
}
PREFIXES = ("", "", "a picture of", "a photo of")


@dataclass(frozen=True)
class NamedObject:
    """What a caption says of one object; None where it is silent."""

    shape: str
    colour: str
    size: str | None
    texture: str | None

    def named(self) -> dict[str, str]:
        """The attributes that the caption names."""
        pairs = {"shape": self.shape, "colour": self.colour, "size": self.size, "texture": self.texture}
        return {name: value for name, value in pairs.items() if value is not None}


@dataclass(frozen=True)
class Caption:
    """A text and what it asks for. `relation` says where `objects[0]` is seen from `objects[1]`."""

    text: str
    objects: tuple[NamedObject, ...]
    relation: str | None
    background: str | None


def caption_scene(scene: Scene, rng: np.random.Generator) -> Caption:
    """One of the scene's many captions. Shape and colour are always named; size, texture and background mostly."""
    objects, relation = scene.objects, scene.relation
    if relation is not None and rng.random() < 0.5:
        objects, relation = objects[::-1], INVERSE[relation]
    phrases, named = zip(*(_phrase(item, rng) for item in objects), strict=True)
    body = phrases[0] if relation is None else f"{phrases[0]} {_pick(RELATION_WORDS[relation], rng)} {phrases[1]}"
    prefix = _pick(PREFIXES, rng)
    text = f"{prefix} {body}".strip()
    background = scene.background if rng.random() < 0.85 else None
    if background is not None:
        place = _pick(BACKGROUND_WORDS[background], rng)
        text = f"{text} {place}" if rng.random() < 0.7 else f"{place}, {text}"
    return Caption(text=text, objects=tuple(named), relation=relation, background=background)


def sample_captions(split: Split, count: int, seed: int) -> list[tuple[Scene, Caption]]:
    """Scenes of a split with one caption each; the same arguments give the same captions everywhere."""
    scenes = sample_scenes(split, count, seed)
    return [
        (scene, caption_scene(scene, np.random.Generator(np.random.PCG64([97, seed, i]))))
        for i, scene in enumerate(scenes)
    ]


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _phrase(item: SceneObject, rng: np.random.Generator) -> tuple[str, NamedObject]:
    size = item.size if rng.random() < 0.75 else None
    texture = item.texture if rng.random() < 0.75 else None
    words = [_pick(SIZE_WORDS[size], rng)] if size else []
    after = ""
    if texture in TEXTURE_PHRASES and rng.random() < 0.35:
        after = " " + TEXTURE_PHRASES[texture]
    elif texture is not None:
        words.append(_pick(TEXTURE_WORDS[texture], rng))
    words += [_pick(COLOUR_WORDS[item.colour], rng), _pick(SHAPE_WORDS[item.shape], rng)]
    article = "an" if words[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(words)}{after}", NamedObject(item.shape, item.colour, size, texture)


# ---- tokenizer -----------------------------------------------------------------------------------------------------


def vocabulary_words() -> list[str]:
    """Every word the grammar can say, and a few that people type around them; sorted."""
    phrases: list[str] = [*PREFIXES, *TEXTURE_PHRASES.values(), "an and the of ,"]
    for table in (SHAPE_WORDS, COLOUR_WORDS, SIZE_WORDS, TEXTURE_WORDS, RELATION_WORDS, BACKGROUND_WORDS):
        for options in table.values():
            phrases += options
    return sorted({word for phrase in phrases for word in phrase.split()})


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order that GPT-2 and CLIP use."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [value for value in range(256) if value not in plain]
    return [chr(value) for value in plain] + [chr(256 + i) for i in range(len(others))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one token."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(piece) > 1 for piece in pieces):
        counts = Counter(pair for piece in pieces for pair in pairwise(piece))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge(piece, best) for piece in pieces]
    return merges


def _merge(piece: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for token in piece:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return out


def write_tokenizer(folder: Path) -> None:
    """`vocab.json`, `merges.txt` and the settings that `CLIPTokenizer.from_pretrained` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = byte_alphabet()
    merges = learn_merges(vocabulary_words())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    settings = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(index): {
                "content": token,
                "lstrip": False,
                "normalized": token == "<|startoftext|>",
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token, index in (("<|startoftext|>", start), ("<|endoftext|>", end))
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
