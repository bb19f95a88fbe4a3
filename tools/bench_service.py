"""`latentrelay bench --service`: our server beside one that runs the same diffusers pipeline one request after another.

Both are processes on loopback, asked in turn by the same clients in short rounds, so that what else the machine does
falls on both; beside them, the bare network over the best fixed batch as the ceiling. Out: one document of ratios,
medians and counts. It measures neither decoding nor a network between machines.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import Request as UrlRequest
from urllib.request import urlopen

import numpy as np
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.handoff import Handoff
from latentrelay.tools.bench_service_counts import Round, Side, figures, percentile
from latentrelay.tools.bench_service_static import Static
from latentrelay.tools.console import counting, emit, extra, printable, table
from latentrelay.tools.service_load import Requests, run_load
from latentrelay.tools.service_process import ServerProcess

MAX_STATIC = 32
OVERHEAD_REQUESTS = 40
LEAST_DB, EQUAL_DB = 30.0, 200.0
_STEPS = re.compile(r"^latentrelay_steps_total ([0-9.e+]+)$", re.MULTILINE)


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
    """Measure, print, and with `output` keep the JSON object; the exit status is 0 where no job was lost or doubled.

    `seconds` are shared by the rounds and both sides; a round ends with its last answer, so it takes longer. Raises
    RequestError, ServerEndedError, LoadError, StaticError.
    """
    if not 1 <= split <= num_steps or clients < 1 or rounds < 1 or not seconds > 0:
        expected = "1 or more clients and rounds, seconds above 0, and 1 <= split <= num-steps"
        raise RequestError(
            "the benchmark's sizes make no sense", got=f"split {split} of {num_steps}", expected=expected
        )
    with extra("cloud", "the service benchmark"):
        import latentrelay.cloud.app  # noqa: F401
    from latentrelay.tools.sweep import cores

    threads = threads or cores()
    document = measure(clients, seconds, model, num_steps, split, threads, rounds, static)
    if output is not None:
        output.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    emit(document, as_json, lambda console: _show(console, document))
    return 0 if document["ok"] else 1


def measure(
    clients: int,
    seconds: float,
    model: str,
    num_steps: int,
    split: int,
    threads: int,
    rounds: int,
    static: bool,
) -> dict[str, Any]:
    """The document: `figures` of the rounds, memory, overhead, the ceiling, and how it was all run."""
    common = ["--model", model, "--threads", str(threads)]
    with ExitStack() as stack, counting("starting both servers", None) as advance:
        baseline = stack.enter_context(server("baseline", common, threads))
        ours = stack.enter_context(server("ours", [*common, "--queue", str(max(64, 2 * clients))], threads))
        loop = stack.enter_context(Static(model, threads, num_steps, split)) if static else None
        told = capabilities(ours.url)
        asked = {"num_steps": num_steps, "split": split, "guidance": 4.0}
        asked |= {"height": told["default_height"], "width": told["default_width"]}
        requests = Requests("bench", **asked)
        for each in (baseline, ours):  # both warm: kernels chosen, threads started, memory taken
            run_load(each.url, Requests(f"warm {each.name}", **asked), min(2, clients), each=1)
        batch = best_batch(loop, clients) if loop else None
        agreement = agreement_db(ours.url, baseline.url, asked)
        before, warm = steps_made(ours.url), None
        done: list[Round] = []
        for turn in range(rounds):
            advance(f"round {turn + 1} of {rounds}", 1)
            first, second = (ours, baseline) if turn % 2 == 0 else (baseline, ours)
            sides = {each.name: _side(each, requests, clients, seconds / (2 * rounds)) for each in (first, second)}
            warm = sides["ours"].rss_mib if warm is None else warm
            done.append(Round(sides["ours"], sides["baseline"], _ceiling(loop, batch)))
        made = steps_made(ours.url)
        advance("overhead", 1)
        overhead = overhead_ms(ours, asked)
    counted = figures(done, threads)
    answers = counted["answers"] * split
    counted["steps_more_than_asked"] = None if before is None or made is None else round(made - before - answers)
    last = done[-1].ours.rss_mib
    counted["duplicated"] += max(0, round((counted["steps_more_than_asked"] or 0) / split))
    return {
        "ok": counted["lost"] == 0 and counted["duplicated"] == 0 and counted["damaged"] == 0,
        **counted,
        "rss_growth_mib": None if last is None or warm is None else round(last - warm, 2),
        "rss_mib": last,
        **overhead,
        "static_batch": batch,
        "agreement_db": agreement,
        "config": {
            "model": model,
            "clients": clients,
            "seconds": seconds,
            "rounds": rounds,
            "num_steps": num_steps,
            "split": split,
            "threads": threads,
            "dtype": "float32",
            "wire_dtype": "float16",
            "caches": False,
            "decode": False,
            "baseline": "diffusers StableDiffusionPipeline, output_type latent, one request after another, same stack",
        },
    }


def server(name: str, words: list[str], threads: int) -> ServerProcess:
    """The process of one side, "ours" or "baseline"."""
    return ServerProcess(name, ["-m", f"latentrelay.tools.bench_service_{name}", *words], threads=threads)


def best_batch(loop: Static, clients: int) -> int:
    """The batch size with which the bare loop makes most pictures a second; each of up to 32 tried twice."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= min(MAX_STATIC, max(1, clients))]
    loop.per_second(1)
    return max(sizes, key=lambda size: max(loop.per_second(size) for _ in range(2)))


def _ceiling(loop: Static | None, batch: int | None) -> float | None:
    """The bare loop's pictures a second at its best size: the median of three runs."""
    return statistics.median(loop.per_second(batch) for _ in range(3)) if loop and batch else None


def overhead_ms(each: ServerProcess, asked: dict[str, Any], count: int = OVERHEAD_REQUESTS) -> dict[str, float | None]:
    """What a request costs beside compute, one client: requests for no step at all go the whole way through the
    service (body, job, store, batch, blob, digest), and only the network does not run for them. The processor's own
    milliseconds say what it would be on cores that nobody else uses."""
    empty, before = Requests("empty", **{**asked, "split": 0}), each.cpu_s()
    load, after = run_load(each.url, empty, 1, each=count), each.cpu_s()
    kept = [answer.latency_ms for answer in load.answers[count // 10 :]]
    return {
        "overhead_p50_ms": round(statistics.median(kept), 3),
        "overhead_p95_ms": round(percentile(kept, 0.95), 3),
        "overhead_cpu_ms": None if before is None or after is None else round(1e3 * (after - before) / count, 3),
    }


def agreement_db(ours: str, baseline: str, asked: dict[str, Any]) -> float:
    """SNR in dB of our handoff against the baseline's latents for one prompt and seed, both in float16: whether both
    sides do the same work. Raises RequestError below 30 dB."""
    body = {"prompt": "a red circle left of a blue square", "negative_prompt": "", "seed": 1, **asked}
    got = Handoff.from_bytes(posted(ours, body)).latents.astype(np.float64)
    expected = np.frombuffer(posted(baseline, body), np.float16).reshape(got.shape).astype(np.float64)
    error = float(np.sum((got - expected) ** 2))
    found = 10 * math.log10(float(np.sum(expected**2)) / error) if error else EQUAL_DB
    if found < LEAST_DB:
        raise RequestError("both sides make different latents", got=f"{found:.1f} dB", expected=f"{LEAST_DB} dB")
    return round(min(found, EQUAL_DB), 1)


def posted(url: str, body: Mapping[str, Any]) -> bytes:
    """The answer to one request that waits for its blob."""
    headers = {"Content-Type": "application/json", "Prefer": "wait"}
    with urlopen(UrlRequest(f"{url}/v1/handoffs", json.dumps(body).encode(), headers), timeout=600) as answer:
        data: bytes = answer.read()
    return data


def _side(each: ServerProcess, requests: Requests, clients: int, seconds: float) -> Side:
    before = each.cpu_s()
    load = run_load(each.url, requests, clients, seconds)
    after = each.cpu_s()
    return Side(load, None if before is None or after is None else after - before, each.rss_mib())


def capabilities(url: str) -> dict[str, Any]:
    """What the service says of itself."""
    with urlopen(f"{url}/v1/capabilities", timeout=60) as answer:
        document: dict[str, Any] = json.load(answer)
    return document


def steps_made(url: str) -> float | None:
    """Denoising steps that the service says it made, each request's counted."""
    with urlopen(UrlRequest(f"{url}/metrics"), timeout=60) as answer:
        found = _STEPS.search(answer.read().decode())
    return float(found.group(1)) if found else None


def _show(console: Any, document: dict[str, Any]) -> None:
    config, share = document["config"], document["cpu_share"]
    console.print(
        f"{config['clients']} clients, {config['split']} of {config['num_steps']} steps of "
        f"{printable(config['model'])}, {config['threads']} thread(s), {config['rounds']} rounds in turn"
    )
    rows = [
        ["a second", document["per_second"], document["baseline_per_second"], document["throughput_ratio"]],
        ["p50 ms", document["p50_ms"], document["baseline_p50_ms"], ""],
        ["p95 ms", document["p95_ms"], document["baseline_p95_ms"], document["p95_ratio"]],
        ["processor share", share["ours"], share["baseline"], ""],
        ["answers", document["answers"], document["baseline_answers"], ""],
        ["lost", document["lost"], document["baseline_lost"], ""],
    ]
    console.print(table(["", "service", "one by one", "ratio"], rows))
    if document["static_batch_ratio"] is not None:
        console.print(
            f"Of the bare network at its best fixed batch ({document['static_batch']}): "
            f"{100 * document['static_batch_ratio']:.0f} %."
        )
    console.print(
        f"Beside compute {document['overhead_p50_ms']} ms (p50). {document['rss_growth_mib']} MiB more than after the "
        f"first round. {document['duplicated']} doubled, {document['refused']} refused and asked again. The clients "
        f"took {100 * share['clients']:.1f} % of the cores."
    )
