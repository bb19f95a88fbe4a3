"""Prompt text to token ids, by the bundle's tokenizer.json and the manifest's rule.

The rule is CLIP's: begin id, at most max_length - 2 ids of the prompt, end id, then the pad id up to max_length. It is
applied here, so what truncation or padding tokenizer.json itself asks for does not matter.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from latentrelay.runtime.errors import BundleTamperedError, MissingExtraError, RequestError
from latentrelay.runtime.manifest import TokenizerSpec
from numpy.typing import NDArray


class PromptTokenizer:
    """Tokenizer of one bundle. Raises BundleTamperedError if the file is not a tokenizer."""

    def __init__(self, path: Path, spec: TokenizerSpec) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise MissingExtraError("tokenizers", None, purpose="Reading a prompt") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BundleTamperedError(f"{spec.path} is not a tokenizer: {error}", path=spec.path) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._spec = spec

    def ids(self, text: str) -> NDArray[np.int64]:
        """Ids (1, max_length) int64. Longer prompts are cut; `is_cut` tells. RequestError if text is no text."""
        body = self._encode(text)[: self._spec.max_length - 2]
        ids = [self._spec.bos_id, *body, self._spec.eos_id]
        ids += [self._spec.pad_id] * (self._spec.max_length - len(ids))
        return np.array([ids], dtype=np.int64)

    def is_cut(self, text: str) -> bool:
        """Whether the prompt is longer than the text encoder's context."""
        return len(self._encode(text)) > self._spec.max_length - 2

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (AttributeError, TypeError, UnicodeEncodeError) as error:
            raise RequestError("the prompt is not valid Unicode text", got=repr(text), expected="a str") from error
        return ids
