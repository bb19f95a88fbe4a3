"""`latentrelay serve`: the first steps for devices, over HTTP."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

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
) -> None:
    """Serve until interrupted. With `--json` the one object is printed when requests are answered."""
    with extra("cloud", "the cloud service"):
        from latentrelay.cloud import Engine
        from latentrelay.cloud.serve import serve
    err.print(f"loading {printable(model)}")
    adapt = merging(model, loras)
    engine = Engine.load(resolve(model), revision=revision, config=config, name=model, adapt=adapt)

    def ready(url: str, real_port: int) -> None:
        if as_json:
            sys.stdout.write(json.dumps({"url": url, "port": real_port, "model": model}) + "\n")
            sys.stdout.flush()
        err.print(f"serving {printable(model)} at [bold]{url}[/] (Ctrl-C ends it)")

    serve(
        engine,
        host=host,
        port=port,
        token=token,
        insecure=insecure,
        certfile=cert,
        keyfile=key,
        port_file=port_file,
        on_ready=ready,
    )
