"""The handoff parser under 120,000 hostile blobs: read or refused with its own error, and no growth of memory.

A blob that does anything else is written to tests/golden/handoff_corpus/, which the quick suite replays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.runtime.handoff import Handoff

pytestmark = pytest.mark.slow
CASES = 120_000
GOLDEN = Path(__file__).parents[1] / "golden"
CORPUS = GOLDEN / "handoff_corpus"


def _seeds() -> list[bytes]:
    first = (GOLDEN / "handoff-1.0.safetensors").read_bytes()
    handoff = Handoff.from_bytes(first)
    newer = dataclasses.replace(handoff.meta, schema_version="1.1")
    single = dataclasses.replace(newer, dtype="float32")
    others = [Handoff(handoff.latents, handoff.x0_prev, newer), Handoff(np.float32(handoff.latents), None, single)]
    return [first, *(each.to_bytes() for each in others)]


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _kept(kind: str, blob: bytes, error: Exception) -> str:
    """Into the corpus with it."""
    name = hashlib.sha256(blob).hexdigest()[:16]
    (CORPUS / f"{name}.bin").write_bytes(blob)
    index = json.loads((CORPUS / "index.json").read_text())
    index[name] = {"kind": kind, "outcome": "refused", "once": type(error).__name__}
    (CORPUS / "index.json").write_text(json.dumps(dict(sorted(index.items())), indent=1) + "\n")
    return f"{name} ({kind}): {type(error).__name__}: {str(error)[:100]}"


def test_the_handoff_parser_holds(handoff_mutations: Any, measured: Callable[[str, dict[str, Any]], Path]) -> None:
    outcomes, kinds, failures, slowest_s = Counter[str](), Counter[str](), [], 0.0
    started, before = time.perf_counter(), 0.0
    for row, (kind, blob) in enumerate(handoff_mutations.cases(_seeds(), CASES, seed=20261123)):
        if row == CASES // 10:
            before = _peak_mib()
        kinds[kind] += 1
        begun = time.process_time()
        try:
            outcomes[handoff_mutations.examined(blob)] += 1
        except Exception as error:
            failures.append(_kept(kind, blob, error))
        slowest_s = max(slowest_s, time.process_time() - begun)
    grown = _peak_mib() - before
    known = {entry["outcome"] for entry in json.loads((CORPUS / "index.json").read_text()).values()}
    figures = {
        "cases": CASES,
        "kinds": dict(kinds),
        "outcomes": dict(outcomes.most_common()),
        "distinct_outcomes": len(outcomes),
        "outcomes_not_in_corpus": sorted(set(outcomes) - known),
        "failures": failures,
        "slowest_case_ms": round(1000 * slowest_s, 1),
        "peak_growth_mib": round(grown, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }
    measured("fuzz_handoff", figures)
    assert not failures
    assert set(kinds) == set(handoff_mutations.KINDS)
    assert slowest_s < 2
    assert grown < 64
