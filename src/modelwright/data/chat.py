"""Conversations as JSON lines in the OpenAI messages format: ``{"messages": [{"role": ..., "content": ...}, ...]}``.

One conversation a line, as fine-tuning services and libraries read and write it. Content is text, or a list of parts
that are all text; the assistant's tool calls and the tools' answers are read too. Other formats: `data.formats`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modelwright.base.errors import DataError
from modelwright.base.files import write_jsonl
from modelwright.base.types import Message
from modelwright.data.conversation import message_row, read_messages


def read_conversations(path: Path) -> Iterator[tuple[Message, ...]]:
    """Yield the conversations of a file. Keys beside ``messages``, ``role`` and ``content`` are ignored.

    Raises:
        DataError: A line is not a conversation with at least one answer; the message says which line and why.
    """
    is_empty = True
    for number, row in _rows(Path(path)):
        yield _conversation(row, f"{path}, line {number}")
        is_empty = False
    if is_empty:
        raise DataError(f"{path} holds no conversation; expected one JSON object with messages a line.")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of each line that is not blank."""
    try:
        with open(path, encoding="utf-8") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield number, _object(line, f"{path}, line {number}")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; expected a .jsonl file of conversations.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; expected a .jsonl file of conversations.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not valid UTF-8 ({error.reason}); save it as UTF-8.") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error}). Mend or remove the line.") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply to be a conversation. Mend or remove the line.") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}; expected an object with messages.")
    return row


def _conversation(row: dict[str, Any], where: str) -> tuple[Message, ...]:
    found = row.get("messages")
    if not isinstance(found, list) or not found:
        seen = f"messages is {found!r}"[:80] if "messages" in row else f"keys are {', '.join(sorted(row)) or 'none'}"
        raise DataError(f'{where}: {seen}; expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}.')
    messages = read_messages(found, where)
    if not any(message.role == "assistant" for message in messages):
        raise DataError(f"{where}: no message has the role assistant, so there is nothing to learn. Add an answer.")
    return messages


def write_conversations(path: Path, conversations: Iterable[Sequence[Message]]) -> int:
    """Write one conversation a line and return how many."""
    return write_jsonl(
        Path(path),
        ({"messages": [message_row(message) for message in messages]} for messages in conversations),
    )
