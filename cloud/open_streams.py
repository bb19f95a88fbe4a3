"""How many event streams and waits one caller holds open: each takes a connection for as long as its job.

In: a caller. Out: a place to hold, or 429 `too-many-streams` with Retry-After. Counted by name in this process, on the
one loop that answers requests; replicas count for themselves. Not a limit of jobs: rate_limits.py has that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from latentrelay.cloud.errors import ProblemError
from latentrelay.cloud.tokens import Caller, Tokens


class OpenStreams:
    """Places for streams: `each` of them for a name among several, `alone` for one that there is nobody beside."""

    def __init__(self, tokens: Tokens, *, each: int, alone: int) -> None:
        self._tokens, self._each, self._alone = tokens, each, alone
        self._held: Counter[str] = Counter()

    def take(self, caller: Caller) -> Callable[[], None]:
        """Take a place; what is returned gives it back, once. Raises ProblemError 429 `too-many-streams`."""
        most = self._each if len(self._tokens.names) > 1 else self._alone
        if self._held[caller.name] >= most:
            raise ProblemError(
                429,
                "too-many-streams",
                f"At most {most} event streams and waits at once for this token.",
                wanted=f"at most {most}",
                headers={"Retry-After": "1"},
            )
        self._held[caller.name] += 1
        held = [caller.name]

        def give_back() -> None:
            while held:
                name = held.pop()
                self._held[name] -= 1
                if not self._held[name]:
                    del self._held[name]

        return give_back

    @contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """A place for as long as the block runs."""
        give_back = self.take(caller)
        try:
            yield
        finally:
            give_back()
