"""The tools of a request: which functions the model may call, whether it must, and the grammar that holds it to that.

*auto* leaves the choice to the model; *required* and a named function force the form of a call, with each function's
schema, from the first token; *none* leaves the tools out of the prompt. ``strict`` functions hold the model to their
schemas under *auto* too: the answer is free until a call begins. A schema with a keyword that the grammar library
cannot check is refused wherever it would have to be checked.

Source: the OpenAI API reference, "function calling"; llguidance's Lark dialect, https://github.com/guidance-ai/llguidance.
"""

import contextlib
import json
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from modelwright.base.errors import RequestError
from modelwright.base.types import SamplingParams
from modelwright.serve import fields
from modelwright.serve.served import Piece
from modelwright.serve.tool_calls import CallForm, CallParser

MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
FUNCTION_FIELDS: dict[str, tuple[type, str]] = {
    "name": (str, "a text"),
    "description": (str, "a text"),
    "parameters": (dict, "a JSON Schema"),
    "strict": (bool, "true or false"),
}


@dataclass(frozen=True)
class ToolPlan:
    """What a request says about tools."""

    tools: tuple[Mapping[str, Any], ...] = ()  # as the chat template reads them
    mode: Literal["none", "auto", "required"] = "none"
    name: str | None = None  # the one function that must be called
    is_parallel: bool = True  # more than one call in an answer

    @property
    def is_on(self) -> bool:
        """True when an answer may hold calls."""
        return self.mode != "none"

    @property
    def shown(self) -> tuple[Mapping[str, Any], ...]:
        """The tools that the model is told of."""
        return self.tools if self.is_on else ()


def read_plan(body: Mapping[str, Any]) -> ToolPlan:
    """Return what a chat request says about tools."""
    given = body.get("tools") or []
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        fields.refuse("tools", given, f"a list of at most {MAX_TOOLS} tools")
    tools = tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(given))
    names = [tool["function"]["name"] for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        fields.refuse("tools", twice, "a different name for each function", "invalid_value")
    parallel = body.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        fields.refuse("parallel_tool_calls", parallel, "true or false")
    choice = body.get("tool_choice")
    if choice is None:
        choice = "auto" if tools else "none"
    if choice == "none" or (choice == "auto" and not tools):
        return ToolPlan(tools)
    if isinstance(choice, dict):
        name = _named(choice, names)
        return ToolPlan(tools, "required", name, is_parallel=False)
    if choice not in ("none", "auto", "required"):
        fields.refuse("tool_choice", choice, '"none", "auto", "required" or a function of tools')
    if not tools:
        fields.refuse("tool_choice", choice, 'left out, "none" or "auto" where no tools are given', "invalid_value")
    return ToolPlan(tools, "required" if choice == "required" else "auto", None, parallel is not False)


def _tool(tool: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        fields.refuse(f"{where}.type", kind, '"function"; no other tools are supported', "unsupported_parameter")
    function = tool.get("function")
    if not isinstance(function, dict):
        fields.refuse(f"{where}.function", function, "an object with name and parameters")
    for name in (
        *(n for n in tool if n not in ("type", "function")),
        *(n for n in function if n not in FUNCTION_FIELDS),
    ):
        raise RequestError(f"Unrecognized field: {where}.{name}.", param=f"{where}.{name}", code="unknown_parameter")
    for name, (kind, expected) in FUNCTION_FIELDS.items():
        if function.get(name) is not None and not isinstance(function[name], kind):
            fields.refuse(f"{where}.function.{name}", function[name], expected)
    if not NAME.fullmatch(function.get("name") or ""):
        fields.refuse(
            f"{where}.function.name", function.get("name"), "1 to 64 letters, digits, _ and -", "invalid_value"
        )
    described = {name: value for name, value in function.items() if value is not None}
    described.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": described}


def _named(choice: Mapping[str, Any], names: Sequence[str]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or set(choice) - {"type", "function"}:
        expected = 'none, auto, required, or {"type": "function", "function": {"name": ...}}'
        fields.refuse("tool_choice", choice, expected, "unsupported_parameter")
    if name not in names:
        fields.refuse("tool_choice", name, f"the name of a function in tools ({', '.join(names)})", "invalid_value")
    return str(name)


def constrain(plan: ToolPlan, params: SamplingParams, form: CallForm, special_ids: Mapping[str, int]) -> SamplingParams:
    """Return the sampling settings that hold an answer to the calls that the plan asks for.

    Raises:
        RequestError: The answer is held to another form already.
    """
    is_strict = any(tool["function"].get("strict") for tool in plan.tools)
    has_form = any(getattr(params, name) is not None for name in fields.FORMS.values())
    if not plan.is_on:
        return params
    if has_form:
        message = (
            "response_format and structured_outputs fix the form of the whole answer, which leaves no room for calls. "
            'Leave them out, or send tool_choice "none".'
        )
        raise RequestError(message, param="response_format", code="unsupported_parameter")
    if plan.mode == "auto" and not is_strict:
        return params
    return replace(params, grammar=call_grammar(plan, form, special_ids))


def call_grammar(plan: ToolPlan, form: CallForm, special_ids: Mapping[str, int]) -> str:
    """Return the grammar of an answer in Lark's notation: calls alone, or under *auto* a free text or calls after it.

    Args:
        plan: The tools and what is forced.
        form: How the model writes calls.
        special_ids: Its special tokens; a tag that is one of them is drawn as that token.
    """
    functions = [tool["function"] for tool in plan.tools if plan.name in (None, tool["function"]["name"])]
    is_free = plan.mode == "auto"

    def tag(text: str) -> str:
        return f"<[{special_ids[text]}]>" if text in special_ids else json.dumps(text)

    lines = []
    for i, function in enumerate(functions):
        head = json.dumps(f'{{"name": {json.dumps(function["name"])}, "{form.arguments}": ')
        is_checked = function.get("strict") or not is_free
        schema = {"type": "object", **function["parameters"]} if is_checked else {"type": "object"}
        compact = {**schema, "x-guidance": {"whitespace_flexible": False}}
        lines += [f'body_{i}: {head} args_{i} "}}"', f"args_{i}: %json {json.dumps(compact)}"]
    lines.append("body: " + " | ".join(f"body_{i}" for i in range(len(functions))))
    more = plan.is_parallel
    if form.is_list:
        opening, inner = tag(form.open), '"[" body ' + ('(", " body)* ' if more else "") + '"]"'
        rest = again = inner
    elif form.close:
        opening = tag(form.open)
        rest = f'"\\n" body "\\n" {tag(form.close)}'
        again = rest + (f' ("\\n" {opening} {rest})*' if more else "")
    else:
        opening, rest, again = ('"" ' if not is_free else tag(form.open)), "body", "body"
    if not is_free:
        return "\n".join([f"start: {opening} {again}", *lines]) + "\n"
    quoted = re.sub(r"([\\/\[\]()|.*+?{}^$])", r"\\\1", form.open)
    without = "" if form.open in special_ids else f" & ~/(?s:.*){quoted}(?s:.*)/"
    if form.is_bare:  # an answer that begins like a call is one
        free = r"TEXT: /[^{\[\s](?s:.*)/" + without
        return "\n".join([f"start: TEXT? | ({opening})? {again}", free, *lines]) + "\n"
    if form.open in special_ids:  # no text can hold the tag
        return "\n".join([f"start: TEXT? | TEXT? {opening} {again}", "TEXT: /(?s:.+)/", *lines]) + "\n"
    free = f"TEXT: /(?s:.*)/{without}"
    before = f"before[suffix={json.dumps(form.open)}]: /(?s:.*)/"
    return "\n".join([f"start: TEXT | before {again}", before, free, *lines]) + "\n"


async def with_calls(
    pieces: AsyncGenerator[Piece, None], form: CallForm, plan: ToolPlan
) -> AsyncGenerator[Piece, None]:
    """Take the calls out of an answer's text and pass them on as they come.

    Raises:
        RequestError: A schema cannot be checked.
    """
    parser = CallParser(form, plan.is_parallel)
    try:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                found = parser.push(piece.text)
                text, calls, reason = found.text, found.calls, piece.finish_reason
                if reason is not None:
                    last = parser.finish()
                    text, calls = text + last.text, [*calls, *last.calls]
                    if reason == "stop" and parser.num_complete:
                        reason = "tool_calls"
                if text or calls or piece.tokens or piece.token_ids or reason is not None:
                    yield replace(piece, text=text, calls=tuple(calls), finish_reason=reason)
    except RequestError as error:
        if error.param != "grammar":
            raise
        message = f"The tools cannot be enforced, because a schema among their parameters cannot: {error}"
        raise RequestError(message, param="tools", code=error.code) from error
