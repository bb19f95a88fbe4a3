"""tokenizer.json against CLIPTokenizer on odd prompts: the ids must be equal, all of them."""

import random
from pathlib import Path
from typing import Any

import pytest
from latentrelay.export.tokenizer_file import tokenizer_from_clip, write_tokenizer
from tokenizers import Tokenizer

POOLS = [
    "the cat red ing on ",
    "ABC XYZ",
    "'s 't 're 'LL don't I'M",
    "0123456789½²",
    '!?.,;:-_()[]{}<>|@#$%^&*~`"\\/',
    "éüñçßøåÉÜÑ",
    "日本語中文한국어ひらカタ",
    "😀👍🏽🇩🇪❤️",
    "\t\n\r\x0b\x0c\u00a0\u2003\u200b\u200d\ufeff\x00\x07\ufffd\x85\xad\u2028",
    "e\u0301a\u0308",
    "ΑΣΩσς ΟΔΟΣ",
    "İIıi",
    "<|endoftext|><|startoftext|>",
    "ǅǆﬁﬀ",
    "עבריתعربي",
    "नमस्ते",
]


def odd_prompts(count: int) -> list[str]:
    generator = random.Random(0)
    prompts = ["", " ", "a" * 500, "a red cat " * 60]
    while len(prompts) < count:
        parts = []
        for _ in range(generator.randint(0, 12)):
            pool = generator.choice(POOLS)
            whole = generator.random() < 0.4
            parts.append(pool if whole else "".join(generator.choice(pool) for _ in range(generator.randint(1, 6))))
            parts.append(generator.choice(["", " "]))
        prompts.append("".join(parts))
    return prompts


def slow_ids(tokenizer: Any, prompt: str, length: int) -> list[int]:
    ids: list[int] = tokenizer(prompt, padding="max_length", truncation=True, max_length=length).input_ids
    return ids


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_ids_equal_cliptokenizers_on_a_thousand_odd_prompts(tiny: Any, tmp_path: Path, pad_token: str) -> None:
    slow = tiny.make_tokenizer(tmp_path, max_length=77, pad_token=pad_token)
    fast = tokenizer_from_clip(slow)
    different = [p for p in odd_prompts(1000) if fast.encode(p).ids != slow_ids(slow, p, 77)]
    assert different == []


def test_the_written_file_carries_length_padding_and_ids(tiny: Any, tmp_path: Path) -> None:
    slow = tiny.make_tokenizer(tmp_path / "made", max_length=16, pad_token="!")
    spec = write_tokenizer(slow, tmp_path / "tokenizer")
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    ids = fast.encode("a red cat").ids
    assert ids == slow_ids(slow, "a red cat", 16)
    assert (len(ids), ids[0], ids[-1]) == (spec.max_length, spec.bos_id, spec.pad_id)
    assert spec.eos_id in ids
    assert spec.pad_id != spec.eos_id
    names = {path.name for path in (tmp_path / "tokenizer").iterdir()}
    assert names == {
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
    }
