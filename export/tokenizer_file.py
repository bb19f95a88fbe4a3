"""tokenizer.json from a CLIPTokenizer, with equal ids, so that the device needs the `tokenizers` library alone.

transformers' own conversion follows CLIPTokenizer with ftfy installed; CLIPTokenizer without ftfy (what diffusers users
mostly have) cleans control characters and sets CJK characters apart first. The normaliser here does the latter.
Padding, truncation and the two special tokens are baked into the file: one `encode` gives the `max_length` ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentrelay.runtime.manifest import TokenizerSpec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TOKENIZER_PATH = "tokenizer/tokenizer.json"
_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"
# Python's lower() knows the final sigma, the tokenizers library's does not.
_FINAL_SIGMA = rf"(?<={_CASED}|{_CASED}['.:])Σ(?![\p{{Mn}}'.:]*{_CASED})"


def write_tokenizer(tokenizer: Any, folder: Path) -> TokenizerSpec:
    """Write vocab.json, merges.txt, the two configurations and tokenizer.json into `folder`; returns the ids."""
    tokenizer.save_pretrained(str(folder))
    fast = tokenizer_from_clip(tokenizer)
    (folder / "tokenizer.json").write_text(fast.to_str(pretty=False), encoding="utf-8")
    (folder / "added_tokens.json").unlink(missing_ok=True)
    return TokenizerSpec(
        path=TOKENIZER_PATH,
        max_length=int(tokenizer.model_max_length),
        bos_id=int(tokenizer.bos_token_id),
        eos_id=int(tokenizer.eos_token_id),
        pad_id=int(tokenizer.pad_token_id),
    )


def tokenizer_from_clip(tokenizer: Any) -> Tokenizer:
    """A `tokenizers.Tokenizer` whose `encode(text).ids` are CLIPTokenizer's for padding="max_length", truncation."""
    merges = [pair for pair, _ in sorted(_merge_ranks(tokenizer).items(), key=lambda item: item[1])]
    vocabulary = tokenizer.get_vocab() if not hasattr(tokenizer, "encoder") else tokenizer.encoder
    fast = Tokenizer(
        models.BPE(
            vocab=dict(vocabulary),
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=str(tokenizer.unk_token),
        )
    )
    fast.normalizer = normalizers.Sequence(
        [
            normalizers.BertNormalizer(
                clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
            ),
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Replace(Regex(_FINAL_SIGMA), "ς"),
            normalizers.Lowercase(),
        ]
    )
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    bos, eos, pad = (str(getattr(tokenizer, f"{name}_token")) for name in ("bos", "eos", "pad"))
    special = dict.fromkeys((bos, eos, pad))  # CLIPTokenizer splits at its pad token too: SD 2.x pads with "!"
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]
    )
    fast.enable_truncation(max_length=int(tokenizer.model_max_length))
    fast.enable_padding(length=int(tokenizer.model_max_length), pad_id=int(tokenizer.pad_token_id), pad_token=pad)
    return fast


def _merge_ranks(tokenizer: Any) -> dict[tuple[str, str], int]:
    if hasattr(tokenizer, "bpe_ranks"):
        return dict(tokenizer.bpe_ranks)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]
    return {(str(left), str(right)): rank for rank, (left, right) in enumerate(pairs)}
