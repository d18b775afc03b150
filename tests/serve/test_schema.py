"""The OpenAPI document tells what the routes take, and a fuzzer that reads it finds no fault of the server."""

import contextlib
import zlib
from collections import Counter
from typing import Any

import httpx2
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from tests.serve.test_fuzz import ROUTES

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


def sent_by_schemathesis(method: str, path: str, document: dict[str, Any], url: str, count: int) -> Counter[int]:
    """Send what a fuzzer makes of the document, valid and broken, and return the statuses that came."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.specs.openapi import checks as openapi

    checks = [
        schemathesis.checks.not_a_server_error,
        openapi.status_code_conformance,
        openapi.content_type_conformance,
        openapi.response_schema_conformance,
    ]
    operation = schemathesis.openapi.from_dict(document)[path][method]
    statuses: Counter[int] = Counter()

    def send(case: Any) -> None:
        if isinstance(case.body, dict):
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], 4)
        statuses[case.call_and_validate(base_url=url, checks=checks).status_code] += 1

    def send_nearly_right(case: Any) -> None:
        """Of a body that fits the document keep two fields, beside what makes it a request of this server."""
        if isinstance(case.body, dict) and path in ROUTES:
            drawn = sorted(case.body.items(), key=lambda item: zlib.crc32(repr(item).encode()))[:2]
            case.body = {**dict(drawn), "model": "tiny", **ROUTES[path][1]}
        send(case)

    for mode, sender in (("POSITIVE", send), ("POSITIVE", send_nearly_right), ("NEGATIVE", send)):
        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode])
        kept = settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        with contextlib.suppress(Unsatisfiable):  # nothing is wrong for a route that takes anything
            kept(given(strategy)(sender))()
    return statuses


MANY = pytest.param(150, marks=pytest.mark.slow)


@pytest.mark.peer
@pytest.mark.parametrize("count", [8, MANY])
@pytest.mark.parametrize("path", BODIES)
def test_schemathesis_finds_no_fault(path: str, count: int, document: dict[str, Any], server: Any):
    statuses = sent_by_schemathesis("POST", path, document, server.url, count)
    assert statuses.total() >= 3 * count and any(400 <= status < 500 for status in statuses)
    has_answers = path not in ("/v1/embeddings", "/v1/rerank", "/v1/score")  # this server has no encoder
    assert not has_answers or statuses[200] >= count / 4, statuses
    server.wait_until_idle()


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("count", [12])
def test_schemathesis_finds_no_fault_in_routes_without_bodies(count: int, document: dict[str, Any], server: Any):
    asked = [
        (method.upper(), path)
        for path, methods in document["paths"].items()
        for method, told in methods.items()
        if "requestBody" not in told
    ]
    assert len(asked) > 15
    for method, path in asked:
        assert sent_by_schemathesis(method, path, document, server.url, count).total() >= 1, (method, path)
