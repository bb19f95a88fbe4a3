"""The text encoder for a batch of runs: each text once, together, and kept by content.

In: runs without text states. Out: their `embeds` (branches, T, D) are filled in. Texts that are not known are encoded
in one call; a deterministic run's are encoded one by one, because the encoder too rounds otherwise in a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from latentrelay.cloud.content_cache import ContentCache, content_key
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.run_state import RunState
from latentrelay.cloud.ticket import BatchObserver


class TextStates:
    """The encoder's results by digest of their text. One thread at a time."""

    def __init__(self, engine: Engine, max_bytes: int, observer: BatchObserver) -> None:
        """max_bytes: of states that are kept; 0 keeps none."""
        self._engine, self._observer = engine, observer
        self._kept: ContentCache[torch.Tensor] = ContentCache(max_bytes)

    def fill(self, states: Sequence[RunState]) -> list[Exception | None]:
        """Give every run its text states; returns each one's error, or None."""
        shared = [each for each in states if not each.request.deterministic]
        found: dict[str, torch.Tensor] = {}
        try:
            found = self._encoded(shared)
        except Exception:
            found = {}  # each is tried alone below, so that only those fail that fail by themselves
        return [self._fill(each, {} if each.request.deterministic else found) for each in states]

    def _fill(self, state: RunState, found: dict[str, torch.Tensor]) -> Exception | None:
        try:
            texts = self._engine.texts(state.request)
            alone = {text: found[text] if text in found else self._alone(text) for text in dict.fromkeys(texts)}
            state.embeds = torch.cat([alone[text] for text in texts])
        except Exception as error:
            return error
        return None

    def _encoded(self, runs: Iterable[RunState]) -> dict[str, torch.Tensor]:
        """(1, T, D) for every text of these runs: kept ones, and the others from one call."""
        texts = list(dict.fromkeys(text for each in runs for text in self._engine.texts(each.request)))
        found: dict[str, torch.Tensor] = {}
        for text in texts:
            kept = self._look(("batched", text))
            if kept is not None:
                found[text] = kept
        missing = [text for text in texts if text not in found]
        if missing:
            for text, states in zip(missing, self._engine.encode(missing), strict=True):
                found[text] = self._keep(("batched", text), states[None].clone())
        return found

    def _alone(self, text: str) -> torch.Tensor:
        kept = self._look(("alone", text))
        return kept if kept is not None else self._keep(("alone", text), self._engine.encode([text]))

    def _look(self, key: tuple[str, str]) -> torch.Tensor | None:
        if not self._kept.max_bytes:
            return None
        kept = self._kept.get(content_key(key))
        self._observer.cache("text", kept is not None)
        return kept

    def _keep(self, key: tuple[str, str], states: torch.Tensor) -> torch.Tensor:
        if self._kept.max_bytes:
            self._kept.put(content_key(key), states, states.numel() * states.element_size())
        return states
