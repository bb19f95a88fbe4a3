"""What the service is compared with: diffusers' own StableDiffusionPipeline behind HTTP, one request after another.

`python -m latentrelay.tools.bench_service_baseline --model reference --threads 2 --port-file FILE`. The same web stack,
weights, precision, threads, scheduler and steps as the service; the pipeline is called as its manual says, asked for
latents, and interrupted after `split` steps by its own callback. Answers are float16 latents with their digest. It has
no queue but the thread's own, no limits and no jobs: all that a server must have costs only the other one.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from latentrelay.tools.models import resolve
from latentrelay.tools.service_process import end_with_parent


def main(words: list[str] | None = None) -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--port-file", type=Path, required=True)
    asked = parser.parse_args(words)
    end_with_parent()
    import torch
    import uvicorn
    from latentrelay.cloud.openmp import release_workers

    torch.set_num_threads(asked.threads)
    app = _application(pipeline_of(asked.model))
    release_workers()  # as ours does: what is compared is not who knows OpenMP
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", access_log=False, log_level="warning")
    asked.port_file.write_text(str(listener.getsockname()[1]))  # bound: whoever connects now is answered
    uvicorn.Server(config).run(sockets=[listener])


def pipeline_of(model: str) -> Any:
    """The pipeline with the scheduler that the service uses for it."""
    import diffusers
    from latentrelay.cloud.loading import load_pipeline
    from latentrelay.runtime.samplers import SAMPLERS, sampler_for

    pipeline = load_pipeline(resolve(model))
    rule = SAMPLERS[sampler_for(type(pipeline.scheduler).__name__)]
    kind = getattr(diffusers, rule.scheduler_class)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **rule.overrides)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _application(pipeline: Any) -> Any:
    import torch
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    one = ThreadPoolExecutor(max_workers=1)

    def run(body: dict[str, Any]) -> bytes:
        split = int(body["split"])

        def stop(own: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
            own._interrupt = step + 1 >= split
            return kept

        latents = pipeline(
            prompt=body["prompt"],
            negative_prompt=body.get("negative_prompt", ""),
            num_inference_steps=body["num_steps"],
            guidance_scale=body["guidance"],
            height=body["height"],
            width=body["width"],
            generator=torch.Generator("cpu").manual_seed(body["seed"]),
            output_type="latent",
            callback_on_step_end=stop,
        ).images
        return bytes(latents.to(torch.float16).contiguous().numpy().tobytes())

    async def handoffs(request: Request) -> Response:
        data = await asyncio.get_running_loop().run_in_executor(one, run, await request.json())
        return Response(data, headers={"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    return Starlette(routes=[Route("/v1/handoffs", handoffs, methods=["POST"])])


if __name__ == "__main__":
    main()
