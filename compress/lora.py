"""Low-rank adapters (LoRA, arXiv 2106.09685; on convolutions as in LoCon): read from files and merged into a pipeline.

In: a diffusers pipeline in float32 and `.safetensors` files in the layouts of diffusers/peft
(`unet.<path>.lora_A.weight`, `.lora_B.weight`) or kohya (`lora_unet_<path>.lora_down.weight`, `.lora_up.weight`,
`.alpha`), for the U-Net and the text encoder. Out: the same pipeline with `W + scale (alpha / r) B A` for every layer
named, and a record of what was merged. The sum is made in one fixed order in float64, so the merged weights, and with
them the model digest, are the same bits on every machine. Adapters are not kept apart afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler
from latentrelay.compress.errors import AdapterError
from safetensors import safe_open
from torch import Tensor, nn

COMPONENTS = {"unet": "unet", "text_encoder": "text_encoder"}  # peft's prefix -> the pipeline's part
KOHYA = {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te_": "text_encoder"}
FEW_STEP = "latentrelay.few_step"  # metadata of a consistency adapter: JSON, `{"guidance": 4.0, "num_steps": [4, 8]}`
_DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight")
_UP = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight")
_ALPHA = (".alpha",)
_CHUNK = 1 << 17  # elements added at a time: what a core keeps in its cache


@dataclass(frozen=True)
class Adapter:
    """One file and how much of it: 1 is as trained."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Adapter:
        """ "FILE" or "FILE:SCALE", as on the command line. Raises AdapterError on a scale that is not finite."""
        head, colon, tail = text.rpartition(":")
        try:
            scale = float(tail) if colon and head else None
        except ValueError:
            scale = None
        if scale is None:
            return cls(Path(text))
        if not math.isfinite(scale):
            raise AdapterError(text, "its scale is not finite", got=tail, expected="a number such as 0.8")
        return cls(Path(head), scale)


@dataclass(frozen=True)
class MergedAdapter:
    """What was merged: file name, bare hex sha256 of the file, scale, how many layers it changed."""

    file: str
    sha256: str
    scale: float
    layers: int
    few_step: Mapping[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """As a manifest records it."""
        return {"file": self.file, "sha256": self.sha256, "scale": self.scale, "layers": self.layers}


@dataclass(frozen=True)
class _Delta:
    """`down` (r, in[, k, k]) and `up` (out, r[, 1, 1]) of one layer; `alpha` None is r."""

    down: Tensor
    up: Tensor
    alpha: float | None


def merge(pipeline: Any, adapters: Sequence[Adapter]) -> tuple[MergedAdapter, ...]:
    """Merge `adapters` into the pipeline's weights, one after the other; float32 weights only, changed in place.

    A consistency adapter (its metadata says so) also makes the pipeline's scheduler diffusers' LCMScheduler, with
    the same noise schedule. Raises AdapterError naming the file and the key at fault; nothing is changed by a file
    that is refused.
    """
    merged = []
    for adapter in adapters:
        digest, deltas, few_step = _read(adapter.path, pipeline)
        for layer, delta in deltas:
            _add(layer, delta, adapter.scale)
        if few_step is not None:
            pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
        merged.append(MergedAdapter(adapter.path.name, digest, adapter.scale, len(deltas), few_step))
    return tuple(merged)


def _read(path: Path, pipeline: Any) -> tuple[str, list[tuple[nn.Module, _Delta]], Mapping[str, Any] | None]:
    tensors, metadata = _tensors(path)
    alphas = _peft_alphas(path, metadata)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, kind = _split(path, key)
        found.setdefault(name, {})[kind] = tensor
    kohya = _kohya_names(pipeline)
    deltas: list[tuple[nn.Module, _Delta]] = []
    for name, parts in sorted(found.items()):
        layer = _layer(path, name, pipeline, kohya)
        if not {"down", "up"} <= set(parts):
            raise AdapterError(path.name, "half of a pair is missing", got=name, expected="both factors of each layer")
        alpha = float(parts["alpha"]) if "alpha" in parts else alphas.get(name.partition(".")[0])
        delta = _Delta(parts["down"], parts["up"], alpha)
        _check_shapes(path, name, layer, delta)
        deltas.append((layer, delta))
    if not deltas:
        raise AdapterError(path.name, "it holds no adapter", got="no tensors", expected="lora_A and lora_B factors")
    return hashlib.sha256(path.read_bytes()).hexdigest(), deltas, _few_step(path, metadata)


def _tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    if not path.is_file():
        raise AdapterError(str(path), "there is no such file", got=str(path), expected="a .safetensors file")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors raises a class of its own, outside the standard tree
        raise AdapterError(path.name, f"it is not a safetensors file ({error})", expected="safetensors") from error


def _split(path: Path, key: str) -> tuple[str, str]:
    """A key's layer name and which factor it is."""
    for kind, endings in (("down", _DOWN), ("up", _UP), ("alpha", _ALPHA)):
        for ending in endings:
            if key.endswith(ending):
                return key.removesuffix(ending), kind
    raise AdapterError(
        path.name,
        "it holds a key that is no plain LoRA factor (DoRA, LoHa, LoKr and Tucker factors are not read)",
        got=key,
        expected=" | ".join(f"<layer>{ending}" for ending in (*_DOWN[:2], *_UP[:2], *_ALPHA)),
    )


def _peft_alphas(path: Path, metadata: Mapping[str, str]) -> dict[str, float]:
    """`lora_alpha` a component, where diffusers wrote peft's configuration into the header."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata") or "{}")
        unsupported = [key for key in ("use_dora", "use_rslora", "alpha_pattern") for name in COMPONENTS
                       if config.get(f"{name}.{key}")]  # fmt: skip
        alphas = {name: config.get(f"{name}.lora_alpha") for name in COMPONENTS}
        found = {name: float(alpha) for name, alpha in alphas.items() if alpha is not None}
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterError(path.name, f"its metadata is malformed ({error})", expected="JSON of peft") from error
    if unsupported:
        raise AdapterError(path.name, "its metadata asks for what is not read", got=unsupported[0], expected="LoRA")
    return found


def _few_step(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
    text = metadata.get(FEW_STEP)
    if text is None:
        return None
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise AdapterError(path.name, f"its metadata {FEW_STEP} is malformed", got=text, expected="a JSON object")
    return document


def _kohya_names(pipeline: Any) -> dict[str, nn.Module]:
    names: dict[str, nn.Module] = {}
    for prefix, part in KOHYA.items():
        for path, layer in _adaptable(getattr(pipeline, part)):
            names[prefix + path.replace(".", "_")] = layer
    return names


def _layer(path: Path, name: str, pipeline: Any, kohya: Mapping[str, nn.Module]) -> nn.Module:
    if name in kohya:
        return kohya[name]
    prefix, _, inner = name.partition(".")
    part = COMPONENTS.get(prefix)
    layer = dict(_adaptable(getattr(pipeline, part))).get(inner) if part else None
    if layer is None:
        raise AdapterError(
            path.name,
            "it names a layer that the pipeline does not have",
            got=name,
            expected="unet.<path>, text_encoder.<path>, lora_unet_<path> or lora_te_<path> of a linear layer or a "
            "convolution",
        )
    return layer


def _adaptable(module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    for path, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            yield path, layer


def _check_shapes(path: Path, name: str, layer: nn.Module, delta: _Delta) -> None:
    weight = _weight(layer)
    rank = delta.down.shape[0] if delta.down.ndim else 0
    inner = math.prod(weight.shape[1:])
    fits = (
        rank > 0
        and delta.down.is_floating_point()
        and delta.up.is_floating_point()
        and delta.down.numel() == rank * inner
        and tuple(delta.down.shape[1:2]) == tuple(weight.shape[1:2])
        and delta.up.numel() == weight.shape[0] * rank
        and tuple(delta.up.shape[:2]) == (weight.shape[0], rank)
        and (not isinstance(layer, nn.Conv2d) or layer.groups == 1)
    )
    if not fits:
        raise AdapterError(
            path.name,
            f"the factors of {name} do not fit its layer",
            got=f"{tuple(delta.down.shape)} and {tuple(delta.up.shape)}",
            expected=f"(r, {inner}) and ({weight.shape[0]}, r), as weights {tuple(weight.shape)} need",
        )
    if weight.dtype != torch.float32:
        raise AdapterError(path.name, "the pipeline is not in float32", got=str(weight.dtype), expected="float32")
    if not (torch.isfinite(delta.down).all() and torch.isfinite(delta.up).all()):
        raise AdapterError(path.name, f"the factors of {name} hold NaN or Inf", expected="finite numbers")


def _weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


@torch.no_grad()
def _add(layer: nn.Module, delta: _Delta, scale: float) -> None:
    weight = _weight(layer)
    rank = delta.down.shape[0]
    factor = scale * (rank if delta.alpha is None else delta.alpha) / rank
    product = ordered_product(delta.up.reshape(-1, rank), delta.down.reshape(rank, -1))
    weight.copy_((weight.double() + factor * product.reshape(weight.shape)).float())


def ordered_product(up: Tensor, down: Tensor) -> Tensor:
    """up (out, r) @ down (r, in) -> float64 (out, in), rank by rank: the same bits whatever the machine or library.

    Products of two float32 numbers are exact in float64; only the additions round, in the order of the ranks.
    """
    left, right = up.double(), down.double()
    total = torch.zeros(left.shape[0], right.shape[1], dtype=torch.float64)
    rows = max(1, _CHUNK // max(1, right.shape[1]))
    for first in range(0, len(total), rows):
        chunk = total[first : first + rows]
        for rank in range(left.shape[1]):
            chunk += left[first : first + rows, rank, None] * right[rank]
    return total


class LowRankUpdate(nn.Module):
    """Adapters that are being trained: `weights()` gives the base's weights with the updates added, by name.

    One pair (A, B) for every linear layer and convolution of `base` (which stays as it is), of rank `rank` or the
    layer's own width where that is less. A is drawn from `seed`, B starts at zero. Calls go through
    `torch.func.functional_call`, so a forward pass costs what the base's does.
    """

    def __init__(self, base: nn.Module, rank: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.paths = [path for path, _ in _adaptable(base)]
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for place, (_, layer) in enumerate(_adaptable(base)):
            weight = _weight(layer).detach()
            self.register_buffer(f"base{place}", weight, persistent=False)
            inner, width = math.prod(weight.shape[1:]), weight.shape[0]
            own = min(rank, inner, width)
            self.down.append(nn.Parameter(torch.randn(own, inner, generator=generator) * inner**-0.5))
            self.up.append(nn.Parameter(torch.zeros(width, own)))

    def weights(self) -> dict[str, Tensor]:
        """{"<path>.weight": base + B A}, what `functional_call` takes."""
        found = {}
        for place, (path, down, up) in enumerate(zip(self.paths, self.down, self.up, strict=True)):
            base = self.get_buffer(f"base{place}")
            found[f"{path}.weight"] = base + (up @ down).reshape(base.shape)
        return found

    def tensors(self, component: str = "unet") -> dict[str, Tensor]:
        """The factors in diffusers/peft's layout and float16, ready for safetensors."""
        found = {}
        for place, (path, down, up) in enumerate(zip(self.paths, self.down, self.up, strict=True)):
            shape = self.get_buffer(f"base{place}").shape
            found[f"{component}.{path}.lora_A.weight"] = down.detach().reshape(len(down), *shape[1:]).half()
            ending = (1,) * (len(shape) - 2)
            found[f"{component}.{path}.lora_B.weight"] = up.detach().reshape(*up.shape, *ending).half()
        return {name: tensor.cpu().contiguous() for name, tensor in sorted(found.items())}
