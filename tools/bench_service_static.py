"""The ceiling of a batching service on these cores: the bare network and scheduler over one fixed batch.

A process that reads a batch size a line and answers with the seconds that `split` steps of that many pictures took: no
texts, no HTTP, no joining or leaving. `Static` is the parent's end. What a service reaches of the best size is what its
scheduling, its texts and its protocol leave of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from types import TracebackType

from latentrelay.runtime.errors import LatentRelayError
from latentrelay.tools.service_process import THREAD_VARIABLES


class StaticError(LatentRelayError):
    """The bare loop ended."""


class Static:
    """`with Static(model, threads, num_steps, split) as loop: loop.per_second(8)`."""

    def __init__(self, model: str, threads: int, num_steps: int, split: int) -> None:
        steps = ["--num-steps", str(num_steps), "--split", str(split)]
        words = ["-m", "latentrelay.tools.bench_service_static", "--model", model, "--threads", str(threads), *steps]
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
        self._process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Static:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def per_second(self, batch: int) -> float:
        """Pictures a second in one run of this batch size. Raises StaticError."""
        if self._process.stdin is None or self._process.stdout is None:
            raise StaticError("the bare loop was not started")
        try:
            self._process.stdin.write(f"{batch}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError as error:
            raise StaticError(f"the bare loop ended: {error}") from error
        if not line:
            raise StaticError("the bare loop ended", got=f"batch {batch}", do="Try fewer clients.")
        return batch / float(json.loads(line)["seconds"])


def main(words: list[str] | None = None) -> None:
    """Answer until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    for name in ("--threads", "--num-steps", "--split"):
        parser.add_argument(name, type=int, required=True)
    asked = parser.parse_args(words)
    import torch
    from latentrelay.tools.bench_service_baseline import pipeline_of

    torch.set_num_threads(asked.threads)
    pipeline = pipeline_of(asked.model)
    for line in sys.stdin:
        with torch.inference_mode():
            seconds = _seconds(pipeline, int(line), asked.num_steps, asked.split)
        sys.stdout.write(json.dumps({"seconds": seconds}) + "\n")
        sys.stdout.flush()


def _seconds(pipeline: object, batch: int, num_steps: int, split: int) -> float:
    import torch

    unet, scheduler = pipeline.unet, pipeline.scheduler  # type: ignore[attr-defined]
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    tokens = pipeline.tokenizer.model_max_length  # type: ignore[attr-defined]
    embeds = torch.randn(2 * batch, tokens, width)
    scheduler.set_timesteps(num_steps)
    latents = torch.randn(batch, unet.config.in_channels, side, side) * scheduler.init_noise_sigma
    started = time.perf_counter()
    for timestep in scheduler.timesteps[:split]:
        sample = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        noise = unet(sample, timestep, encoder_hidden_states=embeds, return_dict=False)[0]
        uncond, cond = noise.chunk(2)
        latents = scheduler.step(uncond + 4.0 * (cond - uncond), timestep, latents, return_dict=False)[0]
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
