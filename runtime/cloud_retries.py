"""When to ask a cloud again: jittered, growing waits, counted from the last time that anything moved. No I/O."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RetryPolicy:
    """Waits grow from up to `first_wait_s` to up to `max_wait_s` with full jitter: each is drawn evenly between 0 and
    its ceiling; Retry-After is a floor. Reaching no cloud `connects` times in a row is enough while none can have a job
    of ours. Job or not, finding nobody at all for `unreachable_s` seconds in a row is: shorter, and a device does not
    wait long for a cloud that is dead; longer, and a cloud that is being restarted, which its jobs survive, does not
    cost the steps that it has made. Otherwise the deadline alone ends it. `wait_s` is how long the cloud is asked to
    hold an answer back, `silence_s` how long nothing at all may come beyond that before a connection counts as dead
    (the cloud's event streams are never silent for longer than 5 s)."""

    first_wait_s: float = 0.1
    max_wait_s: float = 2.0
    connects: int = 3
    wait_s: float = 10.0
    silence_s: float = 15.0
    unreachable_s: float = 5.0

    def wait(self, failures: int, retry_after_s: float | None = None) -> float:
        """Seconds to wait after so many failures in a row (from 1)."""
        import tenacity  # on the first failure only: importing it takes 40 ms

        state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
        state.attempt_number = failures
        wait = tenacity.wait_random_exponential(multiplier=self.first_wait_s, max=self.max_wait_s)(state)
        return wait if retry_after_s is None else retry_after_s + wait / 4


DEFAULT_RETRIES = RetryPolicy()
