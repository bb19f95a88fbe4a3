"""`latentrelay bench --service`: our server beside one that runs the same diffusers pipeline one request after another.

Both are processes on loopback, asked in turn by the same clients in short rounds, so that what else the machine does
falls on both. Out: one document of ratios, medians and counts. It measures neither decoding nor the network.
"""

from __future__ import annotations

from pathlib import Path


def run(
    *,
    clients: int = 8,
    seconds: float = 60.0,
    model: str = "reference",
    num_steps: int = 25,
    split: int = 8,
    threads: int | None = None,
    rounds: int = 5,
    static: bool = True,
    output: Path | None = None,
    as_json: bool = False,
) -> int:
    """Measure, print, and with `output` keep the JSON object; the exit status is 0 where no job was lost or doubled."""
    raise NotImplementedError
