"""The handoff's bytes, what its parser refuses, and what does not fit a bundle."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from latentrelay.runtime.errors import HandoffError, HandoffFormatError, HandoffMismatchError
from latentrelay.runtime.handoff import Handoff, HandoffLimits, HandoffMeta, prompt_digest
from latentrelay.runtime.manifest import Manifest


def rebuilt(blob: bytes, change: Callable[[dict[str, Any], bytearray], None]) -> bytes:
    """The blob with its header and body changed, length kept right."""
    length = int.from_bytes(blob[:8], "little")
    header, body = json.loads(blob[8 : 8 + length]), bytearray(blob[8 + length :])
    change(header, body)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(body)


def with_meta(blob: bytes, **changes: Any) -> bytes:
    def change(header: dict[str, Any], _: bytearray) -> None:
        meta = json.loads(header["__metadata__"]["latentrelay"])
        header["__metadata__"]["latentrelay"] = json.dumps({**meta, **changes})

    return rebuilt(blob, change)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("memory", [True, False])
def test_round_trip_is_byte_exact(kit: SimpleNamespace, dtype: str, memory: bool) -> None:
    handoff = kit.make_handoff(dtype, memory)
    again = Handoff.from_bytes(handoff.to_bytes())
    assert again.to_bytes() == handoff.to_bytes()
    assert again == handoff
    assert hash(again) == hash(handoff)
    assert again.meta == handoff.meta
    assert again.latents.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(again.latents, handoff.latents)
    assert (again.x0_prev is None) == (not memory)


def test_it_is_a_safetensors_file(kit: SimpleNamespace) -> None:
    handoff = kit.make_handoff("float16")
    tensors = safetensors.numpy.load(handoff.to_bytes())
    assert set(tensors) == {"latents", "x0_prev"}
    np.testing.assert_array_equal(tensors["x0_prev"], handoff.x0_prev)
    assert int.from_bytes(handoff.to_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize(("next_step", "memory"), [(0, False), (4, False), (4, True)])
def test_splits_at_both_ends_are_legal(kit: SimpleNamespace, bundle_folder: Path, next_step: int, memory: bool) -> None:
    handoff = kit.make_handoff(next_step=next_step, memory=memory)
    again = Handoff.from_bytes(handoff.to_bytes())
    again.check(kit.make_manifest(bundle_folder))
    assert (again.meta.next_step, again.x0_prev is not None) == (next_step, memory)


def test_a_newer_minor_versions_keys_survive(kit: SimpleNamespace) -> None:
    blob = with_meta(kit.make_handoff().to_bytes(), schema_version="1.7", colour="red", additional_metadata={"x": [1]})
    handoff = Handoff.from_bytes(blob)
    assert handoff.meta.extra == {"colour": "red"}
    assert handoff.meta.additional_metadata == {"x": [1]}
    assert Handoff.from_bytes(handoff.to_bytes()).meta == handoff.meta


META_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"colour": "red"}, "unknown key colour"),
    ({"schema_version": "2.0"}, "update latentrelay"),
    ({"schema_version": None}, "schema_version"),
    ({"model_family": "sdxl"}, "model_family"),
    ({"prediction_type": "sample"}, "prediction_type"),
    ({"dtype": "float16"}, "F32"),
    ({"dtype": "bfloat16"}, "dtype"),
    ({"generator": "philox"}, "generator"),
    ({"num_steps": 0}, "num_steps"),
    ({"num_steps": 10**9}, "num_steps"),
    ({"timesteps": [1]}, "timesteps"),
    ({"timesteps": "1234"}, "timesteps"),
    ({"next_step": 5}, "next_step"),
    ({"next_step": -1}, "next_step"),
    ({"next_step": 1.5}, "next_step"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"height": 0}, "height"),
    ({"guidance": "7"}, "guidance"),
    ({"guidance": 1e300}, "numbers"),
    ({"prompt_salt": "zz"}, "prompt_salt"),
    ({"prompt_digest": "00"}, "prompt_digest"),
    ({"producer": None}, "producer"),
    ({"producer": {"name": 1}}, "producer.name"),
    ({"latent_space": "\ud800"}, "malformed"),
]


@pytest.mark.parametrize(("changes", "message"), META_CHANGES)
def test_bad_metadata_is_refused_by_name(kit: SimpleNamespace, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HandoffFormatError, match=message) as caught:
        Handoff.from_bytes(with_meta(kit.make_handoff().to_bytes(), **changes))
    assert caught.value.exit_status == 3


def test_missing_metadata_is_named(kit: SimpleNamespace) -> None:
    document = kit.make_meta(schema_version="1.0").to_dict()
    for name in set(document) - {"generator", "latent_space", "additional_metadata", "schema_version"}:
        with pytest.raises(ValueError, match=f"{name} is missing"):
            HandoffMeta.from_dict({key: value for key, value in document.items() if key != name})


def test_truncation_at_every_byte(kit: SimpleNamespace) -> None:
    blob = kit.make_handoff("float16").to_bytes()
    for size in range(len(blob)):
        with pytest.raises(HandoffFormatError):
            Handoff.from_bytes(blob[:size])
    with pytest.raises(HandoffFormatError):
        Handoff.from_bytes(blob + b"\0")


def test_flipped_bytes_raise_handoff_errors_or_parse(kit: SimpleNamespace) -> None:
    blob = kit.make_handoff("float16").to_bytes()
    end = 8 + int.from_bytes(blob[:8], "little")
    dice = random.Random(0)
    refused = 0
    for position in range(end):
        for value in (blob[position] ^ 1 << dice.randrange(8), dice.randrange(256)):
            changed = bytearray(blob)
            changed[position] = value
            try:
                Handoff.from_bytes(bytes(changed))
            except HandoffError:
                refused += 1
    assert refused > end  # more than half of the damage shows without any digest


def _entry(key: str, value: Any, tensor: str = "latents") -> Callable[[dict[str, Any], bytearray], None]:
    return lambda header, body: header[tensor].update({key: value})


STRUCTURE: list[tuple[str, Callable[[dict[str, Any], bytearray], None]]] = [
    ("overlap", _entry("data_offsets", [0, 64], "x0_prev")),
    ("gap", lambda header, body: (header["x0_prev"].update(data_offsets=[68, 132]), body.extend(b"1234"))),
    ("trailing bytes", lambda header, body: body.extend(b"12345678")),
    ("offsets past the end", _entry("data_offsets", [64, 2**40], "x0_prev")),
    ("negative offsets", _entry("data_offsets", [-64, 0])),
    ("reversed offsets", _entry("data_offsets", [64, 0])),
    ("float offsets", _entry("data_offsets", [0.0, 64.0])),
    ("boolean shape", _entry("shape", [True, 4, 2, 2])),
    ("huge shape", _entry("shape", [1, 2**31, 2**31, 2**31])),
    ("zero shape", _entry("shape", [1, 0, 2, 2])),
    ("negative shape", _entry("shape", [1, -4, -2, 2])),
    ("three axes", _entry("shape", [4, 2, 2])),
    ("batch of two", _entry("shape", [2, 2, 2, 2])),
    ("shapes differ", _entry("shape", [1, 2, 4, 2], "x0_prev")),
    ("another dtype", _entry("dtype", "F16")),
    ("unknown dtype", _entry("dtype", "BF16")),
    ("dtype of a wrong kind", _entry("dtype", ["F32"])),
    ("extra key", _entry("colour", 1)),
    ("entry is a list", lambda header, body: header.update(latents=[1])),
    ("unknown tensor", lambda header, body: header.update(prompt=header.pop("x0_prev"))),
    ("no latents", lambda header, body: header.pop("latents")),
    ("no metadata", lambda header, body: header.pop("__metadata__")),
    ("second metadata key", lambda header, body: header["__metadata__"].update(format="pt")),
    ("metadata is no text", lambda header, body: header["__metadata__"].update(latentrelay={})),
    ("metadata is no JSON", lambda header, body: header["__metadata__"].update(latentrelay="{")),
    ("metadata is a list", lambda header, body: header["__metadata__"].update(latentrelay="[]")),
    ("deep metadata", lambda header, body: header["__metadata__"].update(latentrelay="[" * 50_000)),
    ("NaN", lambda header, body: body.__setitem__(slice(0, 4), np.float32("nan").tobytes())),
    ("Inf in the memory", lambda header, body: body.__setitem__(slice(64, 68), np.float32("inf").tobytes())),
]


@pytest.mark.parametrize("change", [item[1] for item in STRUCTURE], ids=[item[0] for item in STRUCTURE])
def test_broken_structure_is_refused(kit: SimpleNamespace, change: Callable[[dict[str, Any], bytearray], None]) -> None:
    blob = kit.make_handoff().to_bytes()
    assert Handoff.from_bytes(rebuilt(blob, lambda header, body: None)).meta.seed == 7
    with pytest.raises(HandoffFormatError):
        Handoff.from_bytes(rebuilt(blob, change))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_absurd_header_lengths(kit: SimpleNamespace, length: int) -> None:
    with pytest.raises(HandoffFormatError, match="header length"):
        Handoff.from_bytes(length.to_bytes(8, "little") + kit.make_handoff().to_bytes()[8:])


def test_limits_are_the_callers(kit: SimpleNamespace) -> None:
    blob = kit.make_handoff().to_bytes()
    small = [HandoffLimits(max_bytes=len(blob) - 1), HandoffLimits(max_header_bytes=64), HandoffLimits(max_side=3)]
    for limits in [*small, HandoffLimits(max_steps=3)]:
        with pytest.raises(HandoffFormatError):
            Handoff.from_bytes(blob, limits)


def test_random_bytes_never_do_worse_than_a_handoff_error() -> None:
    dice = random.Random(1)
    for _ in range(2000):
        body = dice.randbytes(dice.randrange(64))
        with pytest.raises(HandoffFormatError):
            Handoff.from_bytes(len(body).to_bytes(8, "little") + b"{" + body)


def test_arrays_are_checked_when_a_handoff_is_made(kit: SimpleNamespace) -> None:
    good = np.zeros((1, 4, 2, 2), np.float32)
    for latents, memory, message in [
        (good.astype(np.float64), None, "dtype"),
        (good[0], None, "shape"),
        (good, good[:, :2], "another shape"),
        (good + np.inf, None, "not finite: 16"),
        (good, good * np.nan, "x0_prev is not finite"),
    ]:
        with pytest.raises(HandoffFormatError, match=message):
            Handoff(latents, memory, kit.make_meta())


MISMATCHES: list[tuple[str, Any]] = [
    ("model_family", "sd2"),
    ("model_digest", "sha256:other"),
    ("scheduler_class", "DDIMScheduler"),
    ("scheduler_digest", "sha256:other"),
    ("timesteps", (999, 700, 400, 101)),
    ("prediction_type", "v_prediction"),
    ("scaling_factor", 0.18215),
    ("shift_factor", 0.0),
    ("init_noise_sigma", 14.6),
    ("latent_space", "taesd"),
    ("height", 24),
    ("width", 24),
]


@pytest.mark.parametrize(("field", "value"), MISMATCHES)
def test_a_mismatch_names_the_field(kit: SimpleNamespace, bundle_folder: Path, field: str, value: Any) -> None:
    manifest: Manifest = kit.make_manifest(bundle_folder)
    kit.make_handoff().check(manifest)
    with pytest.raises(HandoffMismatchError, match=f"{field} differs") as caught:
        kit.make_handoff(**{field: value}).check(manifest)
    assert caught.value.field == field
    assert caught.value.got == value
    assert caught.value.exit_status == 3


def test_the_request_is_checked_too(kit: SimpleNamespace, bundle_folder: Path) -> None:
    manifest, handoff = kit.make_manifest(bundle_folder), kit.make_handoff()
    handoff.check(manifest, prompt="a red circle", negative_prompt="", seed=7, guidance=2.0, split=2)
    asked: list[tuple[str, dict[str, Any]]] = [
        ("prompt_digest", {"prompt": "a red square"}),
        ("prompt_digest", {"prompt": "a red circle", "negative_prompt": "blue"}),
        ("seed", {"seed": 8}),
        ("guidance", {"guidance": 2.5}),
        ("next_step", {"split": 0}),
    ]
    for field, arguments in asked:
        with pytest.raises(HandoffMismatchError) as caught:
            handoff.check(manifest, **arguments)
        assert caught.value.field == field


def test_solver_memory_and_sizes_must_fit(kit: SimpleNamespace, bundle_folder: Path) -> None:
    manifest = kit.make_manifest(bundle_folder)
    big = np.zeros((1, 4, 2, 4), np.float32)
    for handoff, field in [
        (kit.make_handoff(memory=False), "x0_prev"),
        (kit.make_handoff(next_step=0), "x0_prev"),
        (Handoff(big, big, kit.make_meta()), "latents"),
        (kit.make_handoff(num_steps=3, timesteps=(999, 700, 400)), "num_steps"),
    ]:
        with pytest.raises(HandoffMismatchError) as caught:
            handoff.check(manifest)
        assert caught.value.field == field


def test_prompt_digest_by_hand() -> None:
    import hashlib

    assert prompt_digest("00ff", "ü", "b") == hashlib.sha256(b"\x00\xff" + "ü".encode() + b"\0b").hexdigest()
