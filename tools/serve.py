"""`latentrelay serve`: the first steps for devices, over HTTP, in this process or in replicas on Ray Serve."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from latentrelay.runtime.errors import RequestError
from latentrelay.tools.console import err, extra, printable
from latentrelay.tools.models import merging, resolve

DTYPES = ("float32", "bfloat16", "float16")
LOG_FORMATS = ("text", "json")


@dataclass(frozen=True)
class Running:
    """How the model runs and how much is taken on. device: torch's word; dtype: one of DTYPES; step_cache: the cloud's
    own schedule of computed steps; None everywhere: measured, or the service's own default."""

    device: str = "cpu"
    dtype: str = "float32"
    compiled: bool = False
    step_cache: Path | None = None
    max_batch: int | None = None
    memory_mib: int | None = None
    queue: int | None = None
    ttl_s: float | None = None
    cache: bool = True


def run(
    model: str,
    *,
    host: str,
    port: int,
    revision: str | None,
    config: str | None,
    token: str | None,
    cert: Path | None,
    key: Path | None,
    insecure: bool,
    port_file: Path | None,
    as_json: bool,
    loras: Sequence[str] = (),
    store: Path | None = None,
    tokens: Path | None = None,
    ray: bool = False,
    replicas: str | None = None,
    running: Running | None = None,
    log_format: str = "text",
    log_prompts: bool = False,
) -> None:
    """Serve until interrupted. With `--json` the one object is printed when requests are answered."""
    how = running or Running()
    _check(how, token, tokens, ray, replicas, log_format)
    with extra("cloud", "the cloud service"):
        from latentrelay.cloud import logs
        from latentrelay.cloud.ray_replica import load_engine
        from latentrelay.cloud.serve import serve
    load = partial(
        load_engine,
        resolve(model),
        revision=revision,
        config=config,
        name=model,
        adapt=merging(model, loras),
        **_engine(how),
    )
    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "token": token,
        "service": _service(how, log_prompts),
        "insecure": insecure,
        "certfile": cert,
        "keyfile": key,
        "port_file": port_file,
    }

    def ready(url: str, real_port: int) -> None:
        if as_json:
            sys.stdout.write(json.dumps({"url": url, "port": real_port, "model": model}) + "\n")
            sys.stdout.flush()
        err.print(f"serving {printable(model)} at [bold]{url}[/] (Ctrl-C ends it)")

    err.print(f"loading {printable(model)}")
    logs.configure(log_format, prompts=log_prompts)  # type: ignore[arg-type]  # checked above
    if ray:
        from latentrelay.cloud.ray_app import run_ray
        from latentrelay.cloud.replicas import Replicas

        run_ray(
            load,
            replicas=Replicas.parse(replicas or "1"),
            store=store,
            tokens_file=tokens,
            gpus_per_replica=1.0 if how.device.startswith("cuda") else 0.0,
            on_ready=ready,
            **given,
        )
        return
    from latentrelay.cloud.folder_store import FolderStore
    from latentrelay.cloud.tokens import Tokens

    serve(
        load,
        tokens=Tokens.from_file(tokens) if tokens is not None else None,
        store=FolderStore(store) if store is not None else None,
        on_ready=ready,
        **given,
    )


def _check(
    how: Running, token: str | None, tokens: Path | None, ray: bool, replicas: str | None, log_format: str
) -> None:
    if replicas is not None and not ray:
        raise RequestError("replicas were asked for without Ray", got=f"--replicas {replicas}", do="Give --ray too.")
    if token is not None and tokens is not None:
        raise RequestError(
            "both a token and a file of tokens were given",
            got="--tokens, and --token or LATENTRELAY_TOKEN in the environment",
            do="Give one of them.",
        )
    for what, got, allowed in (("dtype", how.dtype, DTYPES), ("log format", log_format, LOG_FORMATS)):
        if got not in allowed:
            raise RequestError(f"unknown {what}", got=got, expected=" | ".join(allowed))


def _engine(how: Running) -> dict[str, Any]:
    """The arguments of Engine.load that depend on torch, and are imported with it."""
    with extra("cloud", "the cloud service"):
        import torch
    from latentrelay.cloud.limits import Limits
    from latentrelay.cloud.segment_cache import read_segment_cache

    try:
        device = torch.device(how.device)
    except RuntimeError as error:
        raise RequestError("unknown device", got=how.device, expected="cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RequestError("there is no CUDA device here", got=how.device, do="Leave --torch-device out.")
    return {
        "device": how.device,
        "dtype": getattr(torch, how.dtype),
        "compiled": how.compiled,
        "step_cache": read_segment_cache(how.step_cache) if how.step_cache is not None else None,
        "limits": Limits() if how.queue is None else Limits(queue=how.queue),
    }


def _service(how: Running, log_prompts: bool) -> Any:
    from latentrelay.cloud.service_options import ServiceOptions

    own = {"max_batch": how.max_batch, "memory_mib": how.memory_mib, "ttl_s": how.ttl_s}
    named: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    return ServiceOptions(cache=how.cache, log_prompts=log_prompts, warm_up=True, **named)
