"""The bytes of a handoff, read with the standard library: a second reading of docs/embedding.md, sections 3 and 4.

`parse(blob)` makes every check that needs the blob alone; `compare(handoff, request, manifest)` the others.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]
FORMATS = {"F16": (2, "e"), "F32": (4, "f"), "I64": (8, "q"), "I32": (4, "i")}
DTYPES = {"float16": "F16", "float32": "F32"}
DEFAULTS: Document = {
    "shift_factor": 0,
    "generator": "torch-cpu-mt19937",
    "latent_space": "sd",
    "additional_metadata": {},
}
OPTIONAL_IN_1_0 = {"generator", "latent_space", "additional_metadata"}
STRINGS = {"schema_version", "scheduler_class", "generator", "latent_space"}
NUMBERS = {"guidance", "scaling_factor", "init_noise_sigma", "shift_factor"}
INTEGERS = {"num_steps": (1, 10000), "next_step": (0, 10000), "seed": (0, 2**64 - 1),
            "height": (1, 2**31), "width": (1, 2**31)}  # fmt: skip
CHOICES = {"model_family": ("sd1", "sd2"), "prediction_type": ("epsilon", "v_prediction"), "dtype": tuple(DTYPES)}
PATTERNS = {"model_digest": r"sha256:[0-9a-f]{64}", "scheduler_digest": r"sha256:[0-9a-f]{64}",
            "prompt_digest": r"[0-9a-f]{64}", "prompt_salt": r"([0-9a-fA-F]{2}){0,128}"}  # fmt: skip
OBJECTS = {"producer", "additional_metadata"}
KEYS = {*STRINGS, *NUMBERS, *INTEGERS, *CHOICES, *PATTERNS, *OBJECTS, "timesteps"}


class BlobError(ValueError):
    """A blob that must not be used; `field` is the first thing wrong with it."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field


@dataclass(frozen=True)
class Array:
    """Numbers in C order."""

    dtype: str
    shape: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Handoff:
    """A checked blob. `metadata` has all its defaults and the timesteps written out."""

    metadata: Document
    arrays: dict[str, Array]


def demand(condition: bool, field: str, why: str) -> None:
    if not condition:
        raise BlobError(field, why)


def strict_json(text: str | bytes, field: str) -> Document:
    """One JSON object without repeated keys, NaN or Infinity."""

    def once(pairs: list[tuple[str, Any]]) -> Document:
        demand(len({key for key, _ in pairs}) == len(pairs), field, "a key twice")
        return dict(pairs)

    def never(word: str) -> Any:
        raise BlobError(field, f"{word} is not JSON")

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        document = json.loads(text, object_pairs_hook=once, parse_constant=never)
    except BlobError:
        raise
    except (ValueError, RecursionError) as error:
        raise BlobError(field, str(error)) from None
    demand(isinstance(document, dict), field, "not an object")
    return document  # type: ignore[no-any-return]


def is_integer(value: object, low: int = 0, high: int = 2**63) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object) -> bool:
    """Finite, and within what a double holds."""
    return is_integer(value, -(2**64), 2**64) or (isinstance(value, float) and math.isfinite(value))


def read_tensors(blob: bytes, *, sides: int = 2048) -> tuple[Any, dict[str, Array]]:
    """The `__metadata__` and the arrays of a safetensors file whose tensors lie without gaps."""
    demand(len(blob) >= 8, "header", "fewer than 8 bytes")
    (length,) = struct.unpack_from("<Q", blob)
    demand(2 <= length <= 262144 and 8 + length <= len(blob), "header", f"a length of {length}")
    demand(blob[8:9] == b"{", "header", "does not start with {")
    header = strict_json(blob[8 : 8 + length], "header")
    metadata = header.pop("__metadata__", None)
    data, spans, arrays = memoryview(blob)[8 + length :], [], {}
    for name, entry in header.items():
        demand(isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}, name, "not an entry")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        demand(isinstance(dtype, str) and dtype in FORMATS, name, f"dtype {dtype!r}")
        demand(isinstance(shape, list) and all(is_integer(side, 1, sides) for side in shape), name, f"shape {shape!r}")
        demand(isinstance(offsets, list) and len(offsets) == 2 and all(map(is_integer, offsets)), name, "offsets")
        size, letter = FORMATS[dtype]
        begin, end = offsets
        demand(begin <= end <= len(data), name, "offsets outside of the file")
        demand(end - begin == math.prod(shape) * size, name, "offsets do not fit the shape")
        arrays[name] = Array(dtype, tuple(shape), struct.unpack(f"<{math.prod(shape)}{letter}", data[begin:end]))
        spans.append((begin, end))
    ends = [0, *(end for _, end in sorted(spans))]
    demand([begin for begin, _ in sorted(spans)] == ends[:-1] and ends[-1] == len(data), "data", "gaps or overlaps")
    return metadata, arrays


def _expanded(items: Any, count: int, runs: bool) -> list[float]:
    demand(isinstance(items, list), "timesteps", "not a list")
    values: list[float] = []
    for item in items:
        if runs and isinstance(item, list):
            demand(len(item) == 3 and is_number(item[0]) and is_number(item[1]), "timesteps", f"{item!r}")
            demand(is_integer(item[2], 1, count - len(values)), "timesteps", f"{item!r} is too long")
            values += [item[0] + index * item[1] for index in range(item[2])]
        else:
            demand(is_number(item) and len(values) < count, "timesteps", f"{item!r}")
            values.append(item)
    demand(len(values) == count and all(map(math.isfinite, values)), "timesteps", f"{len(values)}, not {count}")
    return values


def _metadata(outer: Any) -> Document:
    demand(isinstance(outer, dict) and set(outer) == {"latentrelay"}, "__metadata__", "not the one key latentrelay")
    demand(isinstance(outer["latentrelay"], str), "__metadata__", "not a string")
    document = strict_json(outer["latentrelay"], "metadata")
    version = re.fullmatch(r"1\.(0|[1-9][0-9]{0,5})", str(document.get("schema_version")))
    if version is None:
        raise BlobError("schema_version", f"{document.get('schema_version')!r} is not 1.x")
    minor = int(version[1])
    unknown, missing = set(document) - KEYS, KEYS - set(document) - (set(DEFAULTS) if minor else OPTIONAL_IN_1_0)
    demand(not missing, min(missing, default=""), "missing")
    demand(minor > 1 or not unknown, min(unknown, default=""), "unknown")
    document = DEFAULTS | document
    for key, value in document.items():
        good = (
            (key in STRINGS and isinstance(value, str))
            or (key in NUMBERS and is_number(value))
            or (key in INTEGERS and is_integer(value, *INTEGERS[key]))
            or (key in CHOICES and value in CHOICES[key])
            or (key in PATTERNS and isinstance(value, str) and re.fullmatch(PATTERNS[key], value) is not None)
            or (key in OBJECTS and isinstance(value, dict))
            or (key not in KEYS or key == "timesteps")
        )
        demand(good, key, f"{value!r}"[:80])
    demand(all(isinstance(each, str) for each in document["producer"].values()), "producer", "not strings")
    demand(document["next_step"] <= document["num_steps"], "next_step", "after the last step")
    document["timesteps"] = _expanded(document["timesteps"], document["num_steps"], minor > 0)
    return document


def parse(blob: bytes) -> Handoff:
    """The handoff, or BlobError."""
    outer, arrays = read_tensors(blob)
    metadata = _metadata(outer)
    demand("latents" in arrays and set(arrays) <= {"latents", "x0_prev"}, "tensors", f"{sorted(arrays)}")
    for name, array in arrays.items():
        demand(len(array.shape) == 4 and array.shape[0] == 1, name, f"shape {array.shape}")
        demand(array.dtype == DTYPES[metadata["dtype"]], name, f"dtype {array.dtype}")
        demand(array.shape == arrays["latents"].shape, name, "not the shape of the latents")
        demand(all(map(math.isfinite, array.values)), name, "not finite")
    return Handoff(metadata, arrays)


def prompt_digest(salt: str, prompt: str, negative_prompt: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + prompt.encode() + b"\0" + negative_prompt.encode()).hexdigest()


def compare(handoff: Handoff, request: Document, manifest: Document | None = None) -> None:
    """BlobError with the first field that is not what was asked for, or not the bundle's."""
    got = handoff.metadata
    expected: list[tuple[str, tuple[Any, ...]]] = []
    if manifest is not None:
        source, schedule, latent = manifest["source"], manifest["schedule"], manifest["latent"]
        expected += [("model_family", (source["family"],)), ("model_digest", (source["digest"],))]
        of_schedule = ("scheduler_class", "scheduler_digest", "num_steps", "timesteps", "init_noise_sigma")
        expected += [(name, (schedule[name],)) for name in of_schedule]
        expected += [("prediction_type", (manifest["prediction_type"],)), ("latent_space", ("sd",))]
        expected += [(name, (latent[name],)) for name in ("scaling_factor", "shift_factor")]
        expected += [(name, (manifest["image"][name],)) for name in ("height", "width")]
    names = ("model_digest", "scheduler_digest", "num_steps", "height", "width", "seed", "dtype")
    expected += [(name, (request[name],)) for name in names if name in request]
    expected += [("guidance", (request.get("guidance", 7.5),))]
    expected += [("next_step", (request["split"], *request.get("accept_splits", ())))]
    digest = prompt_digest(got["prompt_salt"], request["prompt"], request.get("negative_prompt", ""))
    expected += [("prompt_digest", (digest,))]
    for field, allowed in expected:
        demand(got[field] in allowed, field, f"{got[field]!r}, expected {allowed!r}"[:200])
    if manifest is not None:
        shape = (1, latent["channels"], latent["height"], latent["width"])
        demand(handoff.arrays["latents"].shape == shape, "latents", f"not {shape}")
        if got["next_step"] < got["num_steps"] or not schedule["needs_x0_prev"]:
            wanted = schedule["needs_x0_prev"] and got["next_step"] > 0
            demand(("x0_prev" in handoff.arrays) == wanted, "x0_prev", "there, or not there, against the manifest")
