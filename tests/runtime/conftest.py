"""A tiny bundle made from hand-written ONNX graphs, and the NumPy reference of what it computes.

Latents (1, 4, 2, 2), prompt embeddings (2, 6, 3), four steps, pictures 16x16. The step graph is
`e = w x + u + g (c - u)` with u, c the means of the embeddings; `x0 = x - e`; `x' = a_i x + b_i e + c_i x0_prev`, the
memory selected away at step 0.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
import tokenizers
from latentrelay.runtime import manifest as m
from latentrelay.runtime.handoff import Handoff, HandoffMeta, prompt_digest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

C, H, W, TOKENS, WIDTH, STEPS = 4, 2, 2, 6, 3, 4
TIMESTEPS = (999, 700, 400, 100)
A = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
B = np.array([0.3, -0.2, 0.1, -0.4], np.float32)
M = np.array([5.0, 0.25, -0.5, 0.125], np.float32)
KERNEL = np.linspace(0.1, 0.4, C, dtype=np.float32).reshape(1, C, 1, 1)
WORDS = ["<start>", "<end>", "a", "red", "circle", "on", "blue", "square", "big"]
TABLE = np.linspace(-1, 1, len(WORDS) * WIDTH, dtype=np.float32).reshape(len(WORDS), WIDTH)
SCALING, SHIFT = 0.5, 0.25


def reference_embeds(ids: np.ndarray) -> np.ndarray:
    return TABLE[ids]


def reference_step(
    latents: np.ndarray, memory: np.ndarray, step: int, embeds: np.ndarray, guidance: float
) -> tuple[np.ndarray, np.ndarray]:
    u, c = embeds[0].mean(), embeds[1].mean()
    e = KERNEL * latents + np.float32(u + guidance * (c - u))
    used = np.zeros_like(latents) if step == 0 else memory
    return A[step] * latents + B[step] * e + M[step] * used, latents - e


def reference_pixels(latents: np.ndarray) -> np.ndarray:
    sample = np.tanh((latents / SCALING + SHIFT)[:, :3]).repeat(8, axis=2).repeat(8, axis=3)
    return np.clip(sample[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1)


def _value(name: str, kind: int, shape: list[Any]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, np.ndarray]) -> None:
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def write_text_encoder(path: Path) -> None:
    node = helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])
    _save(
        path,
        [node],
        [_value("input_ids", T.INT64, [1, TOKENS])],
        [_value("last_hidden_state", T.FLOAT, [1, TOKENS, WIDTH])],
        {"table": TABLE},
    )


def write_step_full(path: Path) -> None:
    make = helper.make_node
    nodes = [
        make("Gather", ["A", "step"], ["a"]),
        make("Gather", ["B", "step"], ["b"]),
        make("Gather", ["M", "step"], ["m"]),
        make("Gather", ["prompt_embeds", "zero"], ["u_all"]),
        make("Gather", ["prompt_embeds", "one"], ["c_all"]),
        make("ReduceMean", ["u_all"], ["u"], keepdims=0),
        make("ReduceMean", ["c_all"], ["c"], keepdims=0),
        make("Sub", ["c", "u"], ["gap"]),
        make("Mul", ["gap", "guidance"], ["guided"]),
        make("Add", ["guided", "u"], ["shift"]),
        make("Mul", ["latents", "kernel"], ["wx"]),
        make("Add", ["wx", "shift"], ["e"]),
        make("Sub", ["latents", "e"], ["next_x0_prev"]),
        make("Equal", ["step", "zero"], ["first"]),
        make("Where", ["first", "zeros", "x0_prev"], ["memory"]),
        make("Mul", ["latents", "a"], ["ax"]),
        make("Mul", ["e", "b"], ["be"]),
        make("Mul", ["memory", "m"], ["mm"]),
        make("Add", ["ax", "be"], ["axbe"]),
        make("Add", ["axbe", "mm"], ["next_latents"]),
    ]
    inputs = [
        _value("latents", T.FLOAT, [1, C, H, W]),
        _value("step", T.INT64, []),
        _value("prompt_embeds", T.FLOAT, [2, TOKENS, WIDTH]),
        _value("guidance", T.FLOAT, []),
        _value("x0_prev", T.FLOAT, [1, C, H, W]),
    ]
    outputs = [_value(name, T.FLOAT, [1, C, H, W]) for name in ("next_latents", "next_x0_prev")]
    zeros = np.zeros((1, C, H, W), np.float32)
    numbers = {"zero": np.array(0, np.int64), "one": np.array(1, np.int64)}
    _save(path, nodes, inputs, outputs, {"A": A, "B": B, "M": M, "kernel": KERNEL, "zeros": zeros, **numbers})
    model = onnx.load(path)
    externalise(model, "kernel", path.parent / "model.onnx_data")
    onnx.save(model, path)


def externalise(model: Any, name: str, data: Path, location: str | None = None) -> None:
    """Move one initializer into an external file, as exporters do; `location` overrides what the graph says."""
    tensor = next(item for item in model.graph.initializer if item.name == name)
    data.write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, location or data.name, offset=0, length=len(tensor.raw_data))
    tensor.ClearField("raw_data")


def write_vae_decoder(path: Path) -> None:
    nodes = [
        helper.make_node("Slice", ["latent_sample", "first", "third", "axis"], ["rgb"]),
        helper.make_node("Tanh", ["rgb"], ["small"]),
        helper.make_node(
            "Resize",
            ["small", "", "scales"],
            ["sample"],
            mode="nearest",
            nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        ),
    ]
    weights = {
        "first": np.array([0], np.int64),
        "third": np.array([3], np.int64),
        "axis": np.array([1], np.int64),
        "scales": np.array([1, 1, 8, 8], np.float32),
    }
    outputs = [_value("sample", T.FLOAT, [1, 3, 8 * H, 8 * W])]
    _save(path, nodes, [_value("latent_sample", T.FLOAT, [1, C, H, W])], outputs, weights)


def write_tokenizer(path: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="big")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def write_selftest(path: Path) -> None:
    noise = np.random.default_rng(0)
    latents, memory = (noise.standard_normal((1, C, H, W)).astype(np.float32) for _ in range(2))
    embeds = noise.standard_normal((2, TOKENS, WIDTH)).astype(np.float32)
    ids = np.array([[0, 2, 3, 4, 1, 1]], np.int64)
    after, x0 = reference_step(latents, memory, 2, embeds, 3.0)
    tensors = {
        "text_encoder.in.input_ids": ids,
        "text_encoder.out.last_hidden_state": reference_embeds(ids),
        "step_full.in.latents": latents,
        "step_full.in.step": np.array(2, np.int64),
        "step_full.in.prompt_embeds": embeds,
        "step_full.in.guidance": np.array(3.0, np.float32),
        "step_full.in.x0_prev": memory,
        "step_full.out.next_latents": after.astype(np.float32),
        "step_full.out.next_x0_prev": x0.astype(np.float32),
    }
    safetensors.numpy.save_file(tensors, path)


def port(name: str, role: str, dtype: str, *shape: int | str) -> m.Port:
    return m.Port(name, role, dtype, shape)


def components() -> dict[str, m.Component]:
    latents = (1, C, H, W)
    embeds = (2, TOKENS, WIDTH)
    return {
        "text_encoder": m.Component(
            "text_encoder",
            "text_encoder/model.onnx",
            (port("input_ids", "input_ids", "int64", 1, TOKENS),),
            (port("last_hidden_state", "prompt_embeds", "float32", 1, TOKENS, WIDTH),),
        ),
        "step_full": m.Component(
            "step_full",
            "unet/step_full.onnx",
            (
                port("latents", "latents", "float32", *latents),
                port("step", "step", "int64"),
                port("prompt_embeds", "prompt_embeds", "float32", *embeds),
                port("guidance", "guidance", "float32"),
                port("x0_prev", "x0_prev", "float32", *latents),
            ),
            (
                port("next_latents", "latents", "float32", *latents),
                port("next_x0_prev", "x0_prev", "float32", *latents),
            ),
        ),
        "vae_decoder": m.Component(
            "vae_decoder",
            "vae_decoder/model.onnx",
            (port("latent_sample", "latents", "float32", *latents),),
            (port("sample", "image", "float32", 1, 3, 8 * H, 8 * W),),
        ),
    }


def list_files(folder: Path) -> tuple[m.FileEntry, ...]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != m.MANIFEST_NAME)
    return tuple(
        m.FileEntry(
            path.relative_to(folder).as_posix(), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in paths
    )


def make_manifest(folder: Path, **changes: Any) -> m.Manifest:
    fields: dict[str, Any] = {
        "name": "tiny",
        "created_by": {"latentrelay": "0.1.0"},
        "source": m.Source("tiny", "sd1", "sha256:" + "ab" * 32, "Apache-2.0"),
        "profile": {"name": "generic", "memory_mib": 512},
        "precision": "fp32",
        "latent": m.LatentSpec(C, H, W, SCALING, SHIFT, 8),
        "image": m.ImageSpec(8 * H, 8 * W),
        "prediction_type": "epsilon",
        "schedule": m.Schedule(
            "dpmsolver++", "DPMSolverMultistepScheduler", "sha256:" + "cd" * 32, STEPS, TIMESTEPS, 1.0, True
        ),
        "guidance": m.Guidance(2.0),
        "tokenizer": m.TokenizerSpec("tokenizer/tokenizer.json", TOKENS, 0, 1, 1),
        "components": components(),
        "files": list_files(folder),
        "backend": m.BackendSpec("onnxruntime", ("CPUExecutionProvider",), {"intra_op_threads": 1}),
        "parity": {"step_full": {"snr_db": 120.5}},
        "selftest": m.SelftestSpec("selftest.safetensors", 60.0),
    }
    return m.Manifest(**{**fields, **changes}).sealed()


def write_bundle(folder: Path) -> Path:
    write_text_encoder(folder / "text_encoder/model.onnx")
    write_step_full(folder / "unet/step_full.onnx")
    write_vae_decoder(folder / "vae_decoder/model.onnx")
    write_tokenizer(folder / "tokenizer/tokenizer.json")
    write_selftest(folder / "selftest.safetensors")
    reseal(folder)
    return folder


def reseal(folder: Path, **changes: Any) -> m.Manifest:
    """Write a manifest that lists what lies in the folder now."""
    manifest = make_manifest(folder, **changes)
    (folder / m.MANIFEST_NAME).write_bytes(manifest.to_json_bytes())
    return manifest


def make_meta(**changes: Any) -> HandoffMeta:
    """Metadata that fits the tiny bundle, after two steps, for the prompt "a red circle"."""
    fields: dict[str, Any] = {
        "model_family": "sd1",
        "model_digest": "sha256:" + "ab" * 32,
        "scheduler_class": "DPMSolverMultistepScheduler",
        "scheduler_digest": "sha256:" + "cd" * 32,
        "num_steps": STEPS,
        "timesteps": TIMESTEPS,
        "next_step": 2,
        "prediction_type": "epsilon",
        "guidance": 2.0,
        "scaling_factor": SCALING,
        "shift_factor": SHIFT,
        "seed": 7,
        "init_noise_sigma": 1.0,
        "height": 8 * H,
        "width": 8 * W,
        "dtype": "float32",
        "prompt_salt": "00ff",
        "prompt_digest": prompt_digest("00ff", "a red circle", ""),
        "producer": {"name": "latentrelay", "version": "0.1.0"},
    }
    return HandoffMeta(**{**fields, **changes})


def make_handoff(dtype: str = "float32", memory: bool = True, **changes: Any) -> Handoff:
    values = np.linspace(-2, 2, C * H * W).reshape(1, C, H, W).astype(dtype)
    return Handoff(values, values * 2 if memory else None, make_meta(dtype=dtype, **changes))


@pytest.fixture(scope="session")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def bundle_folder(_pristine: Path, tmp_path: Path) -> Path:
    """A fresh copy of the tiny bundle."""
    return Path(shutil.copytree(_pristine, tmp_path / "bundle"))


@pytest.fixture
def kit() -> SimpleNamespace:
    """The builders and references above, without imports between test files."""
    return SimpleNamespace(**{name: value for name, value in globals().items() if not name.startswith("_")})


Answer = tuple[int, dict[str, str], bytes]
OLD_CLOUD: dict[str, Any] = {"wire_versions": ["1.0"]}


class LoopbackServer:
    """A real HTTP server on a loopback port; `answer(method, path, headers, body)` says what it returns.

    `pause_s` sends the body byte by byte with pauses. What is asked about `capabilities` is answered with those and
    not recorded: by default a cloud's from before there were idempotency keys. None: `answer` does that too."""

    def __init__(
        self,
        answer: Callable[[str, str, dict[str, str], bytes], Answer],
        pause_s: float = 0.0,
        capabilities: dict[str, Any] | None = OLD_CLOUD,
    ) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {key.lower(): value for key, value in self.headers.items()}
                if capabilities is not None and self.path == "/v1/capabilities":
                    document = json.dumps(capabilities).encode()
                    status, answer_headers, data = 200, {"Content-Type": "application/json"}, document
                else:
                    requests.append((self.command, self.path, headers, body))
                    status, answer_headers, data = answer(self.command, self.path, headers, body)
                self.send_response(status)
                for key, value in {"Content-Length": str(len(data)), **answer_headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self._write(data)

            def _write(self, data: bytes) -> None:
                pieces = [data[i : i + 1] for i in range(len(data))] if pause_s else [data]
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    for piece in pieces:
                        self.wfile.write(piece)
                        time.sleep(pause_s)

            do_GET = do_POST = do_DELETE = _serve

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[..., Answer]], LoopbackServer]]:
    """Start loopback servers that stop with the test."""
    servers: list[LoopbackServer] = []

    def start(answer: Callable[..., Answer], pause_s: float = 0.0, **options: Any) -> LoopbackServer:
        servers.append(LoopbackServer(answer, pause_s, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
