"""What one request may ask for and how much the service takes on. One frozen value, given to the engine and the app."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sides in pixels, prompts in characters, bodies in bytes; `queue` counts the running jobs and those that wait.

    deadline_s: for a request that names no deadline of its own.
    """

    max_body_bytes: int = 64 * 1024
    max_prompt_chars: int = 4000
    max_steps: int = 200
    max_side: int = 1024
    max_guidance: float = 50.0
    queue: int = 64
    deadline_s: float = 600.0
