"""What every field of Anthropic's Messages API means here, told in the words of the OpenAI chat request.

A request is translated, so that both APIs run through one code path. As in `serve.fields`, each field is implemented,
harmless, neutral or refused by name. Tool results become turns of the tool; a turn of the user that holds results and
text becomes several. Not done: a last turn of the assistant that is to be continued, pictures in
results of tools and pictures that were uploaded before, thinking.

Source: the Anthropic API reference, and the request fields of its Python client 2.11.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from modelwright.base.errors import RequestError
from modelwright.serve.fields import check_neutral, number, refuse, whole

PROMPT = frozenset({"model", "messages", "system", "tools", "tool_choice"})
IMPLEMENTED = PROMPT | {"max_tokens", "temperature", "top_p", "top_k", "stop_sequences", "stream", "output_config"}
HARMLESS: dict[str, type] = {
    "metadata": dict,
    "cache_control": dict,  # prompts are cached without being asked
    "user_profile_id": str,
    "workspace_id": str,
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "thinking": ({"type": "disabled"},),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "container": (),
    "diagnostics": (),
    "inference_geo": (),
    "output_config": ({},),
    "output_format": (),
    "mcp_servers": ([],),
    "context_management": (),
}
MAX_STOPS = 16
Block = Mapping[str, Any]


def check_names(body: Mapping[str, Any], implemented: frozenset[str]) -> None:
    """Refuse every field that this server would have to ignore."""
    for name, value in body.items():
        if name in implemented or (value is None and name in HARMLESS):
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


def prompt_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a request says about its prompt as a chat request: messages and tools."""
    turns: list[dict[str, Any]] = []
    if body.get("system") is not None:
        turns.append({"role": "system", "content": _texts(body["system"], "system")})
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        refuse("messages", given, "a list of messages")
    for i, turn in enumerate(given):
        turns += _turns(turn, f"messages[{i}]")
    if given[-1]["role"] == "assistant":
        message = (
            "The last message is the assistant's; to continue it is not supported. End with a message of the user."
        )
        raise RequestError(message, param="messages", code="unsupported_parameter")
    return {"model": body.get("model"), "messages": turns, **_tools(body)}


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chat request that means the same."""
    length = whole(body, "max_tokens", None)
    if length is None or length < 1:
        refuse("max_tokens", length, "a whole number of at least 1; it is required")
    if number(body, "temperature", 1.0) > 1:
        refuse("temperature", body["temperature"], "between 0 and 1", "invalid_value")
    stops = body.get("stop_sequences") or []
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops) or len(stops) > MAX_STOPS:
        refuse("stop_sequences", stops, f"a list of at most {MAX_STOPS} non-empty texts")
    sampling = {name: body[name] for name in ("temperature", "top_p", "top_k") if body.get(name) is not None}
    return {**prompt_body(body), "max_tokens": length, "stop": stops, **sampling, **_output(body)}


def _output(body: Mapping[str, Any]) -> dict[str, Any]:
    config = body.get("output_config") or {}
    if not isinstance(config, dict):
        refuse("output_config", config, "an object")
    for name, value in config.items():
        if name != "format" and value is not None:
            raise _unknown(f"output_config.{name}")
    form = config.get("format")
    if form is None:
        return {}
    if not isinstance(form, dict) or form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        refuse("output_config.format", form, 'an object of type "json_schema" with a schema')
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "output", "schema": form["schema"]}}}


def _turns(turn: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(turn, dict) or turn.get("role") not in ("user", "assistant"):
        role = turn.get("role") if isinstance(turn, dict) else turn
        refuse(f"{where}.role", role, "user or assistant", "invalid_value")
    for name in turn:
        if name not in ("role", "content"):
            raise _unknown(f"{where}.{name}")
    content, where = turn.get("content"), f"{where}.content"
    if isinstance(content, str):
        return [{"role": turn["role"], "content": content}]
    if not isinstance(content, list) or not content:
        refuse(where, content, "a text or a list of content blocks")
    kinds = ("text", "tool_use") if turn["role"] == "assistant" else ("text", "image", "tool_result")
    for i, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else block
        if kind not in kinds:
            refuse(f"{where}[{i}].type", kind, f"{' or '.join(kinds)}; no other is supported", "unsupported_parameter")
        _check_block(block, f"{where}[{i}]")
    text = "".join(block["text"] for block in content if block["type"] == "text")
    if turn["role"] == "assistant":
        calls = [_call(block) for block in content if block["type"] == "tool_use"]
        return [{"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}]
    results = [
        {"role": "tool", "tool_call_id": block["tool_use_id"], "content": _result(block, f"{where}[{i}]")}
        for i, block in enumerate(content)
        if block["type"] == "tool_result"
    ]
    if any(block["type"] == "image" for block in content):
        parts = [_part(block, f"{where}[{i}]") for i, block in enumerate(content) if block["type"] != "tool_result"]
        return [*results, {"role": "user", "content": parts}]
    return [*results, *([{"role": "user", "content": text}] if text or not results else [])]


def _part(block: Block, where: str) -> dict[str, Any]:
    """Return a text or a picture as the part of a chat message."""
    return {"type": "text", "text": block["text"]} if block["type"] == "text" else _image(block, where)


def _image(block: Block, where: str) -> dict[str, Any]:
    """Return the part of a chat message that shows the same picture."""
    source = block["source"]
    fields = {"base64": ("type", "media_type", "data"), "url": ("type", "url")}.get(source.get("type"))
    if fields is None:
        refuse(f"{where}.source.type", source.get("type"), "base64 or url", "unsupported_parameter")
    for name in source:
        if name not in fields:
            raise _unknown(f"{where}.source.{name}")
    for name in fields:
        if not isinstance(source.get(name), str):
            refuse(f"{where}.source.{name}", source.get(name), "a text")
    url = source["url"] if source["type"] == "url" else f"data:{source['media_type']};base64,{source['data']}"
    return {"type": "image_url", "image_url": {"url": url}}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


BLOCK_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "text": {"text": _is_text},
    "tool_use": {"id": _is_text, "name": _is_text, "input": lambda value: isinstance(value, dict)},
    "tool_result": {"tool_use_id": _is_text},
    "image": {"source": lambda value: isinstance(value, dict)},
}
# `citations` and `caller` come back with blocks of earlier answers.
BLOCK_MORE = {
    "text": {"cache_control", "citations"},
    "tool_use": {"cache_control", "caller"},
    "tool_result": {"cache_control", "content", "is_error"},
    "image": {"cache_control", "citations"},
}


def _check_block(block: Block, where: str) -> None:
    kind = block["type"]
    for name in block:
        if name != "type" and name not in BLOCK_FIELDS[kind] and name not in BLOCK_MORE[kind]:
            raise _unknown(f"{where}.{name}")
    for name, is_right in BLOCK_FIELDS[kind].items():
        if not is_right(block.get(name)):
            refuse(f"{where}.{name}", block.get(name), "an object" if name in ("input", "source") else "a text")


def _call(block: Block) -> dict[str, Any]:
    arguments = json.dumps(block["input"], ensure_ascii=False)
    return {"id": block["id"], "type": "function", "function": {"name": block["name"], "arguments": arguments}}


def _result(block: Block, where: str) -> str:
    text = "" if block.get("content") is None else _texts(block["content"], f"{where}.content")
    return f"Error: {text}" if block.get("is_error") else text


def _texts(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse(where, value, "a text or a list of text blocks")
    for i, block in enumerate(value):
        if not isinstance(block, dict) or block.get("type") != "text":
            kind = block.get("type") if isinstance(block, dict) else block
            refuse(f"{where}[{i}].type", kind, "text; no other block is supported here", "unsupported_parameter")
        _check_block(block, f"{where}[{i}]")
    return "".join(block["text"] for block in value)


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    given = body.get("tools") or []
    if not isinstance(given, list):
        refuse("tools", given, "a list of tools")
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(given)]
    choice = body.get("tool_choice")
    if choice is None:
        return {"tools": tools}
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind not in ("auto", "any", "tool", "none"):
        refuse("tool_choice", choice, 'an object whose type is "auto", "any", "tool" or "none"')
    unknown = next((name for name in choice if name not in ("type", "name", "disable_parallel_tool_use")), None)
    if unknown is not None:
        raise _unknown(f"tool_choice.{unknown}")
    if not isinstance(choice.get("disable_parallel_tool_use") or False, bool):
        refuse("tool_choice.disable_parallel_tool_use", choice["disable_parallel_tool_use"], "true or false")
    wanted: Any = {"any": "required", "tool": {"type": "function", "function": {"name": choice.get("name")}}}.get(
        kind, kind
    )
    return {"tools": tools, "tool_choice": wanted, "parallel_tool_calls": not choice.get("disable_parallel_tool_use")}


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") not in (None, "custom"):
        kind = tool.get("type") if isinstance(tool, dict) else tool
        refuse(f"{where}.type", kind, '"custom" or left out; no other tools are supported', "unsupported_parameter")
    for name in tool:
        if name not in ("type", "name", "description", "input_schema", "strict", "cache_control"):
            raise _unknown(f"{where}.{name}")
    if not isinstance(tool.get("input_schema"), dict):
        refuse(f"{where}.input_schema", tool.get("input_schema"), "a JSON Schema")
    function = {name: tool[name] for name in ("name", "description", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}
