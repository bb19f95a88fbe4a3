"""One shared call of the network that no single request can spoil.

In: the states of R runs of one latent size. Out: for each its guided prediction (1, C, h, w), or the error that it
alone ends with. A call that runs out of memory is made again in two halves, once; one that fails otherwise is made
again for each run alone, so that only those fail that fail by themselves.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence

import torch
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.errors import MemoryRefusedError, RunFailedError, ServiceError
from latentrelay.cloud.run_state import RunState

Outcome = torch.Tensor | ServiceError
_log = logging.getLogger("latentrelay.cloud")


def shared_call(
    engine: Engine, states: Sequence[RunState], embeds: torch.Tensor | None = None
) -> tuple[list[Outcome], int]:
    """The outcome for each state, and how many requests fitted one call: all of them, unless memory ran out."""
    try:
        return _rows(engine.predict(states, embeds)), len(states)
    except Exception as error:
        if not out_of_memory(error):
            _log.error("a network call for %d requests failed: %s", len(states), where(error))
            return [_alone(engine, each) for each in states] if len(states) > 1 else [_failed()], len(states)
    # Outside the handler, so that the frames of the failed call, and the tensors they hold, are gone.
    _release(engine.device)
    _log.warning("a network call for %d requests ran out of memory", len(states))
    if len(states) == 1:
        return [_refused()], 1
    half = len(states) // 2
    return [*_half(engine, states[:half]), *_half(engine, states[half:])], half


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch's says that memory ran out, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def where(error: BaseException) -> str:
    """An exception's type and the line that raised it, without its text: that may quote what it was given."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}" if frames else type(error).__name__


def _rows(predicted: torch.Tensor) -> list[Outcome]:
    """(R, C, h, w) as R times (1, C, h, w)."""
    return [predicted[row : row + 1] for row in range(len(predicted))]


def _half(engine: Engine, states: Sequence[RunState]) -> list[Outcome]:
    try:
        return _rows(engine.predict(states))
    except Exception as error:
        if not out_of_memory(error):
            _log.error("a network call for %d requests failed: %s", len(states), where(error))
            return [_failed() for _ in states]
    _release(engine.device)
    return [_refused() for _ in states]


def _alone(engine: Engine, state: RunState) -> Outcome:
    try:
        return engine.predict([state])
    except Exception as error:
        _log.error("a network call for 1 request failed: %s", where(error))
        return _refused() if out_of_memory(error) else _failed()


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _failed() -> RunFailedError:
    return RunFailedError("the network could not be run", do="Ask again, or run all steps on the device.")


def _refused() -> MemoryRefusedError:
    return MemoryRefusedError("the memory for this run's activations is not there", retry_after_s=5)
