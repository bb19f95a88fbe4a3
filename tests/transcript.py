"""The golden transcript: how tests/golden/transcript-1/ was recorded, and how the server's side is recorded again.

`record(url)` has a whole conversation with a running service over a bare socket and returns its exchanges, bytes as
they crossed; `record_loops(bundle, folder)` runs a bundle and keeps every graph call. A new set is written by
`python tests/transcript.py FOLDER URL`, or without URL the loops alone; one that is there is never written again.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import safetensors.numpy

TOKEN, KEY = "golden-token", "golden-key-1"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MEDIA_TYPE = "application/vnd.latentrelay.handoff"
CUT = 500  # bytes of the blob that come before the connection is cut
PROMPT, NEGATIVE, SEED = "a red cät", "blue", 7


@dataclass(frozen=True)
class Exchanged:
    """One request and its answer, whole, as bytes; `cut`: the connection ended there, before the body did."""

    name: str
    request: bytes
    answer: bytes
    cut: bool = False

    @property
    def status(self) -> int:
        return int(self.answer.split(b" ", 2)[1])

    @property
    def headers(self) -> dict[str, str]:
        lines = self.answer.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    @property
    def body(self) -> bytes:
        """The body, chunked coding taken off."""
        rest = self.answer.partition(b"\r\n\r\n")[2]
        if self.headers.get("transfer-encoding") != "chunked":
            return rest
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        return body


def request_bytes(method: str, path: str, accept: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """An HTTP/1.1 request with the headers that every one has."""
    lines = [f"{method} {path} HTTP/1.1", "Host: cloud.example", f"Authorization: Bearer {TOKEN}"]
    lines += [f"Accept: {accept}, application/problem+json", "Accept-Encoding: identity", f"traceparent: {TRACE}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def asked(url: str, request: bytes) -> bytes:
    """Everything that comes back until the server closes."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=60) as connection:
        connection.sendall(request)
        pieces = []
        while piece := connection.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def record(url: str) -> list[Exchanged]:
    """The conversation: capabilities, a job, its events, its blob cut and resumed, repetitions, refusals, the end."""
    made: list[Exchanged] = []

    def say(name: str, method: str, path: str, accept: str, body: bytes = b"", **headers: str) -> Exchanged:
        request = request_bytes(
            method, path, accept, {key.replace("_", "-"): val for key, val in headers.items()}, body
        )
        made.append(Exchanged(name, request, asked(url, request)))
        return made[-1]

    served = json.loads(say("capabilities", "GET", "/v1/capabilities", "application/json").body)
    wanted = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "seed": SEED,
        "guidance": 2.5,
        "height": 16,
        "width": 16,
        "num_steps": 4,
        "split": 2,
        "dtype": "float16",
        "sampler": "dpmsolver++",
        "model_digest": served["model"]["digest"],
        "scheduler_digest": served["samplers"]["dpmsolver++"]["scheduler_digest"],
        "wire_versions": ["1.1", "1.0"],
        "deadline_ms": 60000,
    }
    body = json.dumps(wanted, ensure_ascii=False, separators=(",", ":")).encode()
    posted = say("post", "POST", "/v1/handoffs", MEDIA_TYPE, body, Prefer="respond-async", Idempotency_Key=KEY)
    path = posted.headers["location"]
    say("events", "GET", path, "text/event-stream")
    say("status", "GET", path, "application/json")
    whole = say("blob-cut", "GET", path, MEDIA_TYPE)
    head = len(whole.answer) - len(whole.body)
    made[-1] = Exchanged("blob-cut", whole.request, whole.answer[: head + CUT], cut=True)
    etag = whole.headers["etag"]
    say("blob-rest", "GET", path, MEDIA_TYPE, Range=f"bytes={CUT}-", If_Range=etag)
    say("post-again", "POST", "/v1/handoffs", MEDIA_TYPE, body, Prefer="wait=10", Idempotency_Key=KEY)
    other = body.replace(b'"seed":7', b'"seed":8')
    say("post-another-body", "POST", "/v1/handoffs", MEDIA_TYPE, other, Prefer="wait=10", Idempotency_Key=KEY)
    wrong = body.replace(served["model"]["digest"].encode(), b"sha256:" + b"0" * 64)
    say(
        "post-another-model",
        "POST",
        "/v1/handoffs",
        MEDIA_TYPE,
        wrong,
        Prefer="wait=10",
        Idempotency_Key="golden-key-2",
    )
    say("not-modified", "GET", path, MEDIA_TYPE, If_None_Match=etag)
    say("beyond", "GET", path, MEDIA_TYPE, Range="bytes=1000000-", If_Range=etag)
    say("delete", "DELETE", path, "application/json")
    say("gone", "GET", path, MEDIA_TYPE)
    return made


def write_wire(folder: Path, exchanges: list[Exchanged]) -> None:
    """wire/NN-name.request and .answer, the blob and its arrays, and transcript.json that says what is what."""
    wire = folder / "wire"
    wire.mkdir(parents=True)
    entries = []
    for number, each in enumerate(exchanges, 1):
        stem = f"{number:02d}-{each.name}"
        (wire / f"{stem}.request").write_bytes(each.request)
        (wire / f"{stem}.answer").write_bytes(each.answer)
        entries.append({"name": each.name, "status": each.status, "file": stem, "cut": each.cut})
    by_name = {each.name: each for each in exchanges}
    blob = by_name["blob-cut"].body + by_name["blob-rest"].body
    (wire / "handoff.safetensors").write_bytes(blob)
    tensors = safetensors.numpy.load(blob)
    for name, array in tensors.items():
        (wire / f"{name}.f32").write_bytes(array.astype("<f4").tobytes())
    shapes = {name: list(array.shape) for name, array in tensors.items()}
    length = int.from_bytes(blob[:8], "little")
    meta = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["latentrelay"])
    document = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "token": TOKEN,
        "cut_after": CUT,
        "sha256": hashlib.sha256(blob).hexdigest(),
        "bytes": len(blob),
        "shapes": shapes,
        "metadata": meta,
        "exchanges": entries,
    }
    (wire / "transcript.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def record_loops(bundle: Path, folder: Path) -> None:
    """loop/: noise of seeds, and every graph call of runs of `bundle`, from noise and from a handoff, at each level."""
    from latentrelay.runtime import Bundle, Handoff, Session, initial_noise
    from latentrelay.runtime.handoff import HandoffMeta, prompt_digest

    loop = folder / "loop"
    loop.mkdir(parents=True)
    noises = [(7, (1, 4, 2, 2)), (2**32 + 5, (1, 4, 8, 8)), (123, (1, 4, 3, 3))]
    for number, (seed, shape) in enumerate(noises, 1):
        (loop / f"noise-{number}.f32").write_bytes(initial_noise(seed, shape).astype("<f4").tobytes())
    facts: dict[str, Any] = {
        "bundle": bundle.name,
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "noise": [
            {"file": f"noise-{n}.f32", "seed": seed, "shape": list(shape)} for n, (seed, shape) in enumerate(noises, 1)
        ],
        "runs": [],
    }
    with Session(Bundle.open(bundle)) as session:
        manifest = session.manifest
        embeds = session.encode("a red circle", "blue")
        first = next(session.run_steps(session.initial_latents(7), None, 0, embeds, 2.0, 7, predict=False))
        meta = HandoffMeta(
            model_family=manifest.source.family,
            model_digest=manifest.source.digest,
            scheduler_class=manifest.schedule.scheduler_class,
            scheduler_digest=manifest.schedule.scheduler_digest,
            num_steps=manifest.schedule.num_steps,
            timesteps=manifest.schedule.timesteps,
            next_step=1,
            prediction_type=manifest.prediction_type,
            guidance=2.0,
            scaling_factor=manifest.latent.scaling_factor,
            shift_factor=manifest.latent.shift_factor,
            seed=7,
            init_noise_sigma=manifest.schedule.init_noise_sigma,
            height=manifest.image.height,
            width=manifest.image.width,
            dtype="float32",
            prompt_salt="00ff",
            prompt_digest=prompt_digest("00ff", "a red circle", "blue"),
            producer={"name": "latentrelay", "version": "0.1.0"},
            schema_version="1.1",
        )
        handoff = Handoff(first.latents, first.x0_prev, meta)
        (loop / "handoff.safetensors").write_bytes(handoff.to_bytes())
        starts = [(0, session.initial_latents(7), None), (1, handoff.latents, handoff.x0_prev)]
        for split, latents, memory in starts:
            for level in ("normal", "hot"):
                facts["runs"].append(_run(session, loop, split, level, latents, memory, embeds))
    (loop / "loop.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _run(session: Any, loop: Path, split: int, level: str, latents: Any, memory: Any, embeds: Any) -> dict[str, Any]:
    """One run with every graph call kept: arrays by role, `in.ROLE` and `out.ROLE`."""
    calls: list[dict[str, Any]] = []
    plain, stem = session.run_component, f"run-{split}-{level}"

    def kept(component: str, inputs: Any, outputs: Any = None) -> Any:
        spec = session.manifest.components[component]
        before = {f"in.{port.role}": np.array(inputs[port.name], dtype=port.dtype) for port in spec.inputs}
        made = plain(component, inputs, outputs)
        after = {f"out.{port.role}": np.array(made[port.name]) for port in spec.outputs}
        name = f"{stem}-call-{len(calls)}.safetensors"
        safetensors.numpy.save_file({**before, **after}, loop / name)
        calls.append({"graph": component, "step": int(before["in.step"]), "file": name})
        return made

    session.run_component = kept
    try:
        events = list(session.run_steps(latents, memory, split, embeds, 2.0, 7, level=level))
    finally:
        del session.run_component
    (loop / f"{stem}-latents.f32").write_bytes(events[-1].latents.astype("<f4").tobytes())
    mask = session.mask(split, level=level)
    return {
        "split": split,
        "level": level,
        "split_row": mask.row,
        "mask": list(mask.mask),
        "kinds": [event.kind for event in events],
        "calls": calls,
        "latents": f"{stem}-latents.f32",
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists():
        sys.exit(f"{target} is there: a transcript is never written again")
    if sys.argv[2:]:
        write_wire(target, record(sys.argv[2]))
    record_loops(Path(__file__).parent / "golden/bundle-1.4-noise", target)
