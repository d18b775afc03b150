"""Whatever is sent, an answer comes in the API's form and is never 5xx: bodies from the field tables, and noise."""

import json
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelwright.serve import anthropic_fields, fields, responses_fields, vectors

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
SMALL = st.integers(-2, 9) | st.floats(-1, 3)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": JUNK})
TALK = st.lists(TURN, max_size=3) | st.just([{"role": "user", "content": "Rain?"}])
BOUND = {"max_tokens": 4}
ROUTES: dict[str, tuple[frozenset[str], dict[str, Any]]] = {
    "/v1/chat/completions": (fields.CHAT, {"messages": [{"role": "user", "content": "Rain?"}], **BOUND}),
    "/v1/completions": (fields.COMPLETIONS, {"prompt": "Rain", **BOUND}),
    "/v1/responses": (responses_fields.IMPLEMENTED, {"input": "Rain?", "max_output_tokens": 4}),
    "/v1/responses/input_tokens": (responses_fields.IMPLEMENTED, {"input": "Rain?"}),
    "/v1/messages": (anthropic_fields.IMPLEMENTED, {"messages": [{"role": "user", "content": "Rain?"}], **BOUND}),
    "/v1/messages/count_tokens": (anthropic_fields.PROMPT, {"messages": [{"role": "user", "content": "Rain?"}]}),
    "/v1/embeddings": (vectors.EMBEDDINGS, {"input": "x"}),
    "/v1/rerank": (vectors.RERANK, {"query": "x", "documents": ["y"]}),
    "/v1/score": (vectors.SCORE, {"text_1": "x", "text_2": "y"}),
    "/v1/batches": (frozenset({"input_file_id", "endpoint", "completion_window", "metadata"}), {}),
    "/tokenize": (frozenset({"model", "prompt", "messages", "add_special_tokens"}), {"prompt": "x"}),
    "/detokenize": (frozenset({"model", "tokens"}), {"tokens": [1]}),
    "/api/tokenize": (frozenset({"text", "tokenizers"}), {"text": "x"}),
}


def changed(known: frozenset[str]) -> st.SearchStrategy[dict[str, Any]]:
    """One to three fields of a route, set to anything; lengths stay small so that answers do."""
    lengths = {"max_tokens", "max_completion_tokens", "max_output_tokens", "n", "min_tokens"}
    names = sorted(known - {"model"} | {"unknown"})
    value = {name: SMALL | JUNK.filter(lambda v: not isinstance(v, int) or v < 9) for name in lengths}
    value |= {"messages": TALK | JUNK}
    one = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), value.get(name, SMALL | JUNK)))
    return st.lists(one, min_size=1, max_size=3).map(dict)


def check(answer: httpx2.Response, path: str) -> None:
    assert answer.status_code < 500, (path, answer.text[:500])
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"] and error["type"]


@pytest.mark.parametrize("path", ROUTES)
def test_no_body_of_known_fields_is_answered_with_a_fault_of_the_server(path: str, server: Any):
    known, base = ROUTES[path]

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(changed(known))
    def run(change: dict[str, Any]) -> None:
        body = {"model": "tiny", **base, **change}
        check(client.post(server.url + path, content=json.dumps(body).encode()), path)

    with httpx2.Client(timeout=30) as client:
        run()
    server.wait_until_idle()


@pytest.mark.parametrize("path", ROUTES)
def test_noise_is_refused(path: str, server: Any):
    @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=60) | JUNK.map(lambda value: json.dumps(value).encode()))
    def run(data: bytes) -> None:
        answer = client.post(server.url + path, content=data)
        check(answer, path)
        assert answer.status_code >= 400

    with httpx2.Client(timeout=30) as client:
        run()
