"""Requests made up from the service's own OpenAPI document by schemathesis, sent to a running service and checked.

`run(url, token, examples, jobs)` sends `examples` fitting and as many misfitting requests for every operation and
returns the counts of operations and statuses; an answer that the document does not describe, or a 500, raises.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import SkipTest

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

ACCEPT = ("*/*", "application/json", "application/vnd.latentrelay.handoff", "text/event-stream")
SMALL = {"height": 16, "width": 16, "num_steps": 4, "split": 2, "sampler": None, "prompt": "a", "guidance": 2.0}
SMALL |= {"model_digest": None, "scheduler_digest": None, "accept_splits": [1]}
NAMES = (
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


class UnexpectedAnswerError(Exception):
    """An answer that no request may get."""


def run(url: str, token: str, examples: int, jobs: Sequence[str], *, first_seed: int = 0) -> dict[str, int]:
    """Every second request about a job names one of `jobs`, the others any id."""
    headers = {"Authorization": f"Bearer {token}"}
    schema = schemathesis.openapi.from_url(f"{url}/v1/openapi.json", headers=headers)
    sender = _Sender(url, headers, list(jobs))
    for row, result in enumerate(schema.get_all_operations()):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            sender.send(result.ok(), mode, examples, first_seed + row)
    return dict(sorted(sender.counts.items()))


class _Sender:
    """Sends, checks and counts."""

    def __init__(self, url: str, headers: dict[str, str], jobs: list[str]) -> None:
        self.counts: Counter[str] = Counter()
        self._url, self._headers, self._jobs = url, headers, jobs
        self._checks = [CHECKS.get_one(name) for name in NAMES]
        self._sent = 0

    def send(self, operation: Any, mode: GenerationMode, examples: int, number: int) -> None:
        """`examples` requests for one operation, which fit its description or do not."""

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            self._ask(f"{operation.method.upper()} {operation.path} {mode.value}", case)

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of schemathesis about its own generators
                ask()
        except (SkipTest, Unsatisfiable):
            pass  # nothing can misfit where nothing is asked for

    def _nearer(self, case: Any) -> None:
        """A job that is there, a media type that it has, a size that the model can make: past the first refusals."""
        turn = self._sent // 2
        if self._jobs and "id" in (case.path_parameters or {}):
            case.path_parameters["id"] = self._jobs[turn % len(self._jobs)]
            case.headers["Accept"] = ACCEPT[turn // len(self._jobs) % len(ACCEPT)]
        if isinstance(case.body, dict):
            case.body = {**case.body, **SMALL}

    def _ask(self, what: str, case: Any) -> None:
        self._sent += 1
        if self._sent % 2:
            self._nearer(case)
        response = case.call(base_url=self._url, headers=self._headers, timeout=120)
        self.counts[f"{what} {response.status_code}"] += 1
        if response.status_code == 500:
            raise UnexpectedAnswerError(f"500: {case.as_curl_command()}")
        case.validate_response(response, checks=self._checks)
