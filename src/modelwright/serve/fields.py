"""What every field of a request means here: implemented, harmless, or refused by name. None is silently ignored.

*Implemented* fields change the answer. *Harmless* ones are notes for the operator of a cloud service; their type is
checked and that is all. *Neutral* ones ask for something this server does not do, and pass only with the value that
asks for nothing. Any other name is refused, so a misspelt ``temprature`` never passes for an obeyed one.

Source: the OpenAI API reference, and the request fields of its Python client 3.52.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from modelwright.base.errors import RequestError
from modelwright.base.types import SamplingParams

MAX_STOPS = 16
SEED_LIMIT = 2**63

SAMPLING = frozenset({"temperature", "top_p", "top_k", "max_tokens", "seed", "stop", "ignore_eos"})
STREAMING = frozenset({"model", "stream", "stream_options"})
DOCUMENTS = SAMPLING | STREAMING | {"messages", "max_completion_tokens"}
NUMBERS = {  # more of `SamplingParams`, by the same names, with what asks for nothing
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
BEAMS = frozenset({"beam_width", "use_beam_search", "length_penalty", "early_stopping"})
CHOOSING = frozenset({"n", "best_of", "priority", *BEAMS})
DRAWING = frozenset({*NUMBERS, *CHOOSING, "logit_bias", "bad_words", "min_tokens", "logprobs", "structured_outputs"})
CHAT = DOCUMENTS | DRAWING | {"top_logprobs", "response_format", "tools", "tool_choice", "parallel_tool_calls"}
COMPLETIONS = SAMPLING | STREAMING | DRAWING | {"prompt", "echo"}
MAX_CHAT_LOGPROBS, MAX_TEXT_LOGPROBS = 20, 20
MAX_BIASES = 4096
SCHEMA_FIELDS = {"name", "description", "schema", "strict"}

HARMLESS: dict[str, type] = {
    "user": str,
    "metadata": dict,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "prompt_cache_options": dict,
    "parallel_tool_calls": bool,  # without tools there is nothing to run in parallel
}
# Field -> the values, beside null, that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "priority": (0,),
    "beam_width": (),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    **{name: (value,) for name, value in NUMBERS.items()},
    "logit_bias": ({},),
    "bad_words": ([],),
    "min_tokens": (0,),
    "structured_outputs": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),  # without tools both mean: answer in words
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "store": (False,),
    "service_tier": ("auto", "default"),
}


@dataclass(frozen=True)
class Streaming:
    """Whether the answer streams, and whether a last chunk tells the usage."""

    is_on: bool
    include_usage: bool


def refuse(name: str, value: Any, expected: str, code: str = "invalid_type") -> NoReturn:
    """Raise the error that names a field, its value and what it must be."""
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise RequestError(f"{name} is {shown}; it must be {expected}.", param=name, code=code)


def check_names(body: Mapping[str, Any], implemented: frozenset[str]) -> None:
    """Refuse every field that this server would have to ignore.

    >>> check_names({"temperature": 0, "user": "me", "n": 1}, CHAT)
    >>> check_names({"suffix": "x"}, CHAT)
    Traceback (most recent call last):
    ...
    modelwright.base.errors.RequestError: suffix is not supported by this server. Leave it out, or send null or "".
    """
    for name, value in body.items():
        if name in implemented or (value is None and name in HARMLESS):
            continue
        if name in HARMLESS:
            if not isinstance(value, HARMLESS[name]):
                refuse(name, value, {str: "a text", dict: "an object", bool: "true or false"}[HARMLESS[name]])
        elif name in NEUTRAL:
            check_neutral(name, value, NEUTRAL[name], name)
        else:
            raise RequestError(f"Unrecognized field: {name}.", param=name, code="unknown_parameter")


def check_neutral(name: str, value: Any, neutral: tuple[Any, ...], param: str) -> None:
    """Refuse a value that asks for something."""
    if value is None or any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral):
        return
    what = f"{name} is not supported by this server."
    if name == "response_format":
        kind = value.get("type") if isinstance(value, dict) else value
        what = f"'response_format' of type {kind!r} is not supported with this model."
    choices = " or ".join(["null", *(json.dumps(n) for n in neutral)])
    raise RequestError(f"{what} Leave it out, or send {choices}.", param=param, code="unsupported_parameter")


def number(body: Mapping[str, Any], name: str, default: float) -> float:
    """Return a number field, or the default when it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) > 1e300:
        refuse(name, value, "a number")
    return float(value)


def whole(body: Mapping[str, Any], name: str, default: int | None) -> int | None:
    """Return a whole-number field within 64 bits, or the default when it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not -SEED_LIMIT <= value < SEED_LIMIT:
        refuse(name, value, "a whole number of at most 64 bits")
    return value


def flag(body: Mapping[str, Any], name: str) -> bool:
    """Return a true-or-false field; absent and null mean false."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        refuse(name, value, "true or false")
    return bool(value)


def stop_texts(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the stop texts, given as one text or a list."""
    value = body.get("stop")
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts) or len(texts) > MAX_STOPS:
        refuse("stop", value, f"a non-empty text or a list of at most {MAX_STOPS} of them")
    return tuple(texts)


def max_tokens(body: Mapping[str, Any]) -> int | None:
    """Return the completion length asked for; both spellings mean the same and must not disagree."""
    old, new = whole(body, "max_tokens", None), whole(body, "max_completion_tokens", None)
    if old is not None and new is not None and old != new:
        refuse("max_tokens", old, f"left out, or equal to max_completion_tokens ({new})", "invalid_value")
    asked = new if new is not None else old
    if asked is not None and asked < 1:
        name = "max_completion_tokens" if new is not None else "max_tokens"
        refuse(name, asked, "at least 1", "invalid_value")
    return asked


def sampling(body: Mapping[str, Any], length: int, *, temperature: float = 1.0) -> SamplingParams:
    """Return the sampling settings of a request whose completion may have ``length`` tokens.

    Args:
        temperature: What a request that names none is given.
    """
    temperature = number(body, "temperature", temperature)
    if temperature > 2:
        refuse("temperature", temperature, "between 0 and 2", "invalid_value")
    return SamplingParams(
        temperature=temperature,
        top_p=number(body, "top_p", 1.0),
        top_k=whole(body, "top_k", 0) or 0,
        max_tokens=length,
        seed=whole(body, "seed", None),
        stop=stop_texts(body),
        ignore_eos=flag(body, "ignore_eos"),
        min_tokens=whole(body, "min_tokens", 0) or 0,
        logit_bias=_logit_bias(body),
        bad_words=_texts(body, "bad_words"),
        n=_whole_of(body, "n", 1),
        best_of=whole(body, "best_of", None),
        beam_width=_beam_width(body),
        length_penalty=number(body, "length_penalty", 1.0),
        early_stopping=flag(body, "early_stopping"),
        priority=_whole_of(body, "priority", 0),
        logprobs=_logprobs(body),
        prompt_logprobs=flag(body, "echo") and _logprobs(body) is not None,
        **_form(body),
        **{name: number(body, name, default) for name, default in NUMBERS.items()},  # type: ignore[arg-type]
    )


def num_completions(body: Mapping[str, Any]) -> int:
    """Return how many completions of one prompt are computed together."""
    return max(_whole_of(body, name, 1) for name in ("n", "best_of", "beam_width"))


def _whole_of(body: Mapping[str, Any], name: str, default: int) -> int:
    value = whole(body, name, default)
    return default if value is None else value


def _beam_width(body: Mapping[str, Any]) -> int | None:
    """Return the beams asked for; vLLM's ``use_beam_search`` takes ``n`` of them."""
    width = whole(body, "beam_width", None)
    return _whole_of(body, "n", 1) if width is None and flag(body, "use_beam_search") else width


def _texts(body: Mapping[str, Any], name: str) -> tuple[str, ...]:
    texts = body.get(name) or []
    if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts) or len(texts) > MAX_STOPS:
        refuse(name, body.get(name), f"a list of at most {MAX_STOPS} non-empty texts")
    return tuple(texts)


def _logit_bias(body: Mapping[str, Any]) -> dict[int, float]:
    """Return token ids and what is added to their logits; JSON writes the ids as texts."""
    biases = body.get("logit_bias") or {}
    is_right = isinstance(biases, dict) and len(biases) <= MAX_BIASES
    if not is_right or not all(str(k).isdecimal() and isinstance(b, (int, float)) for k, b in biases.items()):
        refuse("logit_bias", biases, f"an object of at most {MAX_BIASES} token ids, each with a number")
    return {int(token): float(bias) for token, bias in biases.items()}


# vLLM's names of the forms, and ours.
FORMS = {"json": "json_schema", "regex": "regex", "grammar": "grammar", "choice": "choices"}


def _form(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the form that the completion must keep to: OpenAI's ``response_format``, vLLM's ``structured_outputs``."""
    form: dict[str, Any] = {}
    wanted = body.get("structured_outputs") or {}
    if not isinstance(wanted, dict):
        refuse("structured_outputs", wanted, f"an object with one of {', '.join(FORMS)}")
    for name, value in wanted.items():
        if name not in FORMS:
            where = f"structured_outputs.{name}"
            raise RequestError(f"Unrecognized field: {where}.", param=where, code="unknown_parameter")
        is_right = {
            "json": isinstance(value, (dict, str)),
            "choice": isinstance(value, list) and all(isinstance(c, str) for c in value),
        }.get(name, isinstance(value, str))
        if value is not None and not is_right:
            refuse(f"structured_outputs.{name}", value, "a list of texts" if name == "choice" else "a text")
        if value is not None:
            form[FORMS[name]] = value
    return {**form, **_response_format(body)}


def _response_format(body: Mapping[str, Any]) -> dict[str, Any]:
    wanted = body.get("response_format")
    if wanted is None or "prompt" in body:
        return {}
    kind = wanted.get("type") if isinstance(wanted, dict) else wanted
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if kind != "json_schema":
        refuse("response_format", wanted, 'an object whose type is "text", "json_object" or "json_schema"')
    described = wanted.get("json_schema")
    _check_described(wanted, described)
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        refuse("response_format.json_schema", described, "an object with name and schema")
    return {"json_schema": schema}


def _check_described(wanted: Mapping[str, Any], described: Any) -> None:
    """Refuse what stands beside a schema and would be passed over; ``strict`` is what every schema is here."""
    known = {"response_format": {"type", "json_schema"}, "response_format.json_schema": SCHEMA_FIELDS}
    for (where, names), value in zip(known.items(), (wanted, described), strict=True):
        unknown = next((name for name in value if name not in names), None) if isinstance(value, dict) else None
        if unknown is not None:
            place = f"{where}.{unknown}"
            raise RequestError(f"Unrecognized field: {place}.", param=place, code="unknown_parameter")


def _logprobs(body: Mapping[str, Any]) -> int | None:
    """Return how many alternatives are told: ``logprobs`` is a flag in a chat, a number in a completion."""
    if "prompt" in body:
        value = whole(body, "logprobs", None)
        if value is not None and not 0 <= value <= MAX_TEXT_LOGPROBS:
            refuse("logprobs", value, f"from 0 to {MAX_TEXT_LOGPROBS}", "invalid_value")
        return value
    is_on, top = flag(body, "logprobs"), whole(body, "top_logprobs", None)
    if top is not None and not is_on and top != 0:
        refuse("top_logprobs", top, "left out unless logprobs is true", "invalid_value")
    if top is not None and not 0 <= top <= MAX_CHAT_LOGPROBS:
        refuse("top_logprobs", top, f"from 0 to {MAX_CHAT_LOGPROBS}", "invalid_value")
    return (top or 0) if is_on else None


def streaming(body: Mapping[str, Any]) -> Streaming:
    """Return how the answer is to be sent."""
    is_on = flag(body, "stream")
    options = body.get("stream_options")
    if options is None:
        return Streaming(is_on, False)
    if not isinstance(options, dict):
        refuse("stream_options", options, 'an object such as {"include_usage": true}')
    if not is_on:
        refuse("stream_options", options, "left out unless stream is true", "invalid_value")
    for name in options:
        if name == "include_obfuscation" and not options[name]:
            continue
        if name != "include_usage":
            raise RequestError(
                f"Unrecognized field: stream_options.{name}.", param=f"stream_options.{name}", code="unknown_parameter"
            )
    return Streaming(True, flag(options, "include_usage"))


def prompts(body: Mapping[str, Any], most: int) -> list[str | list[int]]:
    """Return the prompts of a completion request: one text, token ids, or a list of either."""
    prompt = body.get("prompt")
    expected = f"a text, a list of token ids, or a list of at most {most} of them"
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        refuse("prompt", prompt, expected)
    if are_ids(prompt):
        return [prompt]
    is_list = all(isinstance(p, str) or (isinstance(p, list) and p and are_ids(p)) for p in prompt)
    if not is_list or len(prompt) > most:
        refuse("prompt", prompt, expected)
    return prompt


def are_ids(value: Sequence[Any]) -> bool:
    """Return whether every item is a whole number."""
    return all(isinstance(i, int) and not isinstance(i, bool) for i in value)
