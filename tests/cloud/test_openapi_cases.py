"""What schemathesis makes of the OpenAPI document is answered as the document says, and never by 500."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXAMPLES = 5
BODY = {"prompt": "a", "height": 16, "width": 16, "num_steps": 4, "split": 2}


def test_answers_are_those_of_the_document(hostile_target: Any, openapi_cases: Any, tiny: Any, tmp_path: Path) -> None:
    model = tiny.save_pipeline(tiny.make_pipeline(tmp_path / "work"), tmp_path / "model")
    (tmp_path / "target").mkdir()
    with hostile_target.Target(model, tmp_path / "target", head_s=30.0, body_s=30.0, idle_s=30.0) as target:
        with target.client() as http:
            made = [
                http.post("/v1/handoffs", json={**BODY, "seed": seed}, headers={"Prefer": "wait=60"}) for seed in (1, 2)
            ]
        jobs = [each.headers["latentrelay-job"] for each in made]
        counts = openapi_cases.run(target.url, hostile_target.TOKENS["alice"], EXAMPLES, jobs)
        assert target.alive()
    assert sum(counts.values()) > 10 * EXAMPLES
    operations = {" ".join(each.split()[:2]) for each in counts}
    assert {"POST /v1/handoffs", "GET /v1/handoffs/{id}", "DELETE /v1/handoffs/{id}"} <= operations
    assert not any(each.endswith(" 500") for each in counts)
