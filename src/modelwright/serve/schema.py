"""The OpenAPI document: what each route takes and answers, written from the field tables that the routes use.

The routes read their bodies on their own (see `serve.body`), so the framework knows nothing of them. Here each body is
an object of the known fields and no others; fields that pass only with their neutral value are listed with it. What a
value must be beyond that is told by the refusal, HTTP 400. Not done: the shapes of answers beyond their media type.

Source: the OpenAPI specification 3.1.
"""

from collections.abc import Mapping
from typing import Any

from modelwright.serve import anthropic_fields, fields, responses_fields, vectors
from modelwright.serve.web import FastAPI

JSON_TYPES = {str: "string", dict: "object", bool: "boolean"}
TEXT, NUMBER, WHOLE = {"type": ["string", "null"]}, {"type": ["number", "null"]}, {"type": ["integer", "null"]}
FLAG, LIST, THING = {"type": ["boolean", "null"]}, {"type": ["array", "null"]}, {"type": ["object", "null"]}
TYPES: dict[str, Mapping[str, Any]] = {
    **dict.fromkeys(("instructions", "previous_response_id", "encoding_format", "query", "input_type"), TEXT),
    **dict.fromkeys((*fields.NUMBERS, "temperature", "top_p"), NUMBER),
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens", "max_output_tokens", "top_k", "top_n", "min_tokens"), WHOLE
    ),
    **dict.fromkeys(("seed", "n", "top_logprobs", "dimensions", "truncate_prompt_tokens"), WHOLE),
    **dict.fromkeys(("stream", "ignore_eos", "echo", "parallel_tool_calls", "store", "return_documents"), FLAG),
    **dict.fromkeys(("tools", "bad_words", "stop_sequences"), LIST),
    **dict.fromkeys(("stream_options", "response_format", "structured_outputs", "logit_bias", "metadata"), THING),
    **dict.fromkeys(("text", "output_config"), THING),
    "model": {"type": "string"},
    "messages": {"type": "array", "items": {"type": "object"}, "minItems": 1},
    "documents": {"type": "array", "minItems": 1},
}
Neutral = Mapping[str, tuple[Any, ...]]
Body = tuple[frozenset[str], Mapping[str, type], Neutral, tuple[str, ...]]
# Path -> implemented fields, harmless ones, neutral ones, and those that must be there.
CHAT = (fields.CHAT, fields.HARMLESS, fields.NEUTRAL, ("model", "messages"))
RESPONSES = (responses_fields.IMPLEMENTED, responses_fields.HARMLESS, responses_fields.NEUTRAL, ("model", "input"))
ANTHROPIC = (anthropic_fields.HARMLESS, anthropic_fields.NEUTRAL)
RERANK: Body = (vectors.RERANK, fields.HARMLESS, {}, ("model", "query", "documents"))
SCORE: Body = (vectors.SCORE, fields.HARMLESS, {}, ("model", "text_1", "text_2"))
BODIES: dict[str, Body] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": (fields.COMPLETIONS, fields.HARMLESS, fields.NEUTRAL, ("model", "prompt")),
    "/v1/responses": RESPONSES,
    "/v1/messages": (anthropic_fields.IMPLEMENTED, *ANTHROPIC, ("model", "messages", "max_tokens")),
    "/v1/messages/count_tokens": (anthropic_fields.PROMPT, *ANTHROPIC, ("model", "messages")),
    "/v1/embeddings": (vectors.EMBEDDINGS, fields.HARMLESS, {}, ("model", "input")),
    "/v1/rerank": RERANK,
    "/v1/score": SCORE,
}
MEDIA = {"/metrics": "text/plain"}  # of answers that are no JSON
ERROR = {
    "type": "object",
    "properties": {"error": {"type": "object", "required": ["message", "type"]}},
    "required": ["error"],
}
REFUSALS = {
    "400": "The request is wrong; the message names the field.",
    "401": "No key, or an unknown one.",
    "403": "The key's scope, the host name or the page's origin does not allow it.",
    "404": "No such model, object or route.",
    "408": "The head or the body came too slowly.",
    "413": "The body is too large.",
    "429": "A limit of the key; retry-after tells when.",
    "503": "The queue is full, or the engine has stopped; retry-after tells when.",
    "504": "The answer took longer than it may.",
}


def body_schema(path: str) -> dict[str, Any]:
    """Return the JSON Schema of the body of a route in `BODIES`."""
    implemented, harmless, neutral, required = BODIES[path]
    properties: dict[str, Any] = {name: {"enum": [None, *values]} for name, values in neutral.items()}
    properties |= {name: {"type": [JSON_TYPES[kind], "null"]} for name, kind in harmless.items()}
    properties |= {name: dict(TYPES.get(name, {})) for name in implemented}
    if path == "/v1/completions":
        properties["logprobs"] = dict(WHOLE)
    return {
        "type": "object",
        "properties": dict(sorted(properties.items())),
        "required": list(required),
        "additionalProperties": False,
    }


def describe_routes(app: FastAPI) -> None:
    """Make ``/openapi.json`` of ``app`` tell bodies and refusals."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        for path, methods in document["paths"].items():
            for method, told in methods.items():
                _add(path, method, told)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _add(path: str, method: str, told: dict[str, Any]) -> None:
    answers = told.setdefault("responses", {})
    answers.pop("422", None)  # the framework's own refusal, which no route here gives
    for status, why in REFUSALS.items():
        answers[status] = {"description": why, "content": {"application/json": {"schema": ERROR}}}
    if path in MEDIA:
        answers["200"]["content"] = {MEDIA[path]: {}}
    if method == "post" and path in BODIES:
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": body_schema(path)}}}
        answers["200"]["content"] = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
