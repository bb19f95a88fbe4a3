"""The whole chain: device alone, with a cloud on a real socket, with a ready handoff, and every way it can end."""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from latentrelay.runtime import MEDIA_TYPE, Bundle, CloudClient, Handoff, Session, StepEvent, generate, initial_noise
from latentrelay.runtime.errors import (
    BundleTamperedError,
    CloudRefusedError,
    CloudUnavailableError,
    HandoffMismatchError,
    RequestError,
    RunCancelledError,
)
from latentrelay.runtime.handoff import prompt_digest
from PIL import Image

PROMPT, NEGATIVE = "a red circle", "blue"


def reference_run(kit: SimpleNamespace, seed: int, guidance: float, last: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Latents and memory after steps 0 .. last-1, in NumPy."""
    ids = [np.array([0, 6, 1, 1, 1, 1]), np.array([0, 2, 3, 4, 1, 1])]
    embeds = np.stack([kit.reference_embeds(row) for row in ids])
    latents, memory = initial_noise(seed, (1, 4, 2, 2)), np.zeros((1, 4, 2, 2), np.float32)
    for step in range(last):
        latents, memory = kit.reference_step(latents, memory, step, embeds, guidance)
    return latents.astype(np.float32), memory.astype(np.float32)


def made_handoff(kit: SimpleNamespace, asked: dict[str, Any]) -> Handoff:
    latents, memory = reference_run(kit, asked["seed"], asked["guidance"], asked["split"])
    meta = kit.make_meta(
        next_step=asked["split"],
        seed=asked["seed"],
        guidance=asked["guidance"],
        dtype=asked["dtype"],
        prompt_digest=prompt_digest("00ff", asked["prompt"], asked["negative_prompt"]),
    )
    dtype = asked["dtype"]
    return Handoff(latents.astype(dtype), memory.astype(dtype) if asked["split"] else None, meta)


@pytest.fixture
def cloud(serve: Callable[..., Any], kit: SimpleNamespace) -> Any:
    """A small cloud that runs the reference in NumPy."""

    def answer(_: str, __: str, ___: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        blob = made_handoff(kit, json.loads(body)).to_bytes()
        return 200, {"Content-Type": MEDIA_TYPE, "ETag": f'"{hashlib.sha256(blob).hexdigest()}"'}, blob

    return serve(answer)


def test_device_alone_is_the_reference(bundle_folder: Path, kit: SimpleNamespace) -> None:
    result = generate(bundle_folder, PROMPT, negative_prompt=NEGATIVE, seed=5)
    latents, _ = reference_run(kit, 5, 2.0)
    np.testing.assert_allclose(result.latents, latents, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.pixels, kit.reference_pixels(result.latents), rtol=1e-4, atol=1e-5)
    assert (result.path_taken, result.steps, result.handoff_bytes) == ("device", {"cloud": 0, "device": 4}, 0)
    assert (result.seed, result.guidance, result.providers) == (5, 2.0, ("CPUExecutionProvider",))
    assert result.digest == Bundle.open(bundle_folder).digest
    assert list(result.ms) == ["handoff", "load", "text_encoder", "steps", "first_step", "decode", "total"]
    assert result.ms["total"] >= sum(result.ms[name] for name in ("load", "text_encoder", "steps", "decode"))
    assert 0 < result.ms["first_step"] <= result.ms["steps"]
    assert result.ms["handoff"] == 0


@pytest.mark.parametrize("split", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_split_ends_at_the_same_latents(
    bundle_folder: Path, kit: SimpleNamespace, cloud: Any, split: int, dtype: str
) -> None:
    result = generate(
        bundle_folder,
        PROMPT,
        negative_prompt=NEGATIVE,
        seed=9,
        guidance=3.5,
        split=split,
        cloud=cloud.url,
        wire_dtype=dtype,
    )
    tolerance = 1e-5 if dtype == "float32" else 3e-3
    latents, _ = reference_run(kit, 9, 3.5)
    assert np.abs(result.latents - latents).max() <= tolerance * max(1.0, float(np.abs(latents).max()))
    assert result.steps == {"cloud": split, "device": 4 - split}
    assert result.path_taken == {0: "device", 4: "cloud"}.get(split, "hybrid")
    assert (result.handoff_bytes > 0) == (result.ms["handoff"] > 0) == (split > 0)
    assert len(cloud.requests) == (1 if split else 0)
    assert (result.ms["text_encoder"] == 0) == (split == 4)


def test_the_default_split_with_a_cloud_is_half(bundle_folder: Path, cloud: Any) -> None:
    with CloudClient(cloud.url) as client:
        assert generate(bundle_folder, PROMPT, cloud=client).steps == {"cloud": 2, "device": 2}


def test_several_pictures_share_a_session(bundle_folder: Path, kit: SimpleNamespace, cloud: Any) -> None:
    with Session(Bundle.open(bundle_folder)) as session:
        results = [generate(session, PROMPT, negative_prompt=NEGATIVE, seed=s, cloud=cloud.url) for s in (1, 2)]
        assert session.is_open("text_encoder")
        assert session.is_open("step_full")
    assert results[1].ms["load"] < results[0].ms["load"]
    for seed, result in zip((1, 2), results, strict=True):
        assert np.abs(result.latents - reference_run(kit, seed, 2.0)[0]).max() < 0.02


def test_a_ready_handoff_brings_its_own_seed_guidance_and_split(bundle_folder: Path, kit: SimpleNamespace) -> None:
    asked = {"seed": 3, "guidance": 4.0, "split": 3, "dtype": "float32", "prompt": PROMPT, "negative_prompt": NEGATIVE}
    handoff = made_handoff(kit, asked)
    result = generate(bundle_folder, PROMPT, negative_prompt=NEGATIVE, handoff=handoff)
    np.testing.assert_allclose(result.latents, reference_run(kit, 3, 4.0)[0], rtol=1e-4, atol=1e-5)
    assert (result.seed, result.guidance, result.path_taken) == (3, 4.0, "hybrid")
    assert result.handoff_bytes == len(handoff.to_bytes())
    for changes, field in [
        ({"prompt": "a blue circle"}, "prompt_digest"),
        ({"negative_prompt": ""}, "prompt_digest"),
        ({"split": 2}, "next_step"),
        ({"guidance": 4.5}, "guidance"),
    ]:
        with pytest.raises(HandoffMismatchError) as caught:
            generate(bundle_folder, **{"prompt": PROMPT, "negative_prompt": NEGATIVE, "handoff": handoff, **changes})
        assert caught.value.field == field


def test_a_cloud_that_is_gone_is_said(bundle_folder: Path, kit: SimpleNamespace) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        result = generate(bundle_folder, PROMPT, negative_prompt=NEGATIVE, seed=5, cloud=url, split=2)
        with pytest.raises(CloudUnavailableError):
            generate(bundle_folder, PROMPT, cloud=url, split=2, fallback=False)
    assert (result.path_taken, result.steps) == ("device-fallback", {"cloud": 0, "device": 4})
    assert "cannot be reached" in (result.fallback_reason or "")
    np.testing.assert_allclose(result.latents, reference_run(kit, 5, 2.0)[0], rtol=1e-4, atol=1e-5)


def test_a_refusal_is_raised_not_hidden(bundle_folder: Path, serve: Callable[..., Any]) -> None:
    server = serve(lambda *_: (409, {"Content-Type": "application/problem+json"}, b'{"detail":"no"}'))
    with pytest.raises(CloudRefusedError):
        generate(bundle_folder, PROMPT, cloud=server.url)


@pytest.mark.parametrize(
    ("field", "value"), [("model_digest", "sha256:other"), ("seed", 8), ("guidance", 2.5), ("next_step", 3)]
)
def test_a_cloud_that_answers_something_else_is_refused(
    bundle_folder: Path, serve: Callable[..., Any], kit: SimpleNamespace, field: str, value: Any
) -> None:
    blob = kit.make_handoff(**{field: value}).to_bytes()
    digest = base64.b64encode(hashlib.sha256(blob).digest()).decode()
    server = serve(lambda *_: (200, {"Content-Type": MEDIA_TYPE, "Repr-Digest": f"sha-256=:{digest}:"}, blob))
    with pytest.raises(HandoffMismatchError, match=field):
        generate(bundle_folder, PROMPT, seed=7, cloud=server.url)


def test_steps_are_reported_and_can_be_cancelled(bundle_folder: Path) -> None:
    seen: list[StepEvent] = []
    stop = threading.Event()

    def on_step(event: StepEvent) -> None:
        seen.append(event)
        if event.step == 1:
            stop.set()

    with pytest.raises(RunCancelledError):
        generate(bundle_folder, PROMPT, on_step=on_step, cancel=stop.is_set)
    assert [event.step for event in seen] == [0, 1]
    seen.clear()
    with pytest.raises(RunCancelledError):
        generate(bundle_folder, PROMPT, on_step=on_step, cancel=stop.is_set)
    assert seen == []


def test_arguments_that_make_no_sense(bundle_folder: Path, kit: SimpleNamespace) -> None:
    for arguments, message in [
        ({"split": 2}, "needs a cloud"),
        ({"split": 5, "cloud": "http://127.0.0.1:1"}, "split"),
        ({"split": -1}, "split"),
        ({"handoff": kit.make_handoff(), "cloud": "http://127.0.0.1:1"}, "both"),
        ({"seed": -1}, "seed"),
        ({"cloud": "nowhere"}, "address"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"guidance": -1.0}, "guidance"),
    ]:
        with pytest.raises(RequestError, match=message) as caught:
            generate(bundle_folder, PROMPT, **arguments)  # type: ignore[arg-type]
        assert caught.value.exit_status == 2


def test_a_folder_is_verified_first(bundle_folder: Path) -> None:
    (bundle_folder / "unet/model.onnx_data").write_bytes(b"0" * 16)
    with pytest.raises(BundleTamperedError):
        generate(bundle_folder, PROMPT)


def test_the_picture_is_saved_whole_or_not_at_all(bundle_folder: Path, tmp_path: Path) -> None:
    result = generate(bundle_folder, PROMPT, seed=1)
    target = result.save_png(tmp_path / "out.png")
    with Image.open(target) as image:
        pixels = np.asarray(image)
    np.testing.assert_array_equal(pixels, np.round(result.pixels * 255).astype(np.uint8))
    assert pixels.shape == (16, 16, 3)
    before = target.read_bytes()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError, match=r"folder\.png"):
        result.save_png(tmp_path / "folder.png")
    assert target.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "folder.png", "out.png"]
    with pytest.raises(FileNotFoundError):
        result.save_png(tmp_path / "nowhere/out.png")


@pytest.mark.parametrize("guidance", [0.0, 0.5, 0.999])
def test_guidance_below_one_is_refused_not_reinterpreted(bundle_folder: Path, guidance: float) -> None:
    """diffusers switches guidance off there; the step graph would interpolate to the unconditional branch."""
    with pytest.raises(RequestError, match="guidance is out of range"):
        generate(bundle_folder, PROMPT, guidance=guidance)
