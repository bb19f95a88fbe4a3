"""Hostile handoff blobs: whatever comes, the parser reads it or refuses it with its own error, in bounded memory."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latentrelay.runtime.errors import HandoffFormatError
from latentrelay.runtime.handoff import Handoff

GOLDEN = Path(__file__).parents[1] / "golden"
CORPUS = GOLDEN / "handoff_corpus"
CASES = 2000


def fuzz_seeds() -> list[bytes]:
    """The golden blob, the same in schema 1.1, and one in float32 without memory."""
    first = (GOLDEN / "handoff-1.0.safetensors").read_bytes()
    handoff = Handoff.from_bytes(first)
    newer = dataclasses.replace(handoff.meta, schema_version="1.1")
    single = dataclasses.replace(newer, dtype="float32")
    others = [Handoff(handoff.latents, handoff.x0_prev, newer), Handoff(np.float32(handoff.latents), None, single)]
    return [first, *(each.to_bytes() for each in others)]


def test_the_corpus_is_parsed_as_it_was(handoff_mutations: Any) -> None:
    index = json.loads((CORPUS / "index.json").read_text())
    assert {path.stem for path in CORPUS.glob("*.bin")} == set(index)
    assert {entry["once"] for entry in index.values() if "once" in entry} >= {"OverflowError", "RecursionError"}
    for name, entry in index.items():
        outcome = handoff_mutations.examined((CORPUS / f"{name}.bin").read_bytes())
        assert (outcome == "accepted") == (entry["outcome"] == "accepted"), (name, entry, outcome)
    assert len({entry["outcome"] for entry in index.values()}) >= 80


def test_mutated_blobs_are_read_or_refused(handoff_mutations: Any) -> None:
    outcomes, kinds = Counter[str](), Counter[str]()
    for kind, blob in handoff_mutations.cases(fuzz_seeds(), CASES, seed=0):
        outcomes[handoff_mutations.examined(blob)] += 1
        kinds[kind] += 1
    assert sum(outcomes.values()) == CASES
    assert set(kinds) == set(handoff_mutations.KINDS)
    assert len(outcomes) > 40
    assert 0.02 * CASES < outcomes["accepted"] < 0.3 * CASES  # some mutations leave a valid blob, most do not


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=JSON, metadata=JSON, body=st.binary(max_size=64))
def test_any_json_is_read_or_refused(handoff_mutations: Any, header: Any, metadata: Any, body: bytes) -> None:
    document = header if isinstance(header, dict) else {"latents": header}
    document["__metadata__"] = {"latentrelay": json.dumps(metadata)}
    text = json.dumps(document).encode()
    handoff_mutations.examined(len(text).to_bytes(8, "little") + text + body)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(sorted(dataclasses.asdict(Handoff.from_bytes(fuzz_seeds()[0]).meta))), value=JSON)
def test_any_value_of_any_field_is_read_or_refused(handoff_mutations: Any, field: str, value: Any) -> None:
    header, body = handoff_mutations.apart(fuzz_seeds()[1])
    header["__metadata__"][field] = value
    handoff_mutations.examined(handoff_mutations.together(header, body))


def test_bombs_take_no_memory(handoff_mutations: Any) -> None:
    """Runs of timesteps, shapes and nesting that stand for gigabytes are refused before they are made."""
    header, body = handoff_mutations.apart(fuzz_seeds()[1])
    raw, bombs = handoff_mutations.Raw, []
    for runs in ("[[0,1,1000000000]]", "[" + ",".join(["[0,1,9999]"] * 9000) + "]", "[[0,1,9e99]]"):
        changed = {**header, "__metadata__": {**header["__metadata__"], "timesteps": raw(runs)}}
        bombs.append(handoff_mutations.together(changed, body))
    for shape in ([1, 2048, 2048, 2048], [1, 2**40, 1, 1], [1, 4, 2, 2**31]):
        changed = {**header, "latents": {**header["latents"], "shape": shape}}
        bombs.append(handoff_mutations.together(changed, body))
    bombs.append(handoff_mutations.framed(b"{" * 200_000, b""))
    bombs.append(handoff_mutations.framed(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b""))
    tracemalloc.start()
    try:
        for bomb in bombs:
            with pytest.raises(HandoffFormatError):
                Handoff.from_bytes(bomb)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


def test_a_refusal_quotes_little(handoff_mutations: Any) -> None:
    header, body = handoff_mutations.apart(fuzz_seeds()[1])
    for name in ("schema_version", "model_digest", "unknown", "producer", "timesteps", "prompt_digest"):
        for value in ("x" * 100_000, ["x" * 100_000], {"y" * 100_000: 1}, "\x1b[2J" * 1000):
            changed = {**header, "__metadata__": {**header["__metadata__"], name: value}}
            try:
                Handoff.from_bytes(handoff_mutations.together(changed, body))
            except HandoffFormatError as error:
                assert len(str(error)) < 1000  # noqa: PT017
