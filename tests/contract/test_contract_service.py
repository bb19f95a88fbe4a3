"""What the service says of itself: capabilities, readiness, metrics, and an OpenAPI document that is true."""

from __future__ import annotations

from typing import Any

import pytest

Api = Any


def test_capabilities(service: Api) -> None:
    facts = service.http.get("/v1/capabilities").json()
    assert facts["wire_versions"] == ["1.1", "1.0"]
    assert set(facts["queue"]) == {"waiting", "running", "limit"}
    assert facts["queue"]["limit"] >= 1
    assert facts["ttl_s"] == 600
    assert {"events", "range", "deadline", "accept_splits", "deterministic", "preview"} <= set(facts["features"])
    assert facts["max_batch"] is None or facts["max_batch"] >= 1
    service.made()
    assert service.http.get("/v1/capabilities").json()["step_ms"] > 0


def test_capabilities_are_what_a_request_may_pin(service: Api) -> None:
    for name, sampler in service.facts["samplers"].items():
        pinned = service.made(
            sampler=name,
            scheduler_digest=sampler["scheduler_digest"],
            model_digest=service.facts["model"]["digest"],
        )
        assert pinned.status_code == 200


def test_health_and_readiness_need_no_token(service: Api) -> None:
    with service.client(None) as http:
        assert (http.get("/healthz").status_code, http.get("/healthz").json()) == (200, {"status": "ok"})
        assert (http.get("/readyz").status_code, http.get("/readyz").json()) == (200, {"status": "ready"})


def test_metrics(service: Api) -> None:
    service.made()
    response = service.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    for name in ("latentrelay_requests_total", "latentrelay_steps_total", "latentrelay_handoff_bytes_total"):
        assert name in response.text
    assert "alice-token" not in response.text


def test_the_openapi_document_is_valid(service: Api) -> None:
    definitions = pytest.importorskip("schemathesis.specs.openapi.definitions")
    document = service.http.get("/v1/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    definitions.OPENAPI_31_VALIDATOR.validate(document)
    jsonschema = pytest.importorskip("jsonschema")
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_the_openapi_document_describes_what_is_answered(service: Api) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = service.http.get("/v1/openapi.json").json()

    def check(name: str, value: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(value)

    check("Capabilities", service.facts)
    job = service.post().headers["latentrelay-job"]
    check("Status", service.status(job))
    check("Status", service.ended(job))
    check("Problem", service.post(service.body(seed=-1)).json())
    check("RunRequest", service.body())
    for wrong in ({"seed": -1}, {"sharpness": 1}, {"height": 10**6}, {"split": "1"}, {"num_steps": 0}):
        with pytest.raises(jsonschema.ValidationError):
            check("RunRequest", service.body(**wrong))
    check("RunRequest", service.body(schema_version="1.4", sharpness=1))


def test_the_openapi_document_has_every_route(service: Api) -> None:
    paths = service.http.get("/v1/openapi.json").json()["paths"]
    for path, item in paths.items():
        url = path.replace("{id}", "0" * 32)
        answer = service.http.request("TRACE", url)
        assert answer.status_code == 405
        allowed = {each.lower() for each in answer.headers["allow"].replace(" ", "").split(",")}
        assert allowed - {"head"} == set(item) - {"head"}, path
