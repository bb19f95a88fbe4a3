"""The service on Ray Serve: replicas that each load the model and run the same application on one store folder.

One socket (`serve.CloudServer`, with its TLS, limits and time-outs) answers in the process that started Ray and hands
every request to a replica (ray_ingress.py, ray_replica.py). Ray's own HTTP proxy is not started: it answers in plain
text by itself, lets a client set its time-outs, and has no guard against slow connections. Ray is imported when
`run_ray` is called. It costs about 1.4 GB and 20 s to start beside a plain server's 60 MB.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from latentrelay.cloud.replicas import Replicas
from latentrelay.cloud.service_options import ServiceOptions

OnReady = Callable[[str, int], None]


def run_ray(
    make_engine: Callable[[], Any],
    *,
    replicas: Replicas = Replicas(),
    jobs_per_replica: float = 4.0,
    store: str | os.PathLike[str] | None = None,
    token: str | None = None,
    tokens_file: str | os.PathLike[str] | None = None,
    service: ServiceOptions | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    insecure: bool = False,
    certfile: str | os.PathLike[str] | None = None,
    keyfile: str | os.PathLike[str] | None = None,
    port_file: str | os.PathLike[str] | None = None,
    on_ready: OnReady | None = None,
    gpus_per_replica: float = 0.0,
) -> None:
    """Serve until SIGINT or SIGTERM; see serve.serve for what the address arguments mean and raise.

    make_engine is called once in every replica (ray_replica.load_engine with arguments is one such function); it is
    pickled. store is a folder all replicas reach; without one a temporary folder is made and removed at the end.
    Raises MissingExtraError without Ray, ReplicaError when the replicas do not start.
    """
    raise NotImplementedError
