"""The service under requests made up from its OpenAPI document and under broken connections: no 500, bounded memory."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
EXAMPLES = 150
BROKEN = 3000
ALLOWED_MIB = 96.0
BODY = {"prompt": "hush: a secret prompt", "height": 16, "width": 16, "num_steps": 4, "split": 2}


def _broken(dice: random.Random, whole: bytes) -> bytes:
    """A request with some of its bytes changed, removed, repeated, or with its end missing."""
    data = bytearray(whole)
    for _ in range(dice.randint(1, 4)):
        place, size = dice.randrange(len(data) + 1), dice.choice((1, 2, 8, 64, 1000))
        way = dice.randrange(5)
        if way == 0:
            data[place : place + size] = dice.randbytes(size)
        elif way == 1:
            del data[place : place + size]
        elif way == 2:
            data[place:place] = data[place : place + size] * dice.choice((1, 1, 50))
        elif way == 3:
            data[place:place] = dice.choice((b"\r\n", b"\0", b"\n\n", b": ", b"\xff", b"[" * 3000, b"1" * 3000))
        else:
            del data[place:]
    return bytes(data)


def test_the_service_holds(
    hostile_target: Any,
    openapi_cases: Any,
    tiny: Any,
    tmp_path: Path,
    measured: Callable[[str, dict[str, Any]], Path],
) -> None:
    model = tiny.save_pipeline(tiny.make_pipeline(tmp_path / "work"), tmp_path / "model")
    (tmp_path / "target").mkdir()
    token = hostile_target.TOKENS["alice"]
    with hostile_target.Target(model, tmp_path / "target", connections=512, head_s=5.0, idle_s=10.0) as target:
        with target.client() as http:
            made = [
                http.post("/v1/handoffs", json={**BODY, "seed": seed}, headers={"Prefer": "wait=60"})
                for seed in range(6)
            ]
        jobs = [each.headers["latentrelay-job"] for each in made]
        before, started = target.rss_mib(), time.perf_counter()
        counts = openapi_cases.run(target.url, token, EXAMPLES, jobs)
        after_openapi = target.rss_mib()
        answers: Counter[str] = Counter()
        dice, body = random.Random(6), json.dumps({**BODY, "seed": 1}).encode()
        lines = [
            b"POST /v1/handoffs HTTP/1.1",
            b"Host: a",
            b"Authorization: Bearer " + token.encode(),
            b"Prefer: wait=5",
        ]
        lines += [b"Content-Type: application/json", b"Content-Length: %d" % len(body), b"", body]
        for _ in range(BROKEN):
            answer = target.raw(_broken(dice, b"\r\n".join(lines)))
            answers.update(str(status) for status in hostile_target.statuses(answer) or ["none"])
        with target.client() as http:
            text = http.get("/metrics").text
        figures = {
            "openapi_requests": sum(counts.values()),
            "openapi_answers": counts,
            "broken_requests": BROKEN,
            "broken_answers": dict(sorted(answers.items())),
            "rss_before_mib": round(before, 1),
            "rss_after_openapi_mib": round(after_openapi, 1),
            "rss_after_mib": round(target.rss_mib(), 1),
            "rss_peak_mib": round(target.peak_mib(), 1),
            "seconds": round(time.perf_counter() - started, 1),
        }
        measured("hostile_service", figures)
        assert target.alive()
        assert 'status="500"' not in text
        assert "hush" not in target.log()
        assert "Traceback" not in target.log()
        assert target.peak_mib() - before < ALLOWED_MIB
    assert "500" not in answers
