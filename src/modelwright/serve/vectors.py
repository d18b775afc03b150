"""Vectors and scores over HTTP: ``/v1/embeddings``, ``/v1/rerank``, ``/v1/score``.

Sentence encoders and rerankers stand beside the language model under names of their own. Work is done in the pool of
threads, so that a long list of texts holds up nobody's stream. A text longer than the encoder reads is refused, not
cut in silence, unless ``truncate_prompt_tokens`` asks for the cut.

Source: the OpenAI API reference (embeddings); Jina's and Cohere's rerank and ``input_type``; vLLM's ``/score`` and
``truncate_prompt_tokens``.
"""

import asyncio
import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from modelwright.base.errors import RequestError
from modelwright.base.types import Usage
from modelwright.serve import fields
from modelwright.serve.body import read_json
from modelwright.serve.errors import CLIENT_CLOSED_REQUEST
from modelwright.serve.events import ClientGoneError, while_connected
from modelwright.serve.keys import current_key
from modelwright.serve.web import FastAPI, JSONResponse, Request, Response

if TYPE_CHECKING:
    from modelwright.rag.embed import Embedder
    from modelwright.rag.rerank import CrossEncoder
    from modelwright.serve.served import Served

MAX_TEXTS = 2048  # in one request, as at OpenAI
EMBEDDINGS = frozenset({"model", "input", "encoding_format", "dimensions", "input_type", "truncate_prompt_tokens"})
RERANK = frozenset({"model", "query", "documents", "top_n", "return_documents", "truncate_prompt_tokens"})
ROLES = {None: "plain", "query": "query", "search_query": "query", "document": "passage", "search_document": "passage"}
SCORE = frozenset({"model", "text_1", "text_2", "truncate_prompt_tokens"})


@dataclass(frozen=True)
class Encoders:
    """What stands beside the language model, by the names that clients use."""

    embedders: Mapping[str, "Embedder"] = field(default_factory=dict)
    rerankers: Mapping[str, "CrossEncoder"] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All names."""
        return [*self.embedders, *self.rerankers]


class VectorRoutes:
    """The handlers of one application."""

    def __init__(self, served: "Served"):
        self.served = served
        self.encoders = served.encoders

    def install(self, app: FastAPI) -> None:
        """Add the routes to ``app``."""
        app.add_api_route("/v1/embeddings", self.embeddings, methods=["POST"])
        for path in ("/v1/rerank", "/v2/rerank", "/rerank"):  # Jina's and vLLM's, Cohere's second version
            app.add_api_route(path, self.rerank, methods=["POST"])
        for path in ("/v1/score", "/score"):
            app.add_api_route(path, self.score, methods=["POST"])

    async def embeddings(self, request: Request) -> Response:
        """Return a vector for each text."""
        body = await self._read(request, EMBEDDINGS)
        embedder = self._find(body, self.encoders.embedders, "an embedding model")
        encoding = body.get("encoding_format") or "float"
        if encoding not in ("float", "base64"):
            fields.refuse("encoding_format", encoding, '"float" or "base64"', "invalid_value")
        size = fields.whole(body, "dimensions", None) or embedder.size
        if not 1 <= size <= embedder.size:
            fields.refuse("dimensions", size, f"from 1 to {embedder.size}", "invalid_value")
        inputs, role = _inputs(body, embedder.vocab_size), body.get("input_type")
        if role is not None and (not isinstance(role, str) or role not in ROLES):
            fields.refuse("input_type", role, "left out, " + " or ".join(f'"{r}"' for r in ROLES if r), "invalid_value")

        def work() -> tuple[np.ndarray, int]:
            ids = _token_ids(embedder, inputs, "input", _cut(body, embedder.max_tokens), ROLES[role])
            vectors = embedder.embed_ids(ids)
            if size < embedder.size:  # the first numbers of a vector are the coarse ones in models trained for that
                vectors = vectors[:, :size] / np.linalg.norm(vectors[:, :size], axis=1, keepdims=True).clip(1e-12)
            return vectors, sum(map(len, ids))

        done = await self._do(request, work)
        if done is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        vectors, num_tokens = done
        shown = [_base64(v) if encoding == "base64" else v.tolist() for v in vectors]
        data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(shown)]
        return JSONResponse({"object": "list", "data": data, "model": body["model"], "usage": _usage(num_tokens)})

    async def rerank(self, request: Request) -> Response:
        """Order documents by how well they answer a query."""
        body = await self._read(request, RERANK)
        query, texts = _text(body, "query"), _documents(body)
        most = fields.whole(body, "top_n", None)
        if most is not None and most < 1:
            fields.refuse("top_n", most, "at least 1", "invalid_value")
        done = await self._score(request, body, [(query, text) for text in texts])
        if done is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        scores, num_tokens = done
        order = sorted(range(len(texts)), key=lambda i: (-scores[i], i))[:most]
        is_told = body.get("return_documents") is None or fields.flag(body, "return_documents")
        results = [
            {"index": i, "relevance_score": scores[i], **({"document": {"text": texts[i]}} if is_told else {})}
            for i in order
        ]
        return JSONResponse({"model": body["model"], "results": results, "usage": _usage(num_tokens)})

    async def score(self, request: Request) -> Response:
        """Score pairs of texts: one against many, or each with its own."""
        body = await self._read(request, SCORE)
        first, second = _texts(body, "text_1"), _texts(body, "text_2")
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            fields.refuse("text_2", f"{len(second)} texts", f"{len(first)} texts, as text_1, or text_1 one text alone")
        done = await self._score(request, body, list(zip(first, second, strict=True)))
        if done is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        scores, num_tokens = done
        data = [{"object": "score", "index": i, "score": score} for i, score in enumerate(scores)]
        return JSONResponse({"object": "list", "data": data, "model": body["model"], "usage": _usage(num_tokens)})

    async def _read(self, request: Request, known: frozenset[str]) -> dict[str, Any]:
        config = self.served.config
        body = await read_json(request, config.max_body_bytes, config.body_timeout_seconds)
        self.served.check_model(body.get("model"))
        fields.check_names(body, known)
        return body

    def _find(self, body: Mapping[str, Any], among: Mapping[str, Any], what: str) -> Any:
        name = body["model"]
        if name not in among:
            there = f"Ask one of: {', '.join(among)}." if among else "This server has none; see --embedder, --reranker."
            raise RequestError(f"{name} is not {what}. {there}", param="model", code="unsupported_model")
        return among[name]

    async def _score(
        self, request: Request, body: Mapping[str, Any], pairs: list[tuple[str, str]]
    ) -> tuple[list[float], int] | None:
        """Return the score of each pair and the tokens read; an embedder's score is the cosine of the two vectors."""
        both = {**self.encoders.embedders, **self.encoders.rerankers}
        model = self._find(body, both, "a reranker or an embedding model")
        cut = _cut(body, model.max_tokens)

        def with_cross_encoder() -> tuple[list[float], int]:
            lengths = model.pair_lengths(pairs)
            if cut is None:
                _check_lengths(lengths, model.max_tokens, "documents")
            return model.score(pairs).tolist(), sum(min(length, model.max_tokens) for length in lengths)

        def with_vectors() -> tuple[list[float], int]:
            queries = _token_ids(model, [query for query, _ in pairs], "query", cut, "query")
            passages = _token_ids(model, [passage for _, passage in pairs], "documents", cut)
            cosines = (model.embed_ids(queries) * model.embed_ids(passages)).sum(1)
            return cosines.tolist(), sum(map(len, set(queries))) + sum(map(len, passages))

        return await self._do(request, with_vectors if body["model"] in self.encoders.embedders else with_cross_encoder)

    async def _do(self, request: Request, work: Any) -> Any:
        """Do ``work`` in a thread; None: the client has left. Its tokens count for the key that asked."""
        key = current_key.get()
        try:
            loop = asyncio.get_running_loop()
            done = await while_connected(request, _awaited(loop.run_in_executor(self.served.pool, work)))
        except ClientGoneError:
            return None
        self.served.metrics.count_usage(Usage(done[1], 0))
        if key is not None:
            key.spend(done[1])
        return done


async def _awaited(future: Any) -> Any:
    return await future


def _cut(body: Mapping[str, Any], most: int) -> int | None:
    """Return how many tokens of a text are read when it is longer; None: such a text is refused."""
    cut = fields.whole(body, "truncate_prompt_tokens", None)
    if cut is None:
        return None
    if cut != -1 and not 1 <= cut <= most:
        fields.refuse("truncate_prompt_tokens", cut, f"-1 (all that the model reads) or from 1 to {most}")
    return most if cut == -1 else cut


def _token_ids(
    embedder: "Embedder", inputs: Sequence[str | list[int]], param: str, cut: int | None, role: Any = "passage"
) -> list[tuple[int, ...]]:
    texts = iter(embedder.encode([i for i in inputs if isinstance(i, str)], role, is_cut=False))
    ids = [next(texts) if isinstance(i, str) else tuple(i) for i in inputs]
    if cut is None:
        _check_lengths([len(one) for one in ids], embedder.max_tokens, param)
        return ids
    # The last token closes a text (a separator); it stays.
    return [one if len(one) <= cut else (*one[: cut - 1], one[-1]) for one in ids]


def _check_lengths(lengths: Sequence[int], most: int, param: str) -> None:
    place = next((i for i, length in enumerate(lengths) if length > most), None)
    if place is not None:
        raise RequestError(
            f"{param}[{place}] has {lengths[place]} tokens; this model reads {most}. Send a shorter text, or ask for "
            'the cut with "truncate_prompt_tokens": -1.',
            param=param,
            code="context_length_exceeded",
        )


def _inputs(body: Mapping[str, Any], vocab_size: int) -> list[str | list[int]]:
    """Return the texts or token ids of an embedding request."""
    value = body.get("input")
    if isinstance(value, list) and value and fields.are_ids(value):
        value = [value]
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_TEXTS or not all(map(_is_input, listed)):
        fields.refuse("input", value, f"a text, a list of token ids, or 1 to {MAX_TEXTS} of them")
    if any(isinstance(one, list) and (min(one) < 0 or max(one) >= vocab_size) for one in listed):
        fields.refuse("input", value, f"token ids from 0 to {vocab_size - 1}", "invalid_value")
    return listed


def _is_input(value: Any) -> bool:
    # An empty text is a text here: LangChain asks for its vector.
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and fields.are_ids(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _text(body: Mapping[str, Any], name: str) -> str:
    if not _is_text(body.get(name)):
        fields.refuse(name, body.get(name), "a non-empty text")
    return str(body[name])


def _texts(body: Mapping[str, Any], name: str) -> list[str]:
    value = body.get(name)
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_TEXTS or not all(map(_is_text, listed)):
        fields.refuse(name, value, f"a non-empty text or 1 to {MAX_TEXTS} of them")
    return listed


def _documents(body: Mapping[str, Any]) -> list[str]:
    value = body.get("documents")
    if isinstance(value, list):
        value = [d.get("text") if isinstance(d, dict) else d for d in value]
    return _texts({"documents": value if isinstance(value, list) else None}, "documents")


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode("ascii")


def _usage(num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
