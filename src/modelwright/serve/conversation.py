"""The messages of a chat request, read and checked: roles, texts, pictures, calls of tools and their answers."""

import json
from collections.abc import Mapping
from typing import Any

from modelwright.base.errors import RequestError
from modelwright.base.types import Message, ToolCall
from modelwright.serve.fields import check_neutral, refuse

MAX_MESSAGES = 4096
# Message fields that a client sends back from an earlier answer, ours included; they carry no new words.
MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {"refusal": (), "audio": (), "function_call": (), "annotations": ([],)}
MESSAGE_HARMLESS = frozenset({"name", "citations", "mode", "is_supported", "question"})
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
CALL_FIELDS = frozenset({"id", "type", "function", "index", "name", "arguments"})
PART_HARMLESS = {"cache_control", "prompt_cache_breakpoint"}  # prompts are cached without being asked
DETAILS = ("auto", "low", "high")  # this house's models read every picture in one size
OWN_FIELDS = {"assistant": "tool_calls", "tool": "tool_call_id"}


def messages(body: Mapping[str, Any], can_see: bool = False) -> list[Message]:
    """Return the conversation of a chat request; its pictures are URLs that nobody has opened yet.

    Args:
        body: The request.
        can_see: Whether the model reads pictures; they are refused otherwise.
    """
    turns = body.get("messages")
    if not isinstance(turns, list) or not 1 <= len(turns) <= MAX_MESSAGES:
        refuse("messages", turns, f"a list of 1 to {MAX_MESSAGES} messages")
    read: list[Message] = []
    called: dict[str, str] = {}
    for i, turn in enumerate(turns):
        message = _message(turn, f"messages[{i}]", called, can_see)
        called |= {call.id: call.name for call in message.tool_calls}
        read.append(message)
    return read


def _message(turn: Any, where: str, called: Mapping[str, str], can_see: bool) -> Message:
    if not isinstance(turn, dict):
        refuse(where, turn, "an object with role and content")
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        refuse(f"{where}.role", role, "system, developer, user, assistant or tool", "invalid_value")
    for name, value in turn.items():
        place = f"{where}.{name}"
        if name in MESSAGE_NEUTRAL:
            check_neutral(place, value, MESSAGE_NEUTRAL[name], place)
        elif name in OWN_FIELDS.values():
            if OWN_FIELDS.get(role) != name and value is not None:
                refuse(place, value, f"left out of a message of the {role}", "invalid_value")
        elif name not in MESSAGE_HARMLESS and name not in ("role", "content"):
            raise RequestError(f"Unrecognized field: {place}.", param=place, code="unknown_parameter")
    calls = _calls(turn.get("tool_calls"), f"{where}.tool_calls")
    content = turn.get("content")
    can_see = can_see and role == "user"
    text, images = ("", ()) if content is None and calls else _content(content, f"{where}.content", can_see)
    if role != "tool":
        return Message(ROLES[role], text, calls, images=images)
    answered = turn.get("tool_call_id")
    if not isinstance(answered, str) or answered not in called:
        refuse(f"{where}.tool_call_id", answered, "the id of a call in an assistant's message before", "invalid_value")
    return Message("tool", text, (), answered, called[answered])


def _calls(value: Any, where: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        refuse(where, value, "a list of calls")
    calls = []
    for i, call in enumerate(value):
        function = (
            call.get("function") if isinstance(call, dict) and call.get("type", "function") == "function" else None
        )
        if not isinstance(function, dict) or not isinstance(call.get("id"), str) or not call["id"]:
            refuse(f"{where}[{i}]", call, 'an object with id, type "function" and function')
        unknown = next((n for n in (*call, *function) if n not in CALL_FIELDS), None)
        if unknown is not None:
            place = f"{where}[{i}].{unknown}"
            raise RequestError(f"Unrecognized field: {place}.", param=place, code="unknown_parameter")
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not name or not _is_object(arguments):
            refuse(f"{where}[{i}].function", function, "a name, and arguments that are a JSON object as a text")
        calls.append(ToolCall(call["id"], name, str(arguments)))
    return tuple(calls)


def _is_object(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _content(content: Any, where: str, can_see: bool) -> tuple[str, tuple[tuple[int, str], ...]]:
    """Return a text, and the pictures in it with their places."""
    if isinstance(content, str):
        return content, ()
    if not isinstance(content, list):
        refuse(where, content, 'a text, or a list of {"type": "text", "text": ...} parts')
    text, images = "", list[tuple[int, str]]()
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind == "image_url" and can_see:
            images.append((len(text), _image(part, f"{where}[{i}]")))
            continue
        if kind != "text" or not isinstance(part.get("text"), str):
            known = "text or, in a message of the user, image_url" if can_see else "text; this model reads text only"
            refuse(f"{where}[{i}]", kind, f"a part of type {known}", "unsupported_parameter")
        _check_part(part, {"type", "text"}, f"{where}[{i}]")
        text += part["text"]
    return text, tuple(images)


def _check_part(part: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = next((name for name in part if name not in known | PART_HARMLESS), None)
    if unknown is not None:
        raise RequestError(f"Unrecognized field: {where}.{unknown}.", param=where, code="unknown_parameter")


def _image(part: Mapping[str, Any], where: str) -> str:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else None
    if not isinstance(image, dict) or not isinstance(url, str):
        refuse(f"{where}.image_url", image, "an object with a url: data:image/png;base64,... or https://...")
    _check_part(part, {"type", "image_url"}, where)
    _check_part(image, {"url", "detail"}, where)
    if image.get("detail") not in (None, *DETAILS):
        refuse(f"{where}.image_url.detail", image["detail"], "auto, low or high", "invalid_value")
    return url
