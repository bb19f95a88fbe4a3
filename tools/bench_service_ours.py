"""The service under test as a process: the real `serve` of latentrelay.cloud, with its caches off. No decode.

`python -m latentrelay.tools.bench_service_ours --model reference --threads 2 --port-file FILE`. Nothing is switched off
but the caches of texts and results, since all requests of a benchmark are distinct anyway.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from latentrelay.tools.models import resolve
from latentrelay.tools.service_process import end_with_parent


def main(words: list[str] | None = None) -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--ttl", type=float, default=600.0)
    parser.add_argument("--port-file", type=Path, required=True)
    asked = parser.parse_args(words)
    end_with_parent()
    import torch
    from latentrelay.cloud.engine import Engine
    from latentrelay.cloud.limits import Limits
    from latentrelay.cloud.serve import serve
    from latentrelay.cloud.service_options import ServiceOptions

    torch.set_num_threads(asked.threads)
    serve(
        lambda: Engine.load(resolve(asked.model), name=asked.model, limits=Limits(queue=asked.queue)),
        port=0,
        port_file=asked.port_file,
        service=ServiceOptions(cache=False, ttl_s=asked.ttl),
    )


if __name__ == "__main__":
    main()
