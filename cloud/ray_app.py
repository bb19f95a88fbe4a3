"""The service on Ray Serve: replicas that each load the model and run the same application on one store folder.

One socket (`serve.CloudServer`, with its TLS, limits and time-outs) answers in the process that started Ray and hands
every request to a replica (ray_ingress.py, ray_replica.py). Ray's own HTTP proxy is not started: it answers in plain
text by itself, lets a client set its time-outs, and has no guard against slow connections. Ray is imported when
`run_ray` is called; it is started here, on loopback, for this process alone, and ends with it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from latentrelay.cloud.errors import ReplicaError
from latentrelay.cloud.folder_store import FolderStore
from latentrelay.cloud.metrics import Metrics
from latentrelay.cloud.ray_ingress import Ingress, Message, ReplicaLost
from latentrelay.cloud.ray_metrics import merged
from latentrelay.cloud.ray_replica import DeployedReplica, make_app
from latentrelay.cloud.replicas import Replicas, desired_replicas
from latentrelay.cloud.serve import CloudServer, OnReady, check_port_file
from latentrelay.cloud.service_options import ServiceOptions
from latentrelay.runtime.errors import MissingExtraError

NAME = "latentrelay"
_ONE = Replicas()
_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least; requests and answers are small and do not go through it
_REQUESTS = 1000  # at once in one replica: event streams last as long as their jobs
_SCALE_S = 2.0
_STOP_S = 20.0
_METRICS_S = 30.0
# Read by Ray when it is imported. No usage report and no cluster beyond this machine: with "clusters" off, every
# port but one is bound to loopback, and a token that only these processes know guards them all.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_COLLECT_AUTOSCALING_METRICS_ON_HANDLE": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


def run_ray(
    make_engine: Callable[[], Any],
    *,
    replicas: Replicas = _ONE,
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
    threads: int | None = None,
    gpus_per_replica: float = 0.0,
) -> None:
    """Serve until SIGINT or SIGTERM; see serve.serve for what the address arguments mean and raise.

    make_engine is called once in every replica, and pickled for that: ray_replica.load_engine with its arguments, as a
    functools.partial, is one. jobs_per_replica: more than that many jobs for each replica call for another one.
    store is a folder all replicas reach; without one a temporary folder is made, and removed at the end. threads: of
    each replica; the cores shared out among `replicas.maximum` if not given. Raises MissingExtraError without Ray,
    ReplicaError when the replicas do not start, RequestError for a store's folder or port file that cannot be used.
    """
    check_port_file(port_file)
    with ExitStack() as stack:
        folder = Path(store).resolve() if store is not None else stack.enter_context(_temporary("latentrelay-jobs-"))
        FolderStore(folder)  # what is wrong with it shows here, before a replica starts
        application = functools.partial(
            make_app,
            store=folder,
            token=token,
            tokens_file=tokens_file,
            service=dataclasses.replace(service or ServiceOptions(), replicas=replicas.maximum > 1),
        )
        cluster = _Cluster(DeployedReplica, make_engine, application)
        ingress = Ingress(cluster.call, metrics=cluster.metrics)
        server = CloudServer(
            ingress,
            host=host,
            port=port,
            insecure=insecure,
            certfile=certfile,
            keyfile=keyfile,
            drain=cluster.drain,
            refused=cluster.front.refused,
        )
        stack.enter_context(cluster.running(replicas, jobs_per_replica, threads, gpus_per_replica))
        ingress.max_body_bytes = cluster.describe()["max_body_bytes"]
        with _published(port_file, on_ready) as ready:
            server.run(ready)


@contextmanager
def _published(port_file: str | os.PathLike[str] | None, on_ready: OnReady | None) -> Iterator[OnReady]:
    """A callback that writes the port file, whole or not at all, and calls on; the file is removed at the end."""

    def ready(url: str, port: int) -> None:
        if port_file is not None:
            part = Path(f"{port_file}.part")
            part.write_text(f"{port}\n")
            part.replace(port_file)
        if on_ready is not None:
            on_ready(url, port)

    try:
        yield ready
    finally:
        if port_file is not None:
            Path(port_file).unlink(missing_ok=True)


class _Cluster:
    """Ray and one deployment on it, from `running` on."""

    def __init__(self, kind: type, *arguments: Any) -> None:
        self._kind, self._arguments = kind, arguments
        self.front = Metrics()
        self._handle: Any = None
        self._draining: asyncio.Future[Any] | None = None  # kept, so that it is not collected while it runs

    @contextmanager
    def running(self, replicas: Replicas, jobs: float, threads: int | None, gpus: float) -> Iterator[None]:
        """Start Ray and the replicas, end both; neither leaves a process or a file behind."""
        with _environment(_ENVIRONMENT | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}):
            ray, serve = _imported()
            with _temporary("lr-ray-") as session:
                logging.getLogger("ray").setLevel(logging.ERROR)
                logging.getLogger("ray.serve").setLevel(logging.ERROR)
                ray.init(
                    num_cpus=replicas.maximum,
                    num_gpus=None if gpus else 0,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level="ERROR",
                    _temp_dir=str(session),
                )
                try:
                    self._handle = self._deployed(serve, replicas, jobs, threads, gpus)
                    yield
                finally:
                    serve.shutdown()
                    ray.shutdown()

    def _deployed(self, serve: Any, replicas: Replicas, jobs: float, threads: int | None, gpus: float) -> Any:
        each = threads or max(1, len(os.sched_getaffinity(0)) // replicas.maximum)
        scaling: dict[str, Any] = {"num_replicas": replicas.minimum}
        if not replicas.fixed:
            scaling = {
                "autoscaling_config": {
                    "min_replicas": replicas.minimum,
                    "max_replicas": replicas.maximum,
                    "target_ongoing_requests": jobs,
                    "upscale_delay_s": _SCALE_S,
                    "downscale_delay_s": 60 * _SCALE_S,
                    "policy": {"policy_function": desired_replicas},
                }
            }
        deployment = serve.deployment(
            self._kind,
            name="replicas",
            max_ongoing_requests=_REQUESTS,
            max_constructor_retry_count=1,
            graceful_shutdown_wait_loop_s=0.5,
            graceful_shutdown_timeout_s=_STOP_S,
            health_check_period_s=5,
            health_check_timeout_s=30,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
            ray_actor_options={
                "num_cpus": 1,
                "num_gpus": gpus,
                "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(each)}},
            },
            **scaling,
        )
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        try:
            return serve.run(deployment.bind(*self._arguments), name=NAME, route_prefix=None)
        except RuntimeError as error:
            reason = serve.status().applications[NAME].message
            raise ReplicaError("the replicas did not start", got=_last_line(reason or str(error))) from error

    def drain(self, grace_s: float) -> None:
        """Have every replica take on nothing new; does not wait. Called on the loop that answers requests."""
        self._draining = asyncio.ensure_future(
            self._handle.broadcast("drain", grace_s).results_async(timeout_s=grace_s + 5, return_exceptions=True)
        )

    def describe(self) -> dict[str, Any]:
        """What one replica says of itself."""
        return dict(self._handle.describe.remote().result(timeout_s=60))

    async def call(self, scope: Message, body: bytes) -> AsyncGenerator[list[Message], None]:
        """One request to one replica, which Ray chooses among those with the fewest requests in progress."""
        from ray.exceptions import RayActorError, RayError
        from ray.serve.exceptions import RayServeException

        answer = self._handle.options(stream=True).asgi.remote(scope, body)
        ended = False
        try:
            async for batch in answer:
                yield batch
            ended = True
        except (RayActorError, RayServeException) as error:
            raise ReplicaLost(type(error).__name__) from error
        except RayError as error:
            raise ReplicaLost(type(error).__name__) from error
        finally:
            if not ended:
                answer.cancel()

    async def metrics(self) -> bytes:
        """The metrics of every replica that answers, and of the connections refused here."""
        try:
            found = await self._handle.broadcast("metrics").results_async(timeout_s=_METRICS_S, return_exceptions=True)
        except TimeoutError:
            found = []  # a scrape without replicas says so
        answered = [(str(pid), text) for pid, text in (each for each in found if not isinstance(each, BaseException))]
        return merged([*answered, ("front", self.front.text())])


def _imported() -> tuple[Any, Any]:
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise MissingExtraError("ray", "ray", purpose="A service with replicas") from error
    return ray, serve


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that Ray and its processes read, for as long as they run."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _temporary(prefix: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"
