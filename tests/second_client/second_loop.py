"""The noise and the loop over the step graphs, with the standard library: docs/embedding.md, sections 5 and 6.

Arrays are flat lists in C order; their shapes are those of the manifest's ports. A graph is called as
`graph(name, {role: list}) -> {role: list}`, scalars as lists of one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Values = Sequence[float]
Graph = Callable[[str, dict[str, Values]], Mapping[str, Values]]
LADDERS = ("feature_ladder", "probe_ladder")


def single(value: float) -> float:
    """Rounded to float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


class Noise:
    """torch's CPU generator of normal float32 values."""

    def __init__(self, seed: int) -> None:
        self._state = [seed & 0xFFFFFFFF]
        for index in range(1, 624):
            last = self._state[-1]
            self._state.append((1812433253 * (last ^ (last >> 30)) + index) & 0xFFFFFFFF)
        self._next = 624

    def _word(self) -> int:
        state = self._state
        if self._next == 624:
            for index in range(624):
                both = (state[index] & 0x80000000) | (state[(index + 1) % 624] & 0x7FFFFFFF)
                state[index] = state[(index + 397) % 624] ^ (both >> 1) ^ (0x9908B0DF if both & 1 else 0)
            self._next = 0
        word = state[self._next]
        self._next += 1
        word ^= word >> 11
        word ^= (word << 7) & 0x9D2C5680
        word ^= (word << 15) & 0xEFC60000
        return word ^ (word >> 18)

    def _uniform(self, count: int) -> list[float]:
        return [(self._word() & 0xFFFFFF) * 2.0**-24 for _ in range(count)]

    @staticmethod
    def _group(uniform: list[float]) -> list[float]:
        turn = single(2 * math.pi)
        radii = [single(math.sqrt(-2 * single(math.log(1 - each)))) for each in uniform[:8]]
        angles = [single(turn * each) for each in uniform[8:]]
        pairs = list(zip(radii, angles, strict=True))
        cosines = [single(radius * single(math.cos(angle))) for radius, angle in pairs]
        return cosines + [single(radius * single(math.sin(angle))) for radius, angle in pairs]

    def draw(self, count: int) -> list[float]:
        """The next `count` values, at least 16."""
        if count < 16:
            raise ValueError(f"{count} values; latents have at least 16")
        uniform = self._uniform(count)
        values: list[float] = []
        for begin in range(0, count - 15, 16):
            values += self._group(uniform[begin : begin + 16])
        if count % 16:
            values = (values + uniform[len(values) :])[:-16] + self._group(self._uniform(16))
        return values


def start_latents(manifest: Mapping[str, Any], seed: int) -> list[float]:
    """The latents before step 0."""
    latent = manifest["latent"]
    sigma, count = (
        single(manifest["schedule"]["init_noise_sigma"]),
        latent["channels"] * latent["height"] * latent["width"],
    )
    return [single(value * sigma) for value in Noise(seed).draw(count)]


class NotFinite(ArithmeticError):
    """A graph gave NaN or infinity."""


@dataclass
class Result:
    latents: Values
    kinds: list[str] = field(default_factory=list)


def _mask(manifest: Mapping[str, Any], split: int, level: str) -> tuple[list[str], int]:
    masks = [mask for mask in (manifest.get("prediction") or {}).get("masks", []) if mask["split"] == split]
    for wanted in (level, "normal"):
        for mask in masks:
            if mask.get("level", "normal") == wanted:
                return mask["mask"], mask["row"]
    return ["full"] * (manifest["schedule"]["num_steps"] - split), 0


def run(
    manifest: Mapping[str, Any], graph: Graph, latents: Values, x0_prev: Values | None, split: int,
    prompt_embeds: Values, guidance: float, seed: int, level: str = "normal",
) -> Result:  # fmt: skip
    """The steps split .. N-1 over `latents`."""
    full = {port["role"]: math.prod(port["shape"]) for port in manifest["components"]["step_full"]["inputs"]}
    ports = {name: [port["role"] for port in part["inputs"]] for name, part in manifest["components"].items()}
    last = manifest["schedule"]["num_steps"] - 1
    kinds, row = _mask(manifest, split, level)
    threshold = (manifest.get("prediction") or {}).get("fallback_threshold")
    limit = math.inf if threshold is None else threshold
    zeros = [0.0] * len(latents)
    x0_prev = zeros if x0_prev is None else x0_prev
    source = Noise(seed) if "noise" in full else None
    if source is not None:
        for _ in range(1 + split):
            source.draw(len(latents))
    current: dict[str, Values] = {role: [math.nan] * size for role, size in full.items() if role in LADDERS}
    result = Result(latents)
    for step in range(split, last + 1):
        noise: Values = zeros if source is None or step == last else source.draw(len(latents))
        feed: dict[str, Values] = {
            "latents": latents, "x0_prev": x0_prev, "prompt_embeds": prompt_embeds, "guidance": [guidance],
            "step": [step], "split_row": [row], "noise": noise, **current,
        }  # fmt: skip

        def call(name: str, feed: dict[str, Values] = feed) -> Mapping[str, Values]:
            return graph(name, {role: list(feed[role]) for role in ports[name]})

        kind = kinds[step - split]
        if kind == "full":
            out = call("step_full")
            current = {role: out[role] for role in current}
        else:
            out = call("step_predicted")
            if "probe_error" in out and out["probe_error"][0] > limit:
                out, kind = call("step_full"), "recomputed"
        if not all(math.isfinite(value) for values in out.values() for value in values):
            raise NotFinite(f"step {step}: the {kind} step gave NaN or infinity")
        latents, x0_prev = out["latents"], out.get("x0_prev", x0_prev)
        result.latents = latents
        result.kinds.append(kind)
    return result
