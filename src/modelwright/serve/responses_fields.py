"""What every field of OpenAI's Responses API means here, told in the words of the chat request.

A request is translated, so that both APIs run through one code path. As in `serve.fields`, each field is implemented,
harmless, neutral or refused by name. Calls and their results stand in the input as items of their own; a call joins
the assistant's turn before it. Not done: pictures, files, reasoning items, built-in tools, prompts kept on a server.

Source: the OpenAI API reference, "Responses", and the request fields of its Python client 3.52.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from modelwright.base.errors import RequestError
from modelwright.serve.fields import check_neutral, flag, refuse, whole

IMPLEMENTED = frozenset({
    "model", "input", "instructions", "max_output_tokens", "temperature", "top_p", "tools", "tool_choice",
    "parallel_tool_calls", "text", "stream", "store", "previous_response_id", "metadata",
})  # fmt: skip
HARMLESS: dict[str, type] = {
    "user": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "prompt_cache_options": dict,
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "image": (),
    "background": (False,),
    "background_options": (),
    "conversation": (),
    "context_management": (),
    "include": ([],),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}),
    "service_tier": ("auto", "default"),
    "stream_options": ({}, {"include_obfuscation": False}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "betas": ([],),
}
MAX_ITEMS = 4096
PART_FIELDS = {"type", "text", "prompt_cache_breakpoint", "annotations", "logprobs"}  # the last two come with answers
FORMAT_FIELDS = {"type", "name", "description", "schema", "strict"}
TEXT_PARTS = ("input_text", "output_text", "text")
ITEM_FIELDS = {
    "message": {"type", "role", "content", "id", "status", "phase"},
    "function_call": {"type", "call_id", "name", "arguments", "id", "status", "namespace", "caller"},
    "function_call_output": {"type", "call_id", "output", "id", "status", "caller"},
}
TOOL_FIELDS = frozenset({"type", "name", "description", "parameters", "strict"})
Turn = dict[str, Any]


def check_names(body: Mapping[str, Any]) -> None:
    """Refuse every field that this server would have to ignore."""
    for name, value in body.items():
        if name in IMPLEMENTED or (value is None and name in HARMLESS):
            continue
        if name in HARMLESS:
            if not isinstance(value, HARMLESS[name]):
                refuse(name, value, "an object" if HARMLESS[name] is dict else "a text")
        elif name in NEUTRAL:
            check_neutral(name, value, NEUTRAL[name], name)
        else:
            raise _unknown(name)


def _unknown(name: str) -> RequestError:
    return RequestError(f"Unrecognized field: {name}.", param=name, code="unknown_parameter")


def chat_body(body: Mapping[str, Any], turns: Sequence[Turn]) -> dict[str, Any]:
    """Return the chat request that means the same.

    Args:
        body: The request.
        turns: The conversation: that of the response before, if there is one, and the input. The instructions of
            this request go before it; those of earlier ones are gone.
    """
    instructions = body.get("instructions")
    if instructions is not None:
        if not isinstance(instructions, str):
            refuse("instructions", instructions, "a text")
        turns = [{"role": "system", "content": instructions}, *turns]
    length = whole(body, "max_output_tokens", None)
    if length is not None and length < 1:
        refuse("max_output_tokens", length, "at least 1", "invalid_value")
    asked = {"model": body.get("model"), "messages": list(turns), "max_tokens": length, **_form(body), **_tools(body)}
    for name in ("temperature", "top_p", "parallel_tool_calls"):
        if body.get(name) is not None:
            asked[name] = body[name]
    return asked


def input_turns(body: Mapping[str, Any]) -> list[Turn]:
    """Return the turns that the input of a request adds to the conversation."""
    given = body.get("input")
    if isinstance(given, str) and given:
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_ITEMS:
        refuse("input", given, f"a non-empty text or a list of 1 to {MAX_ITEMS} items")
    turns: list[Turn] = []
    for i, item in enumerate(given):
        _add(turns, item, f"input[{i}]")
    return turns


def _add(turns: list[Turn], item: Any, where: str) -> None:
    """Add one item of the input to the turns."""
    kind = item.get("type", "message" if "role" in item else None) if isinstance(item, dict) else item
    if not isinstance(kind, str) or kind not in ITEM_FIELDS:
        refuse(
            f"{where}.type", kind, f"one of {', '.join(ITEM_FIELDS)}; no other is supported", "unsupported_parameter"
        )
    for name in {name for name, value in item.items() if value is not None} - ITEM_FIELDS[kind]:
        raise _unknown(f"{where}.{name}")
    if kind == "message":
        turns.append({"role": item.get("role"), "content": _seen(item.get("content"), f"{where}.content")})
        return
    if not isinstance(item.get("call_id"), str):
        refuse(f"{where}.call_id", item.get("call_id"), "a text")
    if kind == "function_call_output":
        output = item.get("output")
        text = output if isinstance(output, str) else _content(output, f"{where}.output")
        turns.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
        return
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    call = {"id": item["call_id"], "type": "function", "function": function}
    if turns and turns[-1]["role"] == "assistant":
        turns[-1] = {**turns[-1], "tool_calls": [*turns[-1].get("tool_calls", ()), call]}
    else:
        turns.append({"role": "assistant", "content": None, "tool_calls": [call]})


def _seen(content: Any, where: str) -> str | list[dict[str, Any]]:
    """Return the content of a message: a text, or with pictures the parts of a chat message."""
    is_image = [isinstance(p, dict) and p.get("type") == "input_image" for p in content] if _is_list(content) else []
    if not any(is_image):
        return _content(content, where)
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(content):
        if not is_image[i]:
            parts.append({"type": "text", "text": _content([part], where)})
            continue
        if not isinstance(part.get("image_url"), str):
            refuse(f"{where}[{i}].image_url", part.get("image_url"), "a URL; file_id and the like are not supported")
        for name, value in part.items():
            if name not in ("type", "image_url", "detail") and value is not None:
                raise _unknown(f"{where}[{i}].{name}")
        shown = {"url": part["image_url"], **({"detail": part["detail"]} if part.get("detail") else {})}
        parts.append({"type": "image_url", "image_url": shown})
    return parts


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        refuse(where, content, "a text or a list of parts")
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in TEXT_PARTS:
            refuse(f"{where}[{i}].type", kind, f"{' or '.join(TEXT_PARTS)}; no other is read", "unsupported_parameter")
        if not isinstance(part.get("text"), str):
            refuse(f"{where}[{i}].text", part.get("text"), "a text")
        for name in part:
            if name not in PART_FIELDS:
                raise _unknown(f"{where}[{i}].{name}")
    return "".join(part["text"] for part in content)


def _form(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``response_format`` that ``text.format`` asks for."""
    text = body.get("text")
    if text is None:
        return {}
    if not isinstance(text, dict):
        refuse("text", text, "an object with format")
    for name, value in text.items():
        if name == "verbosity":
            check_neutral("text.verbosity", value, ("medium",), "text.verbosity")
        elif name != "format":
            raise _unknown(f"text.{name}")
    form = text.get("format")
    if form is None:
        return {}
    kind = form.get("type") if isinstance(form, dict) else form
    if kind not in ("text", "json_object", "json_schema"):
        refuse("text.format", form, 'an object whose type is "text", "json_object" or "json_schema"')
    for name in form if isinstance(form, dict) else ():
        if name not in FORMAT_FIELDS:
            raise _unknown(f"text.format.{name}")
    if kind != "json_schema":
        return {"response_format": {"type": kind}}
    if not isinstance(form.get("schema"), dict):
        refuse("text.format.schema", form.get("schema"), "a JSON Schema")
    schema = {"name": form.get("name"), "schema": form["schema"]}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tools and the choice among them; here a function stands in the tool, not under it."""
    given = body.get("tools") or []
    if not isinstance(given, list):
        refuse("tools", given, "a list of tools")
    made = []
    for i, tool in enumerate(given):
        kind = tool.get("type") if isinstance(tool, dict) else tool
        if kind != "function":
            refuse(f"tools[{i}].type", kind, '"function"; no other tools are supported', "unsupported_parameter")
        for name in set(tool) - TOOL_FIELDS:
            raise _unknown(f"tools[{i}].{name}")
        made.append({"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}})
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    return {**({"tools": made} if made else {}), **({"tool_choice": choice} if choice is not None else {})}


def is_stored(body: Mapping[str, Any]) -> bool:
    """Tell whether the response is to be kept; it is, unless the request says no."""
    return body.get("store") is None or flag(body, "store")


def metadata(body: Mapping[str, Any]) -> dict[str, str]:
    """Return the notes that the response carries."""
    value = body.get("metadata") or {}
    is_right = isinstance(value, dict) and len(value) <= 16
    if not is_right or not all(isinstance(v, str) and len(k) <= 64 and len(v) <= 512 for k, v in value.items()):
        refuse("metadata", value, "an object of at most 16 texts, keys of 64 and values of 512 characters")
    return dict(value)
