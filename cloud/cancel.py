"""A flag that several parties share to end a run between two of its steps: the client's connection, a shutdown."""

from __future__ import annotations

import threading

from latentrelay.cloud.errors import RunCancelled


class Cancellation:
    """Set once from any thread; a run looks at it before every step. A parent cancels all its children."""

    def __init__(self, parent: Cancellation | None = None) -> None:
        self._event = threading.Event()
        self._parent = parent

    def cancel(self) -> None:
        """Ask the run to end before its next step."""
        self._event.set()

    @property
    def cancelled(self) -> bool:
        """Whether this flag or its parent is set."""
        return self._event.is_set() or (self._parent is not None and self._parent.cancelled)

    def check(self, step: int) -> None:
        """Raise RunCancelled if the flag is set; `step` is the step that will not be made."""
        if self.cancelled:
            raise RunCancelled(f"the run was cancelled before step {step}")
