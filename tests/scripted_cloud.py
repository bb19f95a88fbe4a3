"""A cloud on a bare socket whose every byte a test decides: jobs and keys as on the wire, and faults on order.

`run(body)` makes the handoff of a request document. `faults` are taken one a request, in order, by the requests that
`fault_for` picks (all but those for capabilities): None lets it pass, `Cut(n)` resets the connection after n bytes of
the answer, `Raw(bytes)` answers with those, `Hang()` says nothing until the server stops. It is no reference: what a
real service does is checked in tests/cloud.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MEDIA_TYPE = "application/vnd.latentrelay.handoff"
FEATURES = ["accept_splits", "deadline", "deterministic", "events", "idempotency", "preview", "range"]


@dataclass(frozen=True)
class Cut:
    """The connection is reset after so many bytes of the answer (`body`: of its body)."""

    after: int
    body: bool = False


@dataclass(frozen=True)
class Raw:
    """These bytes are the answer; then the connection is closed."""

    data: bytes


@dataclass(frozen=True)
class Refuse:
    """A problem document."""

    status: int
    kind: str
    retry_after: int | None = None
    job: bool = False  # it names a job, as what is said of one that was accepted does


@dataclass(frozen=True)
class Hang:
    """Nothing, until the server stops."""


Fault = Cut | Raw | Refuse | Hang | None


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Job:
    """One job; it is done when `steps_done` reaches what it is handed over at."""

    id: str
    document: dict[str, Any]
    blob: bytes
    reached: int
    step: int = 0
    state: str = "running"
    problem: dict[str, Any] | None = None

    def status(self) -> dict[str, Any]:
        document = self.document
        return {
            "id": self.id,
            "state": self.state,
            "step": self.step,
            "split": document["split"],
            "num_steps": document["num_steps"],
            "next_step": self.reached if self.state == "done" else None,
            "queue_position": None,
            "attempts": 1,
            "etag": None,
            "bytes": None,
            "cloud_ms": None,
            "expires_in_s": None,
            "problem": self.problem,
        }


@dataclass(eq=False)
class ScriptedCloud:
    run: Callable[[dict[str, Any]], Any]
    step_s: float = 0.0
    reach: Callable[[dict[str, Any]], int] | None = None  # the split that is reached
    capabilities: dict[str, Any] = field(default_factory=dict)
    fail: dict[str, Any] | None = None  # jobs end with this problem
    preview: bool = False
    faults: list[Fault] = field(default_factory=list)
    fault_for: Callable[[Request], bool] = lambda request: request.path != "/v1/capabilities"

    def __post_init__(self) -> None:
        self.requests: list[Request] = []
        self.jobs: dict[str, Job] = {}
        self.keys: dict[str, tuple[str, bytes]] = {}
        self.made = 0  # jobs that were run
        self.open = 0  # connections accepted
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._start(self._accept)

    def asked(self, method: str, path: str = "") -> list[Request]:
        """The requests with this method and this in their path."""
        return [each for each in self.requests if each.method == method and path in each.path]

    def stop(self) -> None:
        """Close everything; hanging answers end."""
        self._stopped.set()
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.open += 1
            self._sockets.append(connection)
            self._start(self._talk, connection)

    def _talk(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as stream:
            while (request := self._read(stream)) is not None:
                with self._lock:
                    self.requests.append(request)
                    takes = self.fault_for(request) and bool(self.faults)
                    fault = self.faults.pop(0) if takes else None
                if not self._reply(connection, request, fault):
                    return

    def _read(self, stream: Any) -> Request | None:
        first = stream.readline().decode("latin-1").split()
        if len(first) != 3:
            return None
        lines = iter(lambda: stream.readline().decode("latin-1").strip(), "")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return Request(first[0], first[1], headers, stream.read(int(headers.get("content-length", 0))))

    def _reply(self, connection: socket.socket, request: Request, fault: Fault) -> bool:
        """Answer; whether the connection goes on."""
        if isinstance(fault, Hang):
            self._stopped.wait()
            return False
        if isinstance(fault, Raw):
            connection.sendall(fault.data)
            return False
        if isinstance(fault, Refuse):
            problem = {"type": f"urn:latentrelay:problem:{fault.kind}", "status": fault.status, "detail": fault.kind}
            extra = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            extra |= {"Latentrelay-Job": "a1"} if fault.job else {}
            connection.sendall(_whole(fault.status, "application/problem+json", json.dumps(problem).encode(), extra))
            return True
        sent = 0
        for piece in self._answer(request):
            if isinstance(fault, Cut):
                head = piece.find(b"\r\n\r\n") + 4 if fault.body else 0
                left = fault.after + head - sent
                if left < len(piece):
                    connection.sendall(piece[:left])
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return False
            connection.sendall(piece)
            sent += len(piece)
        return "text/event-stream" not in request.headers.get("accept", "")

    def _answer(self, request: Request) -> Any:
        if request.path == "/v1/capabilities":
            served = {"wire_versions": ["1.1", "1.0"], "features": FEATURES, **self.capabilities}
            yield _whole(200, "application/json", json.dumps(served).encode())
        elif request.method == "POST":
            yield self._posted(request)
        else:
            with self._lock:
                job = self.jobs.get(request.path.rpartition("/")[2])
            if job is None:
                problem = {"type": "urn:latentrelay:problem:unknown-handoff", "status": 404, "detail": "none"}
                yield _whole(404, "application/problem+json", json.dumps(problem).encode())
            elif request.method == "DELETE":
                job.state = "cancelled" if job.state == "running" else "deleted"
                yield _whole(200, "application/json", json.dumps(job.status()).encode())
            elif "text/event-stream" in request.headers["accept"]:
                yield from self._events(job)
            elif request.headers["accept"].startswith("application/json"):
                yield _whole(200, "application/json", json.dumps(job.status()).encode())
            else:
                yield self._blob(job, request, {})

    def _posted(self, request: Request) -> bytes:
        document, key = json.loads(request.body), request.headers["idempotency-key"]
        with self._lock:
            known = self.keys.get(key)
            if known is not None and known[1] != request.body:
                problem = {"type": "urn:latentrelay:problem:idempotency-key-reused", "status": 422, "detail": "other"}
                return _whole(422, "application/problem+json", json.dumps(problem).encode())
            if known is None or known[0] not in self.jobs:
                job = self._job(document, key)
                self.keys[key] = (job.id, request.body)
            job = self.jobs[self.keys[key][0]]
        extra = {"Location": f"/v1/handoffs/{job.id}", "Latentrelay-Job": job.id}
        extra |= {"Idempotency-Replayed": "true"} if known is not None else {}
        if request.headers.get("prefer") == "respond-async":
            return _whole(202, "application/json", json.dumps(job.status()).encode(), {**extra, "Retry-After": "1"})
        return self._blob(job, request, extra)

    def _job(self, document: dict[str, Any], key: str) -> Job:
        reached = self.reach(document) if self.reach is not None else document["split"]
        blob = self.run({**document, "split": reached}).to_bytes()
        job = Job(hashlib.sha256(f"{key}{self.made}".encode()).hexdigest()[:32], document, blob, reached)
        self.made += 1
        self.jobs[job.id] = job
        self._start(self._work, job)
        return job

    def _work(self, job: Job) -> None:
        while job.step < job.reached and job.state == "running":
            if self._stopped.wait(self.step_s):
                return
            job.step += 1
        if job.state == "running":
            job.state, job.problem = ("failed", self.fail) if self.fail is not None else ("done", None)

    def _blob(self, job: Job, request: Request, extra: dict[str, str]) -> bytes:
        prefer = request.headers.get("prefer", "")
        until = time.monotonic() + (float(prefer.partition("=")[2] or 30) if prefer.startswith("wait") else 0)
        while job.state == "running" and time.monotonic() < until and not self._stopped.is_set():
            time.sleep(0.002)
        if job.state == "running":
            return _whole(202, "application/json", json.dumps(job.status()).encode(), {**extra, "Retry-After": "1"})
        if job.problem is not None:
            return _whole(job.problem["status"], "application/problem+json", json.dumps(job.problem).encode())
        if job.state != "done":
            problem = {"type": f"urn:latentrelay:problem:{job.state}", "status": 410, "detail": job.state}
            return _whole(410, "application/problem+json", json.dumps(problem).encode())
        digest = hashlib.sha256(job.blob)
        etag = f'"{digest.hexdigest()}"'
        headers = {**extra, "ETag": etag, "Accept-Ranges": "bytes"}
        headers["Repr-Digest"] = f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
        asked = request.headers.get("range")
        if asked and request.headers.get("if-range", etag) == etag:
            first, size = int(asked.removeprefix("bytes=").rstrip("-")), len(job.blob)
            if first >= size:
                return _whole(416, "application/problem+json", b"{}", {"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
            return _whole(206, MEDIA_TYPE, job.blob[first:], headers)
        return _whole(200, MEDIA_TYPE, job.blob, headers)

    def _events(self, job: Job) -> Any:
        yield b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nConnection: close\r\n\r\n"
        seen = -1
        while not self._stopped.is_set():
            ended = job.state != "running"
            if ended or job.step != seen:
                seen = job.step
                document = job.status()
                if self.preview and not ended:
                    document["preview"] = {"height": 1, "width": 2, "rgb": base64.b64encode(b"abcdef").decode()}
                name = job.state if ended else "progress"
                yield f"event: {name}\nid: {seen}\ndata: {json.dumps(document)}\n\n".encode()
            if ended:
                return
            time.sleep(0.002)


def _whole(status: int, media_type: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """One answer with its length; the connection stays."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {media_type}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
