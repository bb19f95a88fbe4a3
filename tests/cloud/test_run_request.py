"""The request's newer fields: ranges, what unknown keys of newer minor versions do, and what decides a result."""

from __future__ import annotations

import json
from typing import Any

import pytest
from latentrelay.cloud.errors import ProblemError
from latentrelay.cloud.limits import Limits
from latentrelay.cloud.requests import RunRequest, parse_request, wire_version

PLAIN = {"prompt": "the cat", "seed": 1, "height": 16, "width": 16, "num_steps": 10, "split": 6}


def parsed(**changes: Any) -> RunRequest:
    return parse_request(json.dumps(PLAIN | changes).encode(), Limits())


def test_what_is_left_out_is_what_it_was() -> None:
    request = parsed()
    assert (request.wire_versions, request.accept_splits, request.deadline_ms) == (("1.0",), (), None)
    assert (request.deterministic, request.preview, request.step_cache) == (False, False, False)
    assert request.splits() == (6,)


def test_new_fields_are_read() -> None:
    request = parsed(
        schema_version="1.0",
        wire_versions=["1.1", "1.0"],
        accept_splits=[4, 2, 4],
        deadline_ms=1500,
        deterministic=True,
        preview=True,
        step_cache=True,
    )
    assert request.splits() == (2, 4, 6)
    assert wire_version(request) == "1.1"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"accept_splits": [6]}, "accept_splits"),
        ({"accept_splits": [0]}, "accept_splits.0"),
        ({"accept_splits": [1] * 65}, "accept_splits"),
        ({"accept_splits": [1.5]}, "accept_splits.0"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"deadline_ms": 3_600_001}, "deadline_ms"),
        ({"deadline_ms": True}, "deadline_ms"),
        ({"wire_versions": []}, "wire_versions"),
        ({"wire_versions": ["1"]}, "wire_versions.0"),
        ({"wire_versions": "1.0"}, "wire_versions"),
        ({"deterministic": 1}, "deterministic"),
        ({"schema_version": "2.0"}, "schema_version"),
        ({"schema_version": "1.00"}, "schema_version"),
        ({"new_key": 1}, "new_key"),
        ({"new_key": 1, "schema_version": "1.0"}, "new_key"),
        ({"new_key": 1, "schema_version": "2.0"}, "new_key"),
    ],
)
def test_what_is_out_of_range_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ProblemError) as caught:
        parsed(**change)
    assert (caught.value.status, caught.value.field) == (422, field)


def test_keys_of_a_newer_minor_version_are_left_out() -> None:
    assert parsed(schema_version="1.7", new_key={"a": [1]}, other=None).seed == 1
    with pytest.raises(ProblemError) as caught:
        parsed(schema_version="1.7", new_key=1, seed=-1)
    assert caught.value.field == "seed"


def test_no_version_in_common_is_refused() -> None:
    with pytest.raises(ProblemError, match="none of the handoff schema versions") as caught:
        wire_version(parsed(wire_versions=["1.99", "2.0"]))
    assert (caught.value.status, caught.value.kind, caught.value.received) == (406, "wire-version", "1.99, 2.0")


def test_how_a_result_is_wanted_does_not_change_which() -> None:
    same = parsed(deadline_ms=5, preview=True, wire_versions=["1.1"], schema_version="1.3")
    assert same.content() == parsed().content()
    for change in ({"seed": 2}, {"deterministic": True}, {"step_cache": True}, {"dtype": "float32"}):
        assert parsed(**change).content() != parsed().content()


@pytest.mark.parametrize(
    ("added", "field"),
    [
        (b'"seed": 1', "seed"),
        (b'"prompt": "another"', "prompt"),
        (b'"schema_version": "1.1", "new": {"a": 1, "b": [{"c": 1, "c": 1}]}', "c"),
        (b'"schema_version": "1.1", "n\\u0065w": 1, "new": 1', "new"),
    ],
)
def test_a_key_that_stands_twice_is_refused(added: bytes, field: str) -> None:
    with pytest.raises(ProblemError, match="stands twice") as caught:
        parse_request(json.dumps(PLAIN).encode()[:-1] + b", " + added + b"}", Limits())
    assert (caught.value.status, caught.value.kind) == (422, "invalid-request")
    assert caught.value.document()["field"] == field
    assert "another" not in json.dumps(caught.value.document())


def test_depth_and_long_numbers_are_bounded_before_keys_are_counted() -> None:
    for value in (b"[" * 20_000 + b"]" * 20_000, b"9" * 30_000):
        body = json.dumps(PLAIN | {"schema_version": "1.1"}).encode()[:-1] + b', "new": ' + value + b"}"
        with pytest.raises(ProblemError) as caught:
            parse_request(body, Limits())
        assert caught.value.kind == "malformed-json"
