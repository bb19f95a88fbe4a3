"""What the tables of a quantised bundle are fitted and judged on: prompts, a seed, and the splits that are recorded.

A user's own prompts are best; without any, `default_calibration` puts plain ones together from lists of words, the same
every time, so that no data has to be fetched.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from latentrelay.runtime.errors import RequestError

FIT, HELD_OUT = 32, 12
_WHO = ("an old man", "a young woman", "a fox", "a child with a kite", "two dogs", "a fisherman", "a horse", "a robot")
_WHAT = ("a lighthouse", "a bowl of fruit", "a wooden chair", "a red car", "a glass vase", "a ship", "a stone bridge")
_WHERE = ("in a forest", "on a beach", "in a city street", "in front of mountains", "on a table", "under a night sky")
_HOW = ("a photograph", "an oil painting", "a watercolour", "a pencil drawing", "a poster", "a studio picture")
_LIGHT = ("in soft morning light", "at noon", "at sunset", "in fog", "in the rain", "under coloured lamps")


@dataclass(frozen=True)
class Calibration:
    """`prompts` are fitted on, `held_out` decide what ships; prompt i of both together starts from `seed` + i."""

    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    seed: int = 20_261_123

    def __post_init__(self) -> None:
        """Raises RequestError without prompts of both kinds, or where one is in both."""
        if not self.prompts or not self.held_out:
            got = f"{len(self.prompts)} to fit on, {len(self.held_out)} held out"
            raise RequestError("calibration needs prompts of both kinds", got=got, expected="1 or more of each")
        both = sorted(set(self.prompts) & set(self.held_out))
        if both:
            raise RequestError(
                "a held-out prompt is also fitted on", got=repr(both[0]), expected="different ones", do="Remove it."
            )

    def seeds(self, held_out: bool) -> tuple[int, ...]:
        """A seed a prompt; fitted and held-out ones share none."""
        first = self.seed + (len(self.prompts) if held_out else 0)
        return tuple(range(first, first + len(self.held_out if held_out else self.prompts)))


def default_calibration(count: int = FIT, held_out: int = HELD_OUT) -> Calibration:
    """`count` plain prompts to fit on and `held_out` others, put together from lists of words."""
    drawn = random.Random(0)
    prompts: dict[str, None] = {}
    while len(prompts) < count + held_out:
        who = drawn.choice((f"{drawn.choice(_WHO)} beside {drawn.choice(_WHAT)}", *_WHO, *_WHAT))
        prompts[f"{drawn.choice(_HOW)} of {who} {drawn.choice(_WHERE)}, {drawn.choice(_LIGHT)}"] = None
    return Calibration(tuple(prompts)[:count], tuple(prompts)[count:])


def split_prompts(prompts: tuple[str, ...]) -> Calibration:
    """A user's own prompts: every fourth is held out, those given twice are taken once; RequestError below 4."""
    once = tuple(dict.fromkeys(prompts))
    if len(once) < 4:
        raise RequestError("too few prompts to calibrate on", got=len(once), expected="4 or more different ones")
    held_out = once[3::4]
    return Calibration(tuple(prompt for prompt in once if prompt not in held_out), held_out)
