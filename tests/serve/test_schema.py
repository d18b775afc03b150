"""The OpenAPI document tells what the routes take, and a fuzzer that reads it finds no fault of the server."""

from typing import Any

import httpx2
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings

from modelwright.serve.schema import BODIES, body_schema


@pytest.fixture(scope="module")
def document(server: Any) -> dict[str, Any]:
    return dict(httpx2.get(f"{server.url}/openapi.json").json())


def test_every_body_is_described_and_fits_what_clients_send(document: dict[str, Any]):
    assert set(BODIES) <= set(document["paths"])
    for path in BODIES:
        jsonschema.Draft202012Validator.check_schema(body_schema(path))
        assert document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"] == body_schema(
            path
        )
    sent = {"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 0, "stop": ["a"], "n": 2}
    jsonschema.validate(sent, body_schema("/v1/chat/completions"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**sent, "temprature": 0}, body_schema("/v1/chat/completions"))


def test_refusals_are_documented_and_the_frameworks_own_is_not(document: dict[str, Any]):
    for methods in document["paths"].values():
        for told in methods.values():
            assert {"400", "401", "404", "413", "429", "503"} <= set(told["responses"])
            assert "422" not in told["responses"]


@pytest.mark.peer
@pytest.mark.parametrize("path", BODIES)
def test_schemathesis_finds_no_fault(path: str, document: dict[str, Any], server: Any):
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.specs.openapi.checks import status_code_conformance

    checks = [schemathesis.checks.not_a_server_error, status_code_conformance]
    schema = schemathesis.openapi.from_dict(document)

    operation = schema[path]["POST"]

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy())
    def run(case: Any) -> None:
        if isinstance(case.body, dict):
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if name in case.body:
                    case.body[name] = 4
        case.call_and_validate(base_url=server.url, checks=checks)

    run()
