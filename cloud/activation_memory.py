"""How much memory one call of the network takes for its activations, found from shapes: nothing is computed.

The U-Net is run on fake tensors (torch's FakeTensorMode, which picks the kernels of the real device) while a dispatch
mode counts the bytes of every storage that an operation makes until it is freed; the most held at once is the answer.
Kernels' own scratch memory is not seen, so a share is added. Every activation has the batch in its shape, so one
request stands for any number. A run on fake tensors takes seconds, so it is made for a few sizes once, never for what
a client sends: between them bytes per latent are drawn as a line over the number of latents.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from latentrelay.cloud.openmp import release_workers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_log = logging.getLogger("latentrelay.cloud")
SCRATCH_SHARE = 0.25  # for kernels' scratch memory and the allocator's rounding
MARGIN = 0.05  # for sizes between those that were looked into
_GRID = 8
_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class ActivationMemory:
    """The predicted bytes of calls of one network, by latent size. Thread-safe.

    A call's need is the greatest of what its moments hold, each a constant and terms in the number of latents n and,
    where attention is not fused, n**2. Divided by n all of these are convex, so a line between two known sizes, which
    is n and n**2 with the weights that fit both, is a bound from above.
    """

    def __init__(
        self, unet: Any, text_length: int, branches: int, sizes: Sequence[tuple[int, int]] = ((64, 64), (128, 128))
    ) -> None:
        """sizes: (rows, columns) of latents to look into besides the smallest, the largest that is asked for among
        them; rounded up to multiples of 8, as every size is."""
        self._unet, self._text_length, self._branches = unet, text_length, branches
        self._sizes = sorted({(_GRID, _GRID), *(_rounded(*each) for each in sizes)}, key=_latents)
        self._known: list[tuple[int, float]] | None = None  # latents, bytes for each of them; empty: no forecast
        self._lock = threading.Lock()

    def measure(self) -> None:
        """Look into the sizes, some seconds each, unless that is done. Every other method waits for it once."""
        self._points()

    def bytes(self, requests: int, rows: int, columns: int) -> int:
        """Peak bytes of a call for so many requests with latents (C, rows, columns)."""
        return requests * self._one(rows, columns)

    def most(self, budget_bytes: float, rows: int, columns: int) -> int:
        """How many requests of this size fit one call; 0 if none does."""
        return max(0, int(budget_bytes / self._one(rows, columns)))

    def _one(self, rows: int, columns: int) -> int:
        known, latents = self._points(), _latents(_rounded(rows, columns))
        return max(1, int((1 + SCRATCH_SHARE) * latents * _per_latent(known, latents))) if known else 1

    def _points(self) -> list[tuple[int, float]]:
        known = self._known
        if known is not None:  # without the lock
            return known
        with self._lock:
            if self._known is None:
                self._known = self._looked()
                release_workers()  # whoever asks first looks
            return self._known

    def _looked(self) -> list[tuple[int, float]]:
        """A network that cannot be run on fake tensors has no forecast: memory that runs out is met as it comes."""
        known = {}
        for size in self._sizes:
            try:
                known[_latents(size)] = self._peak(*size) / _latents(size)
            except Exception as error:
                _log.warning("no memory forecast for latents of %dx%d: %s", *size, type(error).__name__)
                return []
        return sorted(known.items())

    def _peak(self, rows: int, columns: int) -> int:
        count, unet = self._branches, self._unet
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            like: dict[str, Any] = {"device": unet.device, "dtype": unet.dtype}
            sample = torch.empty((count, unet.config.in_channels, rows, columns), **like)
            embeds = torch.empty((count, self._text_length, unet.config.cross_attention_dim), **like)
            timesteps = torch.empty((count,), dtype=torch.int64, device=unet.device)
            with _LiveBytes() as live:
                live.know(list(unet.parameters()) + list(unet.buffers()))
                unet(sample, timesteps, encoder_hidden_states=embeds, return_dict=False)
        peak: int = live.peak
        return peak


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages from when an operation returns them until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def know(self, tensors: list[torch.Tensor]) -> None:
        """Leave these tensors' storages out: weights are there anyway."""
        self._weights = {each.untyped_storage()._cdata for each in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self._add(each.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        identity = storage._cdata
        if identity in self._seen or identity in self._weights:
            return
        self._seen.add(identity)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, identity, size)

    def _free(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.now -= size


def _rounded(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // _GRID) * _GRID, -(-columns // _GRID) * _GRID


def _latents(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _per_latent(known: Sequence[tuple[int, float]], latents: int) -> float:
    """Bytes: as looked into, or on the line between the neighbours, beyond the largest on the last line."""
    for at, value in known:
        if at == latents:
            return value
    if len(known) == 1:
        return known[0][1] * max(1.0, latents / known[0][0])
    right = next((index for index, (at, _) in enumerate(known) if at > latents), len(known) - 1)
    (low, first), (high, last) = known[max(0, right - 1)], known[max(1, right)]
    return (1 + MARGIN) * max(first + (last - first) * (latents - low) / (high - low), min(first, last))


def free_bytes(device: torch.device) -> float:
    """The memory that activations may take now: on CUDA what is free there or held by torch without use, elsewhere what
    the system or this container has left."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return min([_available(), *(container_left(Path(folder), *names) for folder, *names in _CGROUPS)])


def _available() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**21
        return 0.5 * pages * 4096  # no better word from this system: half of what it has


def container_left(folder: Path, limit: str, used: str, cached: str) -> float:
    """What a control group in `folder` leaves to its processes; infinite without a limit. Files that are only cached
    count as free, as they are dropped first: after a model was read, they are most of what is used."""
    try:
        lines = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        reclaimable = next((int(value) for name, value in lines if name == cached), 0)
        most, now = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
    except (OSError, ValueError):  # no such file, or "max"
        return float("inf")
    return float(most - now + reclaimable)
