"""How other services are asked for an answer: one small class a protocol, requests out, answers and pieces in.

Each turns our messages and settings into the body that the service reads, and what comes back into our records. A
setting that a protocol has no word for is refused by name; none is left out in silence. Text only: pictures and tools
are not carried.

Source: the API references of OpenAI (chat completions), Anthropic (messages), Gemini (generateContent), Cohere (v2
chat) and Ollama (/api/chat).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from modelwright.base.errors import RequestError
from modelwright.base.types import Completion, Delta, FinishReason, Message, SamplingParams, Usage

ANTHROPIC_VERSION = "2023-06-01"
_DEFAULTS = {f.name: f.default for f in fields(SamplingParams) if f.name != "logit_bias"}
_KNOWN_BY_ALL = {"temperature", "top_p", "max_tokens", "stop"}


@dataclass(frozen=True)
class Call:
    """One HTTP request, without the address of the service."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


class Provider(Protocol):
    """One protocol."""

    url: str  # where the service is, unless an endpoint says otherwise
    is_lines: bool  # a stream is JSON lines, not server-sent events

    def call(self, model: str, messages: Sequence[Message], params: SamplingParams, is_streamed: bool) -> Call:
        """Return the request for an answer."""
        ...

    def headers(self, key: str | None) -> dict[str, str]:
        """Return the headers that carry the key."""
        ...

    def read(self, body: Mapping[str, Any]) -> Completion:
        """Return the whole answer that a body holds."""
        ...

    def read_event(self, event: Mapping[str, Any]) -> Delta | None:
        """Return what one event of a stream adds; None: nothing."""
        ...

    def count_call(self, model: str, messages: Sequence[Message]) -> tuple[Call, str] | None:
        """Return the request that counts a prompt's tokens and the field of its answer; None: the service has none."""
        ...


def check_settings(name: str, params: SamplingParams, known: set[str]) -> None:
    """Refuse what a protocol cannot ask for.

    Raises:
        RequestError: A setting differs from its default and has no word in the protocol.
    """
    said = {n for n, default in _DEFAULTS.items() if getattr(params, n) != default}
    said |= {"logit_bias"} if params.logit_bias else set()
    unknown = sorted(said - known - _KNOWN_BY_ALL)
    if unknown:
        value = getattr(params, unknown[0])
        raise RequestError(
            f"{unknown[0]} is {value!r}, which {name} cannot be asked for. Leave it out, or use another endpoint.",
            param=unknown[0],
            code="unsupported_parameter",
        )


def _turns(name: str, messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """Return the system text and the other turns."""
    for message in messages:
        if message.role == "tool" or message.tool_calls:
            told = f"A message of the role {message.role!r} carries a tool call, which is not sent to {name}."
            raise RequestError(f"{told} Leave tools out.", param="messages", code="unsupported_parameter")
        if message.images:
            told = f"A message has {len(message.images)} pictures, which are not sent to {name}."
            raise RequestError(f"{told} Send text alone.", param="messages", code="unsupported_parameter")
    system = "\n\n".join(m.content for m in messages if m.role == "system")
    return system, [m for m in messages if m.role != "system"]


def _reason(said: Any, lengths: Sequence[str]) -> FinishReason:
    return "length" if said in lengths else "stop"


def _completion(text: Any, reason: FinishReason, usage: Usage) -> Completion:
    if not isinstance(text, str):
        raise TypeError(f"the text is {text!r:.60}")
    return Completion(text, (), reason, usage)


class OpenAI:
    """Chat completions, as OpenAI and every compatible server take them: vLLM, llama.cpp, this house."""

    url = "https://api.openai.com/v1"
    is_lines = False
    settings = {"seed", "frequency_penalty", "presence_penalty", "logit_bias", "json_schema"}

    def call(self, model: str, messages: Sequence[Message], params: SamplingParams, is_streamed: bool) -> Call:
        """Return the request for an answer."""
        check_settings("OpenAI's protocol", params, self.settings)
        _turns("OpenAI's protocol", messages)
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "max_completion_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
        }
        for name in ("seed", "frequency_penalty", "presence_penalty"):
            if getattr(params, name) != _DEFAULTS[name]:
                body[name] = getattr(params, name)
        if params.stop:
            body["stop"] = list(params.stop)
        if params.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
        if params.json_schema is not None:
            form = {"name": "answer", "schema": params.json_schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        if is_streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return Call("/chat/completions", body)

    def headers(self, key: str | None) -> dict[str, str]:
        """Return the headers that carry the key."""
        return {} if key is None else {"authorization": f"Bearer {key}"}

    def read(self, body: Mapping[str, Any]) -> Completion:
        """Return the whole answer that a body holds."""
        choice = body["choices"][0]
        text = choice["message"].get("content") or ""
        return _completion(text, _reason(choice["finish_reason"], ["length"]), self._usage(body.get("usage")))

    def read_event(self, event: Mapping[str, Any]) -> Delta | None:
        """Return what one event of a stream adds."""
        usage = self._usage(event["usage"]) if event.get("usage") else None
        if not event.get("choices"):
            return Delta("", usage=usage) if usage else None
        choice = event["choices"][0]
        said = choice.get("finish_reason")
        reason = _reason(said, ["length"]) if said else None
        return Delta(choice["delta"].get("content") or "", (), reason, usage)

    @staticmethod
    def _usage(usage: Mapping[str, Any] | None) -> Usage:
        usage = usage or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Usage(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), cached)

    def count_call(self, model: str, messages: Sequence[Message]) -> tuple[Call, str] | None:
        """The API has no count of its own."""
        return None


class Anthropic:
    """Messages."""

    url = "https://api.anthropic.com"
    is_lines = False

    def call(self, model: str, messages: Sequence[Message], params: SamplingParams, is_streamed: bool) -> Call:
        """Return the request for an answer."""
        check_settings("Anthropic", params, {"top_k", "json_schema"})
        body = {**self._prompt(model, messages), "max_tokens": params.max_tokens}
        body["temperature"] = min(params.temperature, 1.0)
        if params.temperature > 1:
            raise RequestError(
                f"temperature is {params.temperature}; Anthropic takes 0 to 1. Lower it.", param="temperature"
            )
        for name in ("top_p", "top_k"):
            if getattr(params, name) != _DEFAULTS[name]:
                body[name] = getattr(params, name)
        if params.stop:
            body["stop_sequences"] = list(params.stop)
        if params.json_schema is not None:
            body["output_config"] = {"format": {"type": "json_schema", "schema": params.json_schema}}
        return Call("/v1/messages", {**body, "stream": True} if is_streamed else body)

    def _prompt(self, model: str, messages: Sequence[Message]) -> dict[str, Any]:
        system, turns = _turns("Anthropic", messages)
        told = {"model": model, "messages": [{"role": m.role, "content": m.content} for m in turns]}
        return {**told, "system": system} if system else told

    def headers(self, key: str | None) -> dict[str, str]:
        """Return the headers that carry the key."""
        return {"anthropic-version": ANTHROPIC_VERSION, **({} if key is None else {"x-api-key": key})}

    def read(self, body: Mapping[str, Any]) -> Completion:
        """Return the whole answer that a body holds."""
        text = "".join(block["text"] for block in body["content"] if block["type"] == "text")
        return _completion(text, _reason(body["stop_reason"], ["max_tokens"]), self._usage(body["usage"]))

    def read_event(self, event: Mapping[str, Any]) -> Delta | None:
        """Return what one event of a stream adds."""
        kind = event["type"]
        if kind == "message_start":
            return Delta("", usage=self._usage(event["message"]["usage"]))
        if kind == "content_block_delta" and event["delta"]["type"] == "text_delta":
            return Delta(event["delta"]["text"])
        if kind == "message_delta":
            reason = _reason(event["delta"]["stop_reason"], ["max_tokens"])
            return Delta("", (), reason, self._usage(event["usage"]))
        return None

    @staticmethod
    def _usage(usage: Mapping[str, Any]) -> Usage:
        cached = usage.get("cache_read_input_tokens") or 0
        fresh = (usage.get("input_tokens") or 0) + (usage.get("cache_creation_input_tokens") or 0)
        return Usage(fresh + cached, usage.get("output_tokens") or 0, cached)

    def count_call(self, model: str, messages: Sequence[Message]) -> tuple[Call, str] | None:
        """Return the request that counts."""
        return Call("/v1/messages/count_tokens", self._prompt(model, messages)), "input_tokens"


class Gemini:
    """generateContent of Google's generative language API."""

    url = "https://generativelanguage.googleapis.com/v1beta"
    is_lines = False
    settings = {"top_k", "seed", "frequency_penalty", "presence_penalty", "json_schema"}
    names = {"frequency_penalty": "frequencyPenalty", "presence_penalty": "presencePenalty", "top_k": "topK"}

    def call(self, model: str, messages: Sequence[Message], params: SamplingParams, is_streamed: bool) -> Call:
        """Return the request for an answer."""
        check_settings("Gemini", params, self.settings)
        how: dict[str, Any] = {
            "maxOutputTokens": params.max_tokens,
            "temperature": params.temperature,
            "topP": params.top_p,
        }
        for name in ("top_k", "seed", "frequency_penalty", "presence_penalty"):
            if getattr(params, name) != _DEFAULTS[name]:
                how[self.names.get(name, name)] = getattr(params, name)
        if params.stop:
            how["stopSequences"] = list(params.stop)
        if params.json_schema is not None:
            how |= {"responseMimeType": "application/json", "responseJsonSchema": params.json_schema}
        verb = "streamGenerateContent?alt=sse" if is_streamed else "generateContent"
        return Call(f"/models/{model}:{verb}", {**self._prompt(messages), "generationConfig": how})

    def _prompt(self, messages: Sequence[Message]) -> dict[str, Any]:
        system, turns = _turns("Gemini", messages)
        roles = {"user": "user", "assistant": "model"}
        told: dict[str, Any] = {"contents": [{"role": roles[m.role], "parts": [{"text": m.content}]} for m in turns]}
        return {**told, "systemInstruction": {"parts": [{"text": system}]}} if system else told

    def headers(self, key: str | None) -> dict[str, str]:
        """Return the headers that carry the key."""
        return {} if key is None else {"x-goog-api-key": key}

    def read(self, body: Mapping[str, Any]) -> Completion:
        """Return the whole answer that a body holds."""
        delta = self.read_event(body)
        assert delta is not None
        return _completion(delta.text, delta.finish_reason or "stop", delta.usage or Usage(0, 0))

    def read_event(self, event: Mapping[str, Any]) -> Delta | None:
        """Return what one event of a stream adds."""
        candidate = event["candidates"][0]
        parts = (candidate.get("content") or {}).get("parts") or []
        text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
        said, told = candidate.get("finishReason"), event.get("usageMetadata") or {}
        cached = told.get("cachedContentTokenCount", 0)
        written = told.get("candidatesTokenCount", 0) + told.get("thoughtsTokenCount", 0)
        usage = Usage(told.get("promptTokenCount", 0), written, cached) if told else None
        return Delta(text, (), _reason(said, ["MAX_TOKENS"]) if said else None, usage)

    def count_call(self, model: str, messages: Sequence[Message]) -> tuple[Call, str] | None:
        """Return the request that counts."""
        told = {"generateContentRequest": {"model": f"models/{model}", **self._prompt(messages)}}
        return Call(f"/models/{model}:countTokens", told), "totalTokens"


class Cohere:
    """Chat of Cohere's second API."""

    url = "https://api.cohere.com"
    is_lines = False
    settings = {"top_k", "seed", "frequency_penalty", "presence_penalty", "json_schema"}
    names = {"top_k": "k"}

    def call(self, model: str, messages: Sequence[Message], params: SamplingParams, is_streamed: bool) -> Call:
        """Return the request for an answer."""
        check_settings("Cohere", params, self.settings)
        _turns("Cohere", messages)
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "p": params.top_p,
            "stream": is_streamed,
        }
        for name in ("top_k", "seed", "frequency_penalty", "presence_penalty"):
            if getattr(params, name) != _DEFAULTS[name]:
                body[self.names.get(name, name)] = getattr(params, name)
        if params.stop:
            body["stop_sequences"] = list(params.stop)
        if params.json_schema is not None:
            body["response_format"] = {"type": "json_object", "json_schema": params.json_schema}
        return Call("/v2/chat", body)

    def headers(self, key: str | None) -> dict[str, str]:
        """Return the headers that carry the key."""
        return {} if key is None else {"authorization": f"Bearer {key}"}

    def read(self, body: Mapping[str, Any]) -> Completion:
        """Return the whole answer that a body holds."""
        text = "".join(part["text"] for part in body["message"]["content"] if part["type"] == "text")
        return _completion(text, _reason(body["finish_reason"], ["MAX_TOKENS"]), self._usage(body.get("usage")))

    def read_event(self, event: Mapping[str, Any]) -> Delta | None:
        """Return what one event of a stream adds."""
        if event["type"] == "content-delta":
            return Delta(event["delta"]["message"]["content"].get("text", ""))
        if event["type"] == "message-end":
            delta = event["delta"]
            return Delta("", (), _reason(delta["finish_reason"], ["MAX_TOKENS"]), self._usage(delta.get("usage")))
        return None

    @staticmethod
    def _usage(usage: Mapping[str, Any] | None) -> Usage:
        tokens = (usage or {}).get("tokens") or {}
        return Usage(int(tokens.get("input_tokens") or 0), int(tokens.get("output_tokens") or 0))

    def count_call(self, model: str, messages: Sequence[Message]) -> tuple[Call, str] | None:
        """The API counts texts, not conversations."""
        return None


class Ollama:
    """/api/chat of an Ollama on this machine or another."""

    url = "http://127.0.0.1:11434"
    is_lines = True
    settings = {"top_k", "min_p", "seed", "repetition_penalty", "frequency_penalty", "presence_penalty", "json_schema"}
    names = {"repetition_penalty": "repeat_penalty"}

    def call(self, model: str, messages: Sequence[Message], params: SamplingParams, is_streamed: bool) -> Call:
        """Return the request for an answer."""
        check_settings("Ollama", params, self.settings)
        _turns("Ollama", messages)
        how: dict[str, Any] = {
            "num_predict": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
        }
        for name in self.settings - {"json_schema"}:
            if getattr(params, name) != _DEFAULTS[name]:
                how[self.names.get(name, name)] = getattr(params, name)
        if params.stop:
            how["stop"] = list(params.stop)
        told = [{"role": m.role, "content": m.content} for m in messages]
        body: dict[str, Any] = {"model": model, "messages": told, "stream": is_streamed, "options": how}
        return Call("/api/chat", body | ({"format": params.json_schema} if params.json_schema is not None else {}))

    def headers(self, key: str | None) -> dict[str, str]:
        """Return the headers that carry the key, which a proxy before it may ask for."""
        return {} if key is None else {"authorization": f"Bearer {key}"}

    def read(self, body: Mapping[str, Any]) -> Completion:
        """Return the whole answer that a body holds."""
        delta = self.read_event(body)
        assert delta is not None
        return _completion(delta.text, delta.finish_reason or "stop", delta.usage or Usage(0, 0))

    def read_event(self, event: Mapping[str, Any]) -> Delta | None:
        """Return what one line of a stream adds."""
        text = event["message"]["content"]
        if not event.get("done"):
            return Delta(text)
        usage = Usage(event.get("prompt_eval_count", 0), event.get("eval_count", 0))
        return Delta(text, (), _reason(event.get("done_reason"), ["length"]), usage)

    def count_call(self, model: str, messages: Sequence[Message]) -> tuple[Call, str] | None:
        """The API has no count of its own."""
        return None
