"""Instruction formats in and out: Alpaca, ShareGPT, OpenAI messages, prompt and completion, Self-Instruct seeds.

A format tells by a row's keys whether the row is its own (`fits`), reads it into a `Conversation`, and writes one. It
writes its own plain form only; `data.convert` sees to it that what the plain form lacks comes back all the same.

Source: the files of tatsu-lab/stanford_alpaca (Alpaca), FastChat and LLaMA-Factory (ShareGPT with ``function_call`` and
``observation`` turns), OpenAI's fine-tuning files, TRL's data set types, yizhongw/self-instruct (seed tasks).
Reading a bare prompt and completion as a turn of the user and one of the assistant is a decision of this file.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from modelwright.base.errors import DataError
from modelwright.base.types import Message, ToolCall
from modelwright.data.conversation import Conversation, Kind, Row, message_row, read_messages, read_tools

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bard": "assistant", "bing": "assistant", "model": "assistant", "system": "system", "observation": "tool",
    "tool": "tool", "function_response": "tool", "function_call": "call",
}  # fmt: skip
_FROM_ROLE = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


class ChatFormat(Protocol):
    """One format: a row of a file to a conversation, and back."""

    kind: Kind  # what a row of this format can say

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell by its keys whether a row is of this format."""
        ...

    def read(self, row: Row, where: str) -> Conversation:
        """Return the conversation of a row; an error names ``where`` and the field."""
        ...

    def write(self, conversation: Conversation) -> Row:
        """Return the row in the format's plain form; an error names the field that it cannot hold."""
        ...


def rest_of(row: Mapping[str, Any], *known: str) -> dict[str, Any]:
    """Return the keys of a row that a format does not read."""
    return {name: value for name, value in row.items() if name not in known}


def text_of(row: Mapping[str, Any], name: str, where: str, default: str | None = None) -> str:
    """Return a text field; an absent or null one is ``default``, if there is one."""
    value = row.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {value!r:.80}; expected text. Mend or remove the row.")
    return value


def need_answer(messages: Sequence[Message], where: str) -> tuple[Message, ...]:
    """Return the messages; refuse them when nothing in them could be learned."""
    if not any(message.role == "assistant" for message in messages):
        raise DataError(f"{where}: no message has the role assistant, so there is nothing to learn. Add an answer.")
    return tuple(messages)


def cannot_hold(format_name: str, field: str, seen: str) -> DataError:
    """Return the error of a format that has no place for something."""
    return DataError(f"{field} is {seen}; the format {format_name} has no place for it. Convert to messages instead.")


class Messages:
    """OpenAI's ``{"messages": [{"role", "content"}, ...], "tools": [...]}``, tool calls included."""

    kind: Kind = "chat"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether the row has messages."""
        return "messages" in row

    def read(self, row: Row, where: str) -> Conversation:
        """Read the messages and the tools on offer."""
        messages = need_answer(read_messages(row.get("messages"), where), where)
        return Conversation(messages, read_tools(row.get("tools"), where), extra=rest_of(row, "messages", "tools"))

    def write(self, conversation: Conversation) -> Row:
        """Write every field."""
        row: Row = {"messages": [message_row(message) for message in conversation.messages]}
        return row | ({"tools": list(conversation.tools)} if conversation.tools else {})


class Alpaca:
    """``{"instruction", "input", "output"}``; ``response`` is read for output, and ``system`` and ``history`` too.

    A turn of the user is the instruction, a blank line and the input. Where the input began is kept under
    ``input_at`` (characters), so that the two can be told apart again; ``answer_key`` keeps a name other than output.
    """

    kind: Kind = "chat"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether there are an instruction and an answer."""
        return "instruction" in row and ("output" in row or "response" in row)

    def read(self, row: Row, where: str) -> Conversation:
        """Read the system's text, the earlier pairs, and the question with its answer."""
        instruction, given = text_of(row, "instruction", where), text_of(row, "input", where, "")
        answer = "output" if "output" in row else "response"
        extra = rest_of(row, "instruction", "input", "output", "response", "system", "history", "input_at")
        if answer != "output":
            extra["answer_key"] = answer
        if given:
            extra["input_at"] = len(instruction) + 2
        messages = [Message("user", f"{instruction}\n\n{given}" if given else instruction)]
        messages += [Message("assistant", text_of(row, answer, where))]
        if not messages[-1].content:
            raise DataError(f"{where}: {answer} is empty; there is nothing to learn. Remove the row.")
        earlier = self._history(row.get("history") or [], where)
        system = text_of(row, "system", where, "")
        return Conversation((*([Message("system", system)] if system else []), *earlier, *messages), extra=extra)

    def _history(self, history: Any, where: str) -> list[Message]:
        is_pairs = isinstance(history, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
            for pair in history
        )
        if not is_pairs:
            raise DataError(f"{where}: history is {history!r:.80}; expected a list of [question, answer].")
        return [Message(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]

    def write(self, conversation: Conversation, name: str = "alpaca") -> Row:
        """Write one question and answer, with what came before as system and history."""
        turns = list(conversation.messages)
        system = turns.pop(0).content if turns and turns[0].role == "system" else ""
        roles = [turn.role for turn in turns]
        if conversation.tools or any(turn.tool_calls for turn in turns):
            raise cannot_hold(name, "tools", "a tool or a call of one")
        if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
            raise cannot_hold(name, "messages", f"the turns {', '.join(roles)}, not user and assistant in turn")
        asked, at = turns[-2].content, conversation.extra.get("input_at")
        at = at if isinstance(at, int) and 2 <= at < len(asked) and asked[at - 2 : at] == "\n\n" else None
        answer = "response" if conversation.extra.get("answer_key") == "response" else "output"
        row: Row = {"instruction": asked, "input": "", answer: turns[-1].content}
        if at is not None:
            row |= {"instruction": asked[: at - 2], "input": asked[at:]}
        if system:
            row["system"] = system
        if len(turns) > 2:
            texts = [turn.content for turn in turns[:-2]]
            row["history"] = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
        return row


class ShareGPT:
    """``{"conversations": [{"from": "human", "value": ...}, ...], "tools": "[...]"}``, with calls of tools.

    A turn ``function_call`` holds the JSON of one call or a list of them, ``observation`` the answer to the next one
    that has none. Calls get the ids call_1, call_2, ... unless they carry their own.
    """

    kind: Kind = "chat"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether there are conversations of {"from", "value"} turns."""
        return isinstance(row.get("conversations", row.get("conversation")), list)

    def read(self, row: Row, where: str) -> Conversation:
        """Read the turns, the system's text if it stands beside them, and the tools."""
        name = "conversations" if "conversations" in row else "conversation"
        turns = self.read_turns(row.get(name), f"{where}, {name}")
        system = text_of(row, "system", where, "")
        messages = need_answer((*([Message("system", system)] if system else []), *turns), where)
        return Conversation(messages, read_tools(row.get("tools"), where), extra=rest_of(row, name, "system", "tools"))

    def read_turns(self, turns: Any, where: str) -> list[Message]:
        """Return the messages of {"from", "value"} turns."""
        if not isinstance(turns, list) or not turns:
            raise DataError(f'{where} is {turns!r:.60}; expected a list [{{"from": ..., "value": ...}}, ...].')
        messages: list[Message] = []
        waiting: list[ToolCall] = []  # calls that no observation has answered yet
        num_calls = 0
        for number, turn in enumerate(turns, start=1):
            place = f"{where}[{number}]"
            if not isinstance(turn, dict):
                raise DataError(f'{place} is {turn!r:.60}; expected {{"from": ..., "value": ...}}.')
            role = SHAREGPT_ROLES.get(str(turn.get("from")))
            if role is None:
                raise DataError(f"{place}.from is {turn.get('from')!r:.60}; known: {', '.join(SHAREGPT_ROLES)}.")
            value = text_of({f"{place}.value": turn.get("value")}, f"{place}.value", where)
            if role == "call":
                calls = _read_call_text(value, place, num_calls)
                num_calls += len(calls)
                waiting = list(calls)
                messages.append(Message("assistant", "", calls))
            elif role == "tool":
                given = turn.get("tool_call_id", waiting.pop(0).id if waiting else None)
                messages.append(Message("tool", value, (), given, turn.get("name")))
            elif role == "assistant" and not value:
                raise DataError(f"{place}.value is empty; there is nothing to learn. Remove the turn.")
            else:
                messages.append(Message(role, value))
        return messages

    def write(self, conversation: Conversation) -> Row:
        """Write the turns; the tools as the JSON text of their functions."""
        row: Row = {"conversations": self.write_turns(conversation.messages)}
        if conversation.tools:
            tools = [t["function"] if set(t) == {"type", "function"} else t for t in conversation.tools]
            row["tools"] = json.dumps(tools, ensure_ascii=False)
        return row

    def write_turns(self, messages: Sequence[Message], num_calls: int = 0) -> list[Row]:
        """Return the {"from", "value"} turns of messages."""
        turns: list[Row] = []
        waiting: list[str] = []
        for place, message in enumerate(messages, start=1):
            if message.tool_calls and message.content:
                raise cannot_hold("sharegpt", f"messages[{place}].content", "a text beside tool_calls")
            if message.role not in _FROM_ROLE:
                raise cannot_hold("sharegpt", f"messages[{place}].role", repr(message.role))
            turn: Row = {"from": _FROM_ROLE[message.role], "value": message.content}
            if message.tool_calls:
                turn = {"from": "function_call", "value": _call_text(message.tool_calls, num_calls)}
                num_calls += len(message.tool_calls)
                waiting = [call.id for call in message.tool_calls]
            elif message.role == "tool":
                if message.tool_call_id != (waiting.pop(0) if waiting else None):
                    turn["tool_call_id"] = message.tool_call_id
                if message.name is not None:
                    turn["name"] = message.name
            turns.append(turn)
        return turns


def _read_call_text(text: str, where: str, num_before: int) -> tuple[ToolCall, ...]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}.value is no JSON ({error}); expected a call of a tool. Mend the turn.") from None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(f'{where}.value is {text!r:.80}; expected {{"name": ..., "arguments": {{...}}}}.')
    result = []
    for number, call in enumerate(calls, start=num_before + 1):
        arguments = call.get("arguments", {})
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        result.append(ToolCall(str(call.get("id", f"call_{number}")), call["name"], written))
    return tuple(result)


def _call_text(calls: Sequence[ToolCall], num_before: int) -> str:
    rows = []
    for number, call in enumerate(calls, start=num_before + 1):
        try:
            arguments = json.loads(call.arguments)
            if json.dumps(arguments, ensure_ascii=False) != call.arguments:
                arguments = call.arguments  # as the model wrote it, byte for byte
        except json.JSONDecodeError:
            arguments = call.arguments
        row = {"name": call.name, "arguments": arguments}
        rows.append(row if call.id == f"call_{number}" else {"id": call.id, **row})
    return json.dumps(rows[0] if len(rows) == 1 else rows, ensure_ascii=False)


class SelfInstruct:
    """The seed tasks of Self-Instruct: ``{"instruction", "instances": [{"input", "output"}]}`` with one instance."""

    kind: Kind = "chat"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether there are an instruction and instances."""
        return "instruction" in row and "instances" in row

    def read(self, row: Row, where: str) -> Conversation:
        """Read the one instance as Alpaca's input and output."""
        found = row.get("instances")
        if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
            raise DataError(f"{where}: instances is {found!r:.80}; expected a list of one object. Split the row.")
        inner = {"instruction": row.get("instruction"), **found[0]}
        conversation = Alpaca().read(inner, f"{where}, instances[1]")
        rest = rest_of(row, "instruction", "instances", "input_at")
        return Conversation(conversation.messages, extra=rest | dict(conversation.extra))

    def write(self, conversation: Conversation) -> Row:
        """Write a single question and answer."""
        place = {name: value for name, value in conversation.extra.items() if name == "input_at"}
        row = Alpaca().write(Conversation(conversation.messages, conversation.tools, extra=place), "self-instruct")
        if "system" in row or "history" in row:
            raise cannot_hold("self-instruct", "messages", f"{len(conversation.messages)} turns")
        return {"instruction": row["instruction"], "instances": [{"input": row["input"], "output": row["output"]}]}


class PromptCompletion:
    """TRL's ``{"prompt": [messages], "completion": [messages]}``; the completion is the last message."""

    kind: Kind = "chat"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether prompt and completion are lists of messages."""
        return isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list) and "label" not in row

    def read(self, row: Row, where: str) -> Conversation:
        """Join the two."""
        messages = read_messages(row.get("prompt"), where, "prompt") + read_messages(
            row.get("completion"), where, "completion"
        )
        extra = rest_of(row, "prompt", "completion", "tools")
        return Conversation(need_answer(messages, where), read_tools(row.get("tools"), where), extra=extra)

    def write(self, conversation: Conversation) -> Row:
        """Cut before the last message."""
        rows = Messages().write(conversation)
        last = conversation.messages[-1].role
        if last != "assistant" or len(conversation.messages) < 2:
            raise cannot_hold("completion", f"messages[{len(conversation.messages)}].role", repr(last))
        turns = rows.pop("messages")
        return {"prompt": turns[:-1], "completion": turns[-1:], **rows}


class PromptCompletionText:
    """``{"prompt": text, "completion": text}``: read as a turn of the user and one of the assistant."""

    kind: Kind = "chat"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether prompt and completion are texts."""
        return isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str) and "label" not in row

    def read(self, row: Row, where: str) -> Conversation:
        """Read two turns."""
        answer = text_of(row, "completion", where)
        if not answer:
            raise DataError(f"{where}: completion is empty; there is nothing to learn. Remove the row.")
        turns = (Message("user", text_of(row, "prompt", where)), Message("assistant", answer))
        return Conversation(turns, extra=rest_of(row, "prompt", "completion"))

    def write(self, conversation: Conversation) -> Row:
        """Write two turns that are text alone."""
        asked, answer = plain_pair(conversation, "completion-text")
        return {"prompt": asked, "completion": answer}


def plain_pair(conversation: Conversation, format_name: str) -> tuple[str, str]:
    """Return the texts of a conversation of one question and one answer; refuse any other."""
    roles = [message.role for message in conversation.messages]
    if roles != ["user", "assistant"]:
        raise cannot_hold(format_name, "messages", f"the turns {', '.join(roles)}")
    if conversation.tools or any(message.tool_calls for message in conversation.messages):
        raise cannot_hold(format_name, "tools", "a tool or a call of one")
    asked, answer = conversation.messages
    return asked.content, answer.content
