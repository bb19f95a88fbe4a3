"""`latentrelay serve`: the first steps for devices, over HTTP."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from latentrelay.runtime.errors import RequestError
from latentrelay.tools.console import err, extra, printable
from latentrelay.tools.models import merging, resolve


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
) -> None:
    """Serve until interrupted. With `--json` the one object is printed when requests are answered."""
    if replicas is not None and not ray:
        raise RequestError("replicas were asked for without Ray", got=f"--replicas {replicas}", do="Give --ray too.")
    if token is not None and tokens is not None:
        raise RequestError("both a token and a file of tokens were given", do="Give one of them.")
    with extra("cloud", "the cloud service"):
        from latentrelay.cloud.ray_replica import load_engine
        from latentrelay.cloud.serve import serve
    load = partial(
        load_engine, resolve(model), revision=revision, config=config, name=model, adapt=merging(model, loras)
    )

    def ready(url: str, real_port: int) -> None:
        if as_json:
            sys.stdout.write(json.dumps({"url": url, "port": real_port, "model": model}) + "\n")
            sys.stdout.flush()
        err.print(f"serving {printable(model)} at [bold]{url}[/] (Ctrl-C ends it)")

    err.print(f"loading {printable(model)}")
    if ray:
        from latentrelay.cloud.ray_app import run_ray
        from latentrelay.cloud.replicas import Replicas

        run_ray(
            load,
            replicas=Replicas.parse(replicas or "1"),
            store=store,
            host=host,
            port=port,
            token=token,
            tokens_file=tokens,
            insecure=insecure,
            certfile=cert,
            keyfile=key,
            port_file=port_file,
            on_ready=ready,
        )
        return
    from latentrelay.cloud.folder_store import FolderStore
    from latentrelay.cloud.tokens import Tokens

    serve(
        load,
        host=host,
        port=port,
        token=token,
        tokens=Tokens.from_file(tokens) if tokens is not None else None,
        store=FolderStore(store) if store is not None else None,
        insecure=insecure,
        certfile=cert,
        keyfile=key,
        port_file=port_file,
        on_ready=ready,
    )
