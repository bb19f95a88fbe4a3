"""OpenMP's worker threads: a thread that has loaded a model and will not run it must not keep any.

GNU's OpenMP, which torch brings on Linux, gives every thread that ever computed a pool of workers for good. Once all
pools together have more threads than there are processors, it waits at every barrier asleep instead of spinning for a
moment: a network call of many small operations then takes up to twice as long (docs/service.md has figures). A server
loads on one thread and runs on another, so it comes to that by itself.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

_SOFT = 1  # omp_pause_soft of OpenMP 5.0: resources are given up, values are kept


def release_workers() -> bool:
    """End the OpenMP workers of the calling thread; its next parallel computation starts new ones.

    Returns whether there is a GNU OpenMP that did; other implementations do not have the problem. Not for a thread that
    computes now.
    """
    pause = _pause()
    return pause is not None and pause(_SOFT) == 0


@functools.cache
def _pause() -> ctypes._NamedFuncPointer | None:
    """`omp_pause_resource_all` of the libgomp that lies in torch's own folder: it is loaded already."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            return ctypes.CDLL(str(path)).omp_pause_resource_all
        except (OSError, AttributeError):  # older than OpenMP 5.0
            continue
    return None
