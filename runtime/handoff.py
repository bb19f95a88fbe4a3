"""The handoff: one safetensors blob that carries a denoising run from the cloud to the device.

Tensors: `latents` (1, C, h, w) and, where the solver has memory, `x0_prev` of the same shape, both float16 or both
float32. Metadata stands under one key as canonical JSON, so equal handoffs are equal bytes. The header is parsed here,
not by a library: sizes, names, dtypes, shapes, overlaps and finiteness are checked before anything else sees the bytes.
`HandoffMeta.schema_version` decides how it is written: 1.0 spells everything out, 1.1 is the same fields, shorter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from latentrelay.runtime.digest import canonical_json
from latentrelay.runtime.errors import HandoffFormatError, HandoffMismatchError
from latentrelay.runtime.noise import GENERATOR_KIND
from latentrelay.runtime.strict_json import check_schema_version, parse_record, read_json, record_to_json
from latentrelay.runtime.timestep_runs import from_runs, to_runs, whole
from numpy.typing import NDArray

if TYPE_CHECKING:
    from latentrelay.runtime.manifest import Manifest

MEDIA_TYPE = "application/vnd.latentrelay.handoff"
SCHEMA_VERSION = "1.1"
WIRE_VERSIONS = ("1.1", "1.0")  # what is written and read here, the newest first; 1.x above that is read
FAMILIES = ("sd1", "sd2")
PREDICTION_TYPES = ("epsilon", "v_prediction")
_METADATA_KEY = "latentrelay"
_TENSORS = ("latents", "x0_prev")
_WIRE_DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_WIRE_NAMES = {"float16": "F16", "float32": "F32"}

FloatArray = NDArray[np.float16] | NDArray[np.float32]


@dataclass(frozen=True)
class HandoffLimits:
    """Caps on what is parsed at all: the blob (64 MiB holds any SD latent), its JSON header, a latent's side."""

    max_bytes: int = 64 * 2**20
    max_header_bytes: int = 256 * 2**10
    max_side: int = 2048
    max_steps: int = 10_000


DEFAULT_LIMITS = HandoffLimits()


@dataclass(frozen=True)
class HandoffMeta:
    """What the latents are. `next_step` is the split k: steps 0..k-1 are done; height and width are pixels.

    `schema_version` is the form it is written in: from 1.1 on, keys at their default are left out, integral numbers are
    integers, and evenly spaced timesteps are runs (timestep_runs.py). `extra` holds top-level keys of a newer minor
    version than this code knows, kept as they came.
    """

    model_family: str
    model_digest: str
    scheduler_class: str
    scheduler_digest: str
    num_steps: int
    timesteps: tuple[float, ...]
    next_step: int
    prediction_type: str
    guidance: float
    scaling_factor: float
    shift_factor: float
    seed: int
    init_noise_sigma: float
    height: int
    width: int
    dtype: str
    prompt_salt: str
    prompt_digest: str
    producer: Mapping[str, str]
    generator: str = GENERATOR_KIND
    latent_space: str = "sd"
    additional_metadata: Mapping[str, Any] = field(default_factory=dict)
    schema_version: str = SCHEMA_VERSION
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with the keys of `extra` at the top level."""
        document: dict[str, Any] = record_to_json(self)
        extra = document.pop("extra")
        if check_schema_version(self.schema_version) >= 1:
            document["timesteps"] = to_runs(self.timesteps)
            document = {key: _short(value) for key, value in document.items() if value != _LEFT_OUT.get(key, ...)}
        return {**extra, **document}

    @classmethod
    def from_dict(cls, document: Any) -> HandoffMeta:
        """Parse the JSON form; ValueError names the bad key. Unknown keys are kept for a newer minor version only."""
        if not isinstance(document, dict):
            raise ValueError("the metadata is not an object")
        minor = check_schema_version(document.get("schema_version"))
        names = {item.name for item in dataclasses.fields(cls)} - {"extra"}
        unknown = {key: value for key, value in document.items() if key not in names}
        if unknown and minor <= _KNOWN_MINOR:
            raise ValueError(f"unknown key {sorted(unknown)[0]}")
        known = {key: value for key, value in document.items() if key in names}
        if minor >= 1:
            known = {"shift_factor": 0.0, **known}
            if "timesteps" in known:
                known["timesteps"] = from_runs(known["timesteps"])
        meta: HandoffMeta = dataclasses.replace(parse_record(cls, known), extra=unknown)
        return meta


_KNOWN_MINOR = int(SCHEMA_VERSION.split(".")[1])
_LEFT_OUT: Mapping[str, Any] = {
    "additional_metadata": {},
    "generator": GENERATOR_KIND,
    "latent_space": "sd",
    "shift_factor": 0.0,
}


def _short(value: Any) -> Any:
    return whole(value) if isinstance(value, float) else value


@dataclass(frozen=True, eq=False)
class Handoff:
    """Latents (1, C, h, w) after `meta.next_step` steps, with the solver's memory. Raises HandoffFormatError when built
    from arrays that are not what the metadata says, or not finite. Two handoffs are equal when their bytes are."""

    latents: FloatArray
    x0_prev: FloatArray | None
    meta: HandoffMeta

    def __post_init__(self) -> None:
        _check_meta(self.meta, DEFAULT_LIMITS)
        for name, array in self._tensors():
            _check_array(name, array, self.meta)
        if self.x0_prev is not None and self.x0_prev.shape != self.latents.shape:
            raise HandoffFormatError("x0_prev has another shape", got=self.x0_prev.shape, expected=self.latents.shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handoff) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The blob; the same handoff gives the same bytes everywhere."""
        header: dict[str, Any] = {"__metadata__": {_METADATA_KEY: canonical_json(self.meta.to_dict()).decode()}}
        wire = _WIRE_NAMES[self.meta.dtype]
        blobs, offset = [], 0
        for name, array in self._tensors():
            blobs.append(np.ascontiguousarray(array, dtype=_WIRE_DTYPES[wire]).tobytes())
            span = [offset, offset + len(blobs[-1])]
            header[name] = {"dtype": wire, "shape": list(array.shape), "data_offsets": span}
            offset = span[1]
        text = canonical_json(header)
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + b"".join(blobs)

    def digest(self) -> str:
        """Bare hex sha256 of the blob: the ETag on the wire."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes, limits: HandoffLimits = DEFAULT_LIMITS) -> Handoff:
        """Parse a blob; whatever is wrong with it is a HandoffFormatError."""
        try:
            return _parse(data, limits)
        except ValueError as error:
            raise HandoffFormatError(
                f"the handoff blob is malformed: {str(error)[:300]}",
                do="Ask the cloud again; update the older of the two sides.",
            ) from error

    def check(
        self,
        manifest: Manifest,
        *,
        prompt: str | None = None,
        negative_prompt: str = "",
        seed: int | None = None,
        guidance: float | None = None,
        split: int | None = None,
    ) -> None:
        """Raise HandoffMismatchError naming the first field that does not fit the bundle (or the request, if given)."""
        latent, schedule, meta = manifest.latent, manifest.schedule, self.meta
        wanted: dict[str, object] = {
            "model_family": manifest.source.family,
            "model_digest": manifest.source.digest,
            "scheduler_class": schedule.scheduler_class,
            "scheduler_digest": schedule.scheduler_digest,
            "num_steps": schedule.num_steps,
            "timesteps": tuple(schedule.timesteps),
            "prediction_type": manifest.prediction_type,
            "scaling_factor": latent.scaling_factor,
            "shift_factor": latent.shift_factor,
            "init_noise_sigma": schedule.init_noise_sigma,
            "latent_space": "sd",
            "height": manifest.image.height,
            "width": manifest.image.width,
        }
        asked = {"seed": seed, "guidance": guidance, "next_step": split}
        wanted.update({name: value for name, value in asked.items() if value is not None})
        if prompt is not None:
            wanted["prompt_digest"] = prompt_digest(meta.prompt_salt, prompt, negative_prompt)
        for name, expected in wanted.items():
            got = getattr(meta, name)
            if got != expected:
                raise HandoffMismatchError(name, got=got, expected=expected)
        shape = (1, latent.channels, latent.height, latent.width)
        if self.latents.shape != shape:
            raise HandoffMismatchError("latents", got=self.latents.shape, expected=shape)
        self._check_memory(schedule.needs_x0_prev)

    def _check_memory(self, needs_x0_prev: bool) -> None:
        """x0_prev crosses exactly where a step was made and another will read it; at k = N it may be there or not."""
        done, steps = self.meta.next_step, self.meta.num_steps
        must = needs_x0_prev and 0 < done < steps
        may = needs_x0_prev and done > 0
        if (self.x0_prev is None and must) or (self.x0_prev is not None and not may):
            raise HandoffMismatchError(
                "x0_prev",
                got="absent" if self.x0_prev is None else "present",
                expected="present" if must else "absent",
            )

    def _tensors(self) -> list[tuple[str, FloatArray]]:
        tensors = [("latents", self.latents)]
        return tensors if self.x0_prev is None else [*tensors, ("x0_prev", self.x0_prev)]


def prompt_digest(salt: str, prompt: str, negative_prompt: str) -> str:
    """Hex sha256 of the salt's bytes (`salt` is hex), the prompt, a zero byte and the negative prompt."""
    return hashlib.sha256(bytes.fromhex(salt) + f"{prompt}\0{negative_prompt}".encode()).hexdigest()


def _parse(data: bytes, limits: HandoffLimits) -> Handoff:
    if len(data) > limits.max_bytes:
        raise ValueError(f"got {len(data)} bytes, expected at most {limits.max_bytes}")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(limits.max_header_bytes, len(data) - 8):
        raise ValueError(f"got a header length of {length} in {len(data)} bytes: truncated, or not a handoff")
    text = data[8 : 8 + length]
    if not text.startswith(b"{"):
        raise ValueError("the header does not start with '{'")
    header = read_json(text)
    metadata = header.pop("__metadata__", None)
    if (
        not isinstance(metadata, dict)
        or set(metadata) != {_METADATA_KEY}
        or not isinstance(metadata[_METADATA_KEY], str)
    ):
        raise ValueError(f"__metadata__ must hold the one key {_METADATA_KEY!r}")
    meta = HandoffMeta.from_dict(read_json(metadata[_METADATA_KEY].encode()))
    _check_meta(meta, limits)
    if not {"latents"} <= set(header) <= set(_TENSORS):
        raise ValueError(f"got tensors {sorted(header)}, expected latents and at most x0_prev")
    body, spans, arrays = memoryview(data)[8 + length :], [], {}
    for name in header:
        array, span = _tensor(name, header[name], body, meta.dtype, limits)
        arrays[name] = array
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"tensors overlap or leave a gap at byte {min(start, end)}")
        end = stop
    if end != len(body):
        raise ValueError(f"got {len(body)} bytes of tensors, expected {end}")
    return Handoff(arrays["latents"], arrays.get("x0_prev"), meta)


def _tensor(
    name: str, entry: Any, body: memoryview, dtype: str, limits: HandoffLimits
) -> tuple[FloatArray, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: the header entry needs exactly dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _ints(shape, 4) or not all(1 <= size <= limits.max_side for size in shape):
        raise ValueError(f"{name}: got shape {shape!r:.80}, expected (1, channels, rows, columns)")
    if entry["dtype"] != _WIRE_NAMES[dtype]:
        raise ValueError(f"{name}: got dtype {entry['dtype']!r:.20}, expected {_WIRE_NAMES[dtype]} for {dtype}")
    kind = _WIRE_DTYPES[entry["dtype"]]
    if not _ints(offsets, 2) or not 0 <= offsets[0] <= offsets[1] <= len(body):
        raise ValueError(f"{name}: got offsets {offsets!r:.80} in {len(body)} bytes of tensors")
    if offsets[1] - offsets[0] != math.prod(shape) * kind.itemsize:
        raise ValueError(f"{name}: {offsets[1] - offsets[0]} bytes do not hold shape {shape}")
    array = np.frombuffer(body[offsets[0] : offsets[1]], dtype=kind).reshape(shape).astype(kind.newbyteorder("="))
    return array, (offsets[0], offsets[1])


def _ints(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(item) is int for item in value)


def _check_meta(meta: HandoffMeta, limits: HandoffLimits) -> None:
    numbers = (meta.guidance, meta.scaling_factor, meta.shift_factor, meta.init_noise_sigma, *meta.timesteps)
    rules: list[tuple[str, bool]] = [
        ("model_family", meta.model_family in FAMILIES),
        ("prediction_type", meta.prediction_type in PREDICTION_TYPES),
        ("dtype", meta.dtype in _WIRE_NAMES),
        ("generator", meta.generator == GENERATOR_KIND),
        ("num_steps", 1 <= meta.num_steps <= limits.max_steps),
        ("timesteps", len(meta.timesteps) == meta.num_steps),
        ("next_step", 0 <= meta.next_step <= meta.num_steps),
        ("seed", 0 <= meta.seed < 2**64),
        ("height and width", meta.height > 0 and meta.width > 0),
        ("prompt_salt", _is_hex(meta.prompt_salt, None)),
        ("prompt_digest", _is_hex(meta.prompt_digest, 64)),
        ("numbers", all(abs(number) < 1e9 for number in numbers)),
    ]
    for name, holds in rules:
        if not holds:
            value = getattr(meta, name, None)
            raise HandoffFormatError(
                f"the handoff's {name} is out of range", got=value, do="Ask the cloud again; update the older side."
            )


def _is_hex(text: str, length: int | None) -> bool:
    proper = set(text) <= set("0123456789abcdef") and len(text) % 2 == 0 and len(text) <= 256
    return proper and (length is None or len(text) == length)


def _check_array(name: str, array: FloatArray, meta: HandoffMeta) -> None:
    if array.ndim != 4 or array.shape[0] != 1 or array.size == 0:
        raise HandoffFormatError(f"{name} has a wrong shape", got=array.shape, expected="(1, channels, rows, columns)")
    if array.dtype != np.dtype(meta.dtype):
        raise HandoffFormatError(f"{name} has a wrong dtype", got=str(array.dtype), expected=meta.dtype)
    bad = int(array.size - np.count_nonzero(np.isfinite(array)))
    if bad:
        raise HandoffFormatError(
            f"{name} is not finite: {bad} NaN or Inf values", do="Ask for dtype float32, or run on the device."
        )
