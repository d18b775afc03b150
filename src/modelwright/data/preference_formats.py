"""Formats that say how good an answer is: pairs of a better and a worse one, and answers with a label.

Preference pairs are TRL's ``{"prompt", "chosen", "rejected"}`` as messages or as texts, the same without a prompt (both
lists hold the whole conversation), LLaMA-Factory's ShareGPT turns with two answers, and the transcripts of hh-rlhf.
Labels are KTO's, in TRL's, LLaMA-Factory's and ShareGPT's spelling.

Source: the data set types of TRL's documentation; LLaMA-Factory, data/README.md; Bai et al. 2022 (hh-rlhf).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from modelwright.base.errors import DataError
from modelwright.base.types import Message
from modelwright.data.conversation import Conversation, Kind, Row, message_row, read_messages, read_tools
from modelwright.data.formats import (
    PromptCompletion,
    ShareGPT,
    cannot_hold,
    need_answer,
    plain_pair,
    rest_of,
    text_of,
)

_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def _rows(messages: Sequence[Message]) -> list[Row]:
    return [message_row(message) for message in messages]


def _has_both(row: Mapping[str, Any], kind: type) -> bool:
    return isinstance(row.get("chosen"), kind) and isinstance(row.get("rejected"), kind)


class Preference:
    """TRL's ``{"prompt": [messages], "chosen": [messages], "rejected": [messages]}``."""

    kind: Kind = "preference"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether all three are lists."""
        return isinstance(row.get("prompt"), list) and _has_both(row, list)

    def read(self, row: Row, where: str) -> Conversation:
        """Read the three lists."""
        prompt, chosen, rejected = (
            read_messages(row.get(name), where, name) for name in ("prompt", "chosen", "rejected")
        )
        tools, extra = read_tools(row.get("tools"), where), rest_of(row, "prompt", "chosen", "rejected", "tools")
        return Conversation(prompt, tools, chosen, rejected, extra=extra)

    def write(self, conversation: Conversation) -> Row:
        """Write the three lists."""
        parts = (conversation.messages, conversation.chosen, conversation.rejected)
        row: Row = dict(zip(("prompt", "chosen", "rejected"), map(_rows, parts), strict=True))
        return row | ({"tools": list(conversation.tools)} if conversation.tools else {})


class PreferenceText:
    """``{"prompt": text, "chosen": text, "rejected": text}``: one question, two answers."""

    kind: Kind = "preference"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether all three are texts."""
        return isinstance(row.get("prompt"), str) and _has_both(row, str)

    def read(self, row: Row, where: str) -> Conversation:
        """Read a turn of the user and two of the assistant."""
        return Conversation(
            (Message("user", text_of(row, "prompt", where)),),
            chosen=(Message("assistant", text_of(row, "chosen", where)),),
            rejected=(Message("assistant", text_of(row, "rejected", where)),),
            extra=rest_of(row, "prompt", "chosen", "rejected"),
        )

    def write(self, conversation: Conversation) -> Row:
        """Write a pair of one turn each."""
        texts = []
        for name in ("chosen", "rejected"):
            whole = Conversation((*conversation.messages, *getattr(conversation, name)), conversation.tools)
            texts.append(plain_pair(whole, "preference-text"))
        return {"prompt": texts[0][0], "chosen": texts[0][1], "rejected": texts[1][1]}


class PreferenceWhole:
    """``{"chosen": [messages], "rejected": [messages]}``, each the whole conversation; the beginning is shared."""

    kind: Kind = "preference"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether both are lists and there is no prompt."""
        return "prompt" not in row and "conversations" not in row and _has_both(row, list)

    def read(self, row: Row, where: str) -> Conversation:
        """Read both and part them where they differ."""
        chosen, rejected = (read_messages(row.get(name), where, name) for name in ("chosen", "rejected"))
        return _part(chosen, rejected, rest_of(row, "chosen", "rejected"))

    def write(self, conversation: Conversation) -> Row:
        """Write the shared turns twice."""
        if conversation.tools:
            raise cannot_hold("preference-whole", "tools", "given")
        shared = conversation.messages
        return {
            "chosen": _rows((*shared, *conversation.chosen)),
            "rejected": _rows((*shared, *conversation.rejected)),
        }


def _part(chosen: Sequence[Message], rejected: Sequence[Message], extra: Mapping[str, Any]) -> Conversation:
    """Part two conversations after their common beginning; each keeps at least its last turn."""
    num_shared = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        num_shared += 1
    return Conversation(
        tuple(chosen[:num_shared]),
        chosen=tuple(chosen[num_shared:]),
        rejected=tuple(rejected[num_shared:]),
        extra=extra,
    )


class Transcripts:
    r"""hh-rlhf's ``{"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}``."""

    kind: Kind = "preference"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether both are texts that begin with a speaker."""
        return _has_both(row, str) and "prompt" not in row and bool(_SPEAKER.match(row["chosen"]))

    def read(self, row: Row, where: str) -> Conversation:
        """Cut both texts at the speakers and part them where they differ."""
        chosen, rejected = (self._turns(text_of(row, name, where), f"{where}: {name}") for name in _BOTH)
        return _part(chosen, rejected, rest_of(row, *_BOTH))

    def _turns(self, text: str, where: str) -> list[Message]:
        pieces = _SPEAKER.split(text)
        if pieces[0] or len(pieces) < 3:
            raise DataError(f"{where} is {text!r:.60}; expected a transcript that begins with '\\n\\nHuman: '.")
        return [Message(_SPEAKERS[who], said) for who, said in zip(pieces[1::2], pieces[2::2], strict=True)]

    def write(self, conversation: Conversation) -> Row:
        """Write both transcripts."""
        if conversation.tools:
            raise cannot_hold("hh", "tools", "given")
        return {name: self._text((*conversation.messages, *getattr(conversation, name))) for name in _BOTH}

    def _text(self, messages: Sequence[Message]) -> str:
        names = {role: name for name, role in _SPEAKERS.items()}
        for place, message in enumerate(messages, start=1):
            if message.role not in names or message.tool_calls:
                raise cannot_hold("hh", f"messages[{place}].role", f"{message.role!r} or calls a tool")
        return "".join(f"\n\n{names[message.role]}: {message.content}" for message in messages)


_BOTH = ("chosen", "rejected")


class PreferenceShareGPT:
    """LLaMA-Factory's ``{"conversations": [turns], "chosen": turn, "rejected": turn}``."""

    kind: Kind = "preference"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether there are turns and two answers."""
        return isinstance(row.get("conversations"), list) and _has_both(row, dict)

    def read(self, row: Row, where: str) -> Conversation:
        """Read the turns and both answers."""
        turns = ShareGPT()
        return Conversation(
            tuple(turns.read_turns(row.get("conversations"), f"{where}, conversations")),
            read_tools(row.get("tools"), where),
            tuple(turns.read_turns([row.get("chosen")], f"{where}, chosen")),
            tuple(turns.read_turns([row.get("rejected")], f"{where}, rejected")),
            extra=rest_of(row, "conversations", "chosen", "rejected", "tools"),
        )

    def write(self, conversation: Conversation) -> Row:
        """Write pairs of one turn each."""
        for name in _BOTH:
            if len(getattr(conversation, name)) != 1:
                raise cannot_hold("preference-sharegpt", name, f"{len(getattr(conversation, name))} turns")
        turns = ShareGPT()
        row = turns.write(conversation)
        return row | {name: turns.write_turns(getattr(conversation, name))[0] for name in _BOTH}


class Kto(PromptCompletion):
    """TRL's ``{"prompt": [messages], "completion": [messages], "label": true}``."""

    kind: Kind = "label"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether prompt and completion are lists and there is a label."""
        return isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list) and "label" in row

    def read(self, row: Row, where: str) -> Conversation:
        """Read the messages and the label."""
        return _labelled(super().read(rest_of(row, "label"), where), row, "label", where)

    def write(self, conversation: Conversation) -> Row:
        """Write the messages and the label."""
        return super().write(conversation) | {"label": conversation.label}


class KtoText:
    """``{"prompt": text, "completion": text, "label": true}``."""

    kind: Kind = "label"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether prompt and completion are texts and there is a label."""
        return isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str) and "label" in row

    def read(self, row: Row, where: str) -> Conversation:
        """Read two turns and the label."""
        asked, answer = text_of(row, "prompt", where), text_of(row, "completion", where)
        turns = (Message("user", asked), Message("assistant", answer))
        extra = rest_of(row, "prompt", "completion", "label")
        return _labelled(Conversation(turns, extra=extra), row, "label", where)

    def write(self, conversation: Conversation) -> Row:
        """Write one question, one answer and the label."""
        asked, answer = plain_pair(conversation, "kto-text")
        return {"prompt": asked, "completion": answer, "label": conversation.label}


class KtoMessages:
    """LLaMA-Factory's ``{"messages": [...], "label": true}``."""

    kind: Kind = "label"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether there are messages and a label."""
        return "messages" in row and isinstance(row.get("label"), bool)

    def read(self, row: Row, where: str) -> Conversation:
        """Read the messages and the label."""
        messages = need_answer(read_messages(row.get("messages"), where), where)
        extra = rest_of(row, "messages", "tools", "label")
        conversation = Conversation(messages, read_tools(row.get("tools"), where), extra=extra)
        return _labelled(conversation, row, "label", where)

    def write(self, conversation: Conversation) -> Row:
        """Write the messages and the label."""
        row: Row = {"messages": _rows(conversation.messages), "label": conversation.label}
        return row | ({"tools": list(conversation.tools)} if conversation.tools else {})


class KtoShareGPT(ShareGPT):
    """ShareGPT turns with ``"kto_tag": true``."""

    kind: Kind = "label"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether there are turns and a tag."""
        return super().fits(row) and "kto_tag" in row

    def read(self, row: Row, where: str) -> Conversation:
        """Read the turns and the tag."""
        return _labelled(super().read(rest_of(row, "kto_tag"), where), row, "kto_tag", where)

    def write(self, conversation: Conversation) -> Row:
        """Write the turns and the tag."""
        return super().write(conversation) | {"kto_tag": conversation.label}


def _labelled(conversation: Conversation, row: Row, name: str, where: str) -> Conversation:
    label = row.get(name)
    if not isinstance(label, bool):
        raise DataError(f"{where}: {name} is {label!r:.60}; expected true or false. Mend or remove the row.")
    return Conversation(conversation.messages, conversation.tools, label=label, extra=conversation.extra)
