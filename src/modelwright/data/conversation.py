"""One example of post-training data, whatever format it came in: turns, tools, and how good the answer was.

A `Conversation` is what every chat and instruction format is read into and written from (`data.formats`,
`data.preference_formats`). Plain conversations have ``messages`` alone; preference pairs keep the shared turns in
``messages`` and the two ways to go on in ``chosen`` and ``rejected``; KTO examples carry a ``label``. What a format
has beyond that stays in ``extra`` under its own key, so that nothing is lost on the way.

A message is spelled as OpenAI's API spells it. Pictures are refused, never guessed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from modelwright.base.errors import DataError
from modelwright.base.types import Message, ToolCall

ROLES = ("system", "developer", "user", "assistant", "tool")
Kind = Literal["chat", "preference", "label"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Turns to learn from, with what is known beside them."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()  # functions on offer: {"type": "function", "function": {...}}
    chosen: tuple[Message, ...] = ()  # of a preference pair: the better way to go on after messages
    rejected: tuple[Message, ...] = ()  # the worse one
    label: bool | None = None  # whether the last answer is a good one (KTO)
    extra: Mapping[str, Any] = field(default_factory=dict)  # other keys of the row, as they were

    @property
    def kind(self) -> Kind:
        """What can be learned from it."""
        return "preference" if self.chosen or self.rejected else "chat" if self.label is None else "label"

    @property
    def content(self) -> "Conversation":
        """The conversation without its extra keys."""
        return replace(self, extra={})


def read_message(item: Any, where: str) -> Message:
    """Return one message of the OpenAI form.

    Args:
        item: An object with role and content; content is a text, a list of text parts, or null beside tool calls.
        where: Names the place for the error.

    Raises:
        DataError: It is no such object; the message says which field and why.
    """
    if not isinstance(item, dict):
        raise DataError(f"{where} is {item!r:.80}; expected an object with role and content.")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: the role is {role!r}; known: {', '.join(ROLES)}.")
    calls = _read_calls(item.get("tool_calls"), where)
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{where}: the content is {content!r:.80}; expected text (pictures are not read).")
    if role == "assistant" and not content and not calls:
        raise DataError(f"{where}: the assistant's content is empty; there is nothing to learn. Remove the message.")
    if calls and role != "assistant":
        raise DataError(f"{where}: tool_calls stand in a turn of the role {role}; only the assistant calls tools.")
    if role != "tool":  # a person's name is not read: templates write only that of a tool
        return Message(role, content, calls)
    return Message(role, content, (), _text_or_none(item, "tool_call_id", where), _text_or_none(item, "name", where))


def _text_or_none(item: Mapping[str, Any], name: str, where: str) -> str | None:
    value = item.get(name)
    if value is None or isinstance(value, str):
        return value
    raise DataError(f"{where}: {name} is {value!r:.80}; expected text.")


def _read_calls(calls: Any, where: str) -> tuple[ToolCall, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls is {calls!r:.80}; expected a list of calls.")
    return tuple(_read_call(call, f"{where}, tool_calls[{place}]") for place, call in enumerate(calls))


def _read_call(call: Any, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f'{where} is {call!r:.80}; expected {{"id": ..., "function": {{"name", "arguments"}}}}.')
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):  # the API wants a text; many files hold the object itself
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(str(call.get("id", "")), function["name"], arguments)


def message_row(message: Message) -> Row:
    """Return a message as OpenAI's API spells it; what it does not have is left out."""
    row: Row = {"role": message.role, "content": message.content}
    if message.tool_calls:
        row["content"] = message.content or None
        row["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    for name in ("tool_call_id", "name"):
        if getattr(message, name) is not None:
            row[name] = getattr(message, name)
    return row


def read_messages(found: Any, where: str, name: str = "messages") -> tuple[Message, ...]:
    """Return a list of messages; an error names the place in it, counted from 1."""
    if not isinstance(found, list) or not found:
        raise DataError(f'{where}: {name} is {found!r:.60}; expected a list [{{"role": ..., "content": ...}}, ...].')
    place = "message" if name == "messages" else name + " message"
    return tuple(read_message(item, f"{where}, {place} {number}") for number, item in enumerate(found, start=1))


def read_tools(found: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Return the tools of a row: a list, or the JSON text of one; functions without their wrapping are wrapped."""
    if isinstance(found, str):
        try:
            found = json.loads(found) if found.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: tools is a text, but not valid JSON ({error}). Mend it or remove it.") from None
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise DataError(f"{where}: tools is {found!r:.80}; expected a list of objects.")
    return tuple(
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in found
    )


def difference(one: Conversation, other: Conversation) -> str:
    """Name the first field in which two conversations differ; empty when their content is equal."""
    for name in ("messages", "chosen", "rejected"):
        left, right = getattr(one, name), getattr(other, name)
        for place, (a, b) in enumerate(zip(left, right, strict=False), start=1):
            for part in ("role", "content", "tool_calls", "tool_call_id", "name"):
                if getattr(a, part) != getattr(b, part):
                    return f"{name}[{place}].{part}"
        if len(left) != len(right):
            return f"{name}[{min(len(left), len(right)) + 1}]"
    return next((name for name in ("tools", "label") if getattr(one, name) != getattr(other, name)), "")
