"""Clients in a closed loop: what they count as answered, lost, refused and doubled, on real sockets."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from latentrelay.tools.bench_service_counts import Round, Side, figures, percentile
from latentrelay.tools.service_load import Answer, Load, LoadError, Requests, run_load

Script = Callable[[int, str, dict[str, str], bytes], bytes | None]


def reply(status: str, body: bytes = b"", **headers: str) -> bytes:
    """One HTTP answer; header names with _ for -."""
    lines = {"content-length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


@contextmanager
def _scripted(script: Script) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A server that answers request number n with `script(n, first line, headers, body)`; None hangs up."""
    listener, seen, stop = socket.create_server(("127.0.0.1", 0)), [], threading.Event()
    lock = threading.Lock()

    def serve(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            while line := stream.readline():
                headers = {}
                while (text := stream.readline().decode().strip()) != "":
                    name, _, value = text.partition(":")
                    headers[name.lower()] = value.strip()
                body = stream.read(int(headers.get("content-length", 0)))
                with lock:
                    number = len(seen)
                    seen.append((line.decode().strip(), headers.get("idempotency-key", "")))
                answer = script(number, line.decode(), headers, body)
                if answer is None:
                    return
                connection.sendall(answer)

    def accept() -> None:
        while not stop.is_set():
            try:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
            except OSError:
                return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        stop.set()
        with socket.create_connection(listener.getsockname()):
            pass
        listener.close()
        thread.join(10)


@pytest.fixture
def scripted() -> Iterator[Callable[[Script], tuple[str, list[tuple[str, str]]]]]:
    with ExitStack() as stack:
        yield lambda script: stack.enter_context(_scripted(script))


def blob(number: int) -> bytes:
    data = f"blob {number}".encode()
    return reply("200 OK", data, latentrelay_job=f"job-{number}", etag=f'"{hashlib.sha256(data).hexdigest()}"')


def test_a_real_service_answers_every_client_once(tiny_cloud: str) -> None:
    asked = Requests("load", num_steps=4, split=2, guidance=2.0, height=16, width=16)
    load = run_load(tiny_cloud, asked, 3, each=2)
    assert len(load.answers) == 6
    assert (load.lost, load.refused, load.damaged, load.duplicated) == ({}, 0, 0, 0)
    assert len({answer.job for answer in load.answers}) == 6
    assert all(0 < answer.latency_ms <= 1e3 * load.elapsed_s + 1 for answer in load.answers)
    assert load.per_second == pytest.approx(6 / load.elapsed_s)


def test_requests_are_all_different() -> None:
    asked = Requests("x", split=1)
    made = [json.loads(next(asked)[1]) for _ in range(200)]
    assert len({body["prompt"] for body in made}) == len({body["seed"] for body in made}) == 200


def test_a_broken_connection_is_opened_again_under_the_same_key(scripted: Callable[..., tuple[str, list]]) -> None:
    url, seen = scripted(lambda number, *_: None if number == 0 else blob(number))
    load = run_load(url, Requests("cut"), 1, each=1)
    assert len(load.answers) == 1
    assert [key for _, key in seen] == ["cut-0", "cut-0"]


def test_a_service_that_is_full_is_asked_again_and_counted(scripted: Callable[..., tuple[str, list]]) -> None:
    url, _ = scripted(
        lambda number, *_: reply("503 Unavailable", retry_after="0") if number < 2 else blob(number)
    )  # fmt: skip
    load = run_load(url, Requests("full"), 1, each=1)
    assert (len(load.answers), load.refused, load.lost) == (1, 2, {})


def test_a_job_that_outlasts_one_request_is_asked_for(scripted: Callable[..., tuple[str, list]]) -> None:
    url, seen = scripted(
        lambda number, *_: reply("202 Accepted", location="/v1/handoffs/7") if number == 0 else blob(7)
    )
    load = run_load(url, Requests("long"), 1, each=1)
    assert load.answers[0].job == "job-7"
    assert seen[1][0].startswith("GET /v1/handoffs/7 ")


def test_what_never_comes_is_lost_with_its_reason(scripted: Callable[..., tuple[str, list]]) -> None:
    url, _ = scripted(lambda number, *_: reply("422 No", b"{}") if number == 0 else blob(number))
    load = run_load(url, Requests("bad"), 1, each=2)
    assert list(load.lost) == ["bad-0"]
    assert "422" in load.lost["bad-0"]
    hangs, _ = scripted(lambda *_: None)
    with pytest.raises(LoadError, match="no request was answered"):
        run_load(hangs, Requests("gone"), 2, each=1)


def test_answers_that_come_twice_or_damaged_are_counted(scripted: Callable[..., tuple[str, list]]) -> None:
    same, _ = scripted(lambda number, *_: blob(1))
    load = run_load(same, Requests("twice"), 1, each=3)
    assert load.duplicated == 4  # two answers too many, by job and by digest
    wrong, _ = scripted(lambda number, *_: reply("200 OK", b"data", etag='"00"'))
    assert run_load(wrong, Requests("damaged"), 1, each=1).damaged == 1


def test_figures_are_medians_over_rounds_and_ratios_within_them() -> None:
    def side(seconds: list[float], elapsed: float, start: int) -> Side:
        answers = [Answer(f"{start}{i}", f"{start}{i}", f"{start}{i}", 1, 0.0, s) for i, s in enumerate(seconds)]
        return Side(Load(2, answers, elapsed_s=elapsed, cpu_s=0.01), cpu_s=elapsed / 2, rss_mib=100.0)

    rounds = [
        Round(side([1.0, 1.0, 2.0, 2.0], 2.0, 1), side([2.0, 4.0], 4.0, 2), 4.0),
        Round(side([1.0, 1.0], 2.0, 3), side([1.0, 2.0], 2.0, 4), 2.0),
        Round(side([2.0, 2.0], 1.0, 5), side([4.0], 1.0, 6), 2.0),
    ]
    found = figures(rounds, threads=1)
    assert found["throughput_ratio"] == 2.0  # 4.0, 1.0, 2.0 by round
    assert found["throughput_ratio_spread"] == {"median": 2.0, "lowest": 1.0, "highest": 4.0}
    assert found["p95_ratio"] == 0.5
    assert found["static_batch_ratio"] == 0.5  # 0.5, 0.5, 1.0
    assert (found["p50_ms"], found["p95_ms"]) == (1000.0, 2000.0)
    assert (found["answers"], found["lost"], found["duplicated"]) == (8, 0, 0)
    assert found["cpu_share"]["ours"] == 0.5


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 1.0)] == [50.0, 95.0, 100.0]
    assert percentile([7.0], 0.95) == 7.0
