"""What fine-tuning learns from: files of conversations, or of rows that a pattern turns into one, as rows of tokens.

A file may hold messages, Alpaca, ShareGPT or any other chat format of `modelwright.data.FORMATS`; rows of another kind
(a task and its code, a customer's question and its answer) are read through `PairConfig`. A data set is a folder with
``train.jsonl`` and ``validation.jsonl``, or one file, of which every twentieth example is held out.

With a curriculum the examples are ranked by their length in tokens, packed in parts of like length, and the rows come
in the order that `modelwright.data.curriculum` gives.

Source: the Alpaca prompt, Taori et al. 2023 (stanford_alpaca). Not done: training on the user's turns, tables (CSV).
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.progress import console
from modelwright.base.types import Message
from modelwright.data.conversation import Conversation
from modelwright.data.convert import Item, detect_format, find_format, read_conversation, read_items
from modelwright.data.curriculum import CurriculumConfig, order_by
from modelwright.data.load import RowLoader, repeat_rows
from modelwright.data.pack import Rows, pack_rows
from modelwright.tokenizer.bpe import Tokenizer

# An input stands in the instruction behind a blank line.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n\\n' if not loop.last else '' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {"chat": None, "alpaca": ALPACA}  # chat: the tokenizer's own
HELD_OUT_EVERY = 20
MAX_REFUSED = 0.05  # of the rows; more than that is no accident
NUM_PARTS = 20  # of like length, in a curriculum: rows are ranked in so many steps

Examples = list[tuple[Sequence[int], Sequence[bool]]]  # token ids, and which of them are learned


@dataclass(frozen=True)
class PairConfig:
    """How a row becomes a question and an answer: texts with the names of its fields, ``{instruction}``, in them."""

    prompt: str
    completion: str
    system: str = ""  # "": no system message

    def __post_init__(self) -> None:
        for name in ("prompt", "completion", "system"):
            _names_in(getattr(self, name), f"pairs.{name}")
        if not _names_in(self.completion, "pairs.completion"):
            raise ConfigError(
                f"pairs.completion is {self.completion!r}: it names no field, so all rows would have one answer. Write "
                "the field of the answer in braces."
            )

    def read(self, row: Mapping[str, Any], where: str) -> Conversation:
        """Return the conversation of a row.

        Raises:
            DataError: A field is missing, or the answer is empty.
        """
        texts = {name: _fill(getattr(self, name), row, where) for name in ("system", "prompt", "completion")}
        if not texts["completion"]:
            raise DataError(f"{where}: the answer ({self.completion}) is empty; there is nothing to learn. Remove it.")
        system = [Message("system", texts["system"])] if texts["system"] else []
        return Conversation((*system, Message("user", texts["prompt"]), Message("assistant", texts["completion"])))


def _names_in(pattern: str, where: str) -> list[str]:
    try:
        found = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise ConfigError(f"{where} is {pattern!r}: {error}. Write fields as {{name}}, and a brace twice.") from None
    wrong = [name for name in found if not name or any(c in name for c in ".[]!:")]
    if wrong:
        raise ConfigError(f"{where} is {pattern!r}; {{{wrong[0]}}} is no field. Write the plain name of one in braces.")
    return found


def _fill(pattern: str, row: Mapping[str, Any], where: str) -> str:
    made = []
    for text, name, _, _ in string.Formatter().parse(pattern):
        made.append(text)
        if name is None:
            continue
        if name not in row:
            raise DataError(
                f"{where} has no field {name!r}; it has {', '.join(sorted(row)) or 'none'}. Mend the pattern."
            )
        value = row[name]
        lines = value if isinstance(value, list) else ["" if value is None else value]
        made.append("\n".join(map(str, lines)))
    return "".join(made).strip()


def with_template(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """Return the tokenizer with the named template; ``chat`` is its own."""
    template = TEMPLATES[name]
    return tokenizer if template is None else tokenizer.with_chat_template(template)


def check_template(name: str) -> None:
    """Refuse a template that does not exist.

    Raises:
        ConfigError: With those that do.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"template is {name!r}; known: {', '.join(TEMPLATES)}.")


def read_chats(source: Path | Sequence[Mapping[str, Any]], pairs: PairConfig | None = None) -> list[Conversation]:
    """Return the conversations of a file of JSON lines or one JSON array, or of rows.

    Rows that cannot be learned from (published sets hold a few empty answers) are left out, and that is said; beyond
    one in twenty they are taken for a mistake.

    Raises:
        DataError: There is no row, too many cannot be read, or the file holds preferences.
    """
    if isinstance(source, (str, Path)):
        items = list(read_items(Path(source)))
    else:
        items = [Item(f"row {i + 1}", dict(row)) for i, row in enumerate(source)]
    if not items:
        raise DataError("The data set has no row. Give rows of conversations or instructions.")
    read = _reader(items, pairs)
    chats, refused = [], []
    for item in items:
        try:
            chats.append(read(_whole(item), item.where))
        except DataError as error:
            refused.append(str(error))
    if len(refused) > MAX_REFUSED * len(items):
        raise DataError(refused[0])
    if refused:
        console.print(f"  {len(refused)} of {len(items)} rows are left out; the first: {escape(refused[0])}")
    return chats


def _reader(items: Sequence[Item], pairs: PairConfig | None) -> Callable[[Mapping[str, Any], str], Conversation]:
    if pairs is not None:
        return pairs.read
    first = next((item for item in items if item.row is not None), items[0])
    kind = detect_format(_whole(first), first.where)
    if find_format(kind).kind != "chat":
        raise DataError(
            f"{first.where} is of the format {kind}: preferences, no conversations. Take the good answers alone: "
            "mw convert-chat IN OUT --to messages --take chosen."
        )
    return lambda row, where: read_conversation(row, kind, where)


def _whole(item: Item) -> Mapping[str, Any]:
    if item.row is None:
        raise DataError(f"{item.where}: {item.reason}. Mend or remove it.")
    return item.row


def read_parts(data: Path, pairs: PairConfig | None = None) -> tuple[list[Conversation], list[Conversation]]:
    """Return what is trained on and what is held out, of a folder or of one file.

    Raises:
        DataError: Those of `read_chats`; or one file with a single example.
    """
    if data.is_dir():
        return read_chats(data / "train.jsonl", pairs), read_chats(data / "validation.jsonl", pairs)
    every = read_chats(data, pairs)
    if len(every) < 2:
        raise DataError(f"{data} holds one example; at least two are needed, as one is held out. Give more.")
    step = min(HELD_OUT_EVERY, len(every))
    held_out = every[step - 1 :: step]
    return [chat for i, chat in enumerate(every) if i % step != step - 1], held_out


def chat_examples(chats: Sequence[Conversation], tokenizer: Tokenizer) -> Examples:
    """Return each conversation's tokens, and which of them the assistant must produce."""
    examples: Examples = []
    for chat in chats:
        tokens = tokenizer.chat_tokens(chat.messages, tools=chat.tools)
        examples.append((tokens.ids, tokens.assistant_mask))
    return examples


@dataclass(frozen=True)
class ChatRows:
    """Packed rows, and with a curriculum how hard each of them is."""

    rows: Rows
    difficulties: np.ndarray | None = None  # (rows,)

    def loader(self, batch_size: int, seed: int, curriculum: CurriculumConfig | None = None) -> RowLoader:
        """Return batches in a random order of each epoch, or in the curriculum's."""
        if curriculum is None or self.difficulties is None:
            return RowLoader(repeat_rows(self.rows, seed), batch_size)
        order = order_by(self.difficulties, curriculum, seed)
        return RowLoader(lambda epoch: _taken(self.rows, order(epoch)), batch_size)


def pack_chats(examples: Examples, row_len: int, pad_id: int, curriculum: CurriculumConfig | None = None) -> ChatRows:
    """Lay whole conversations into rows; with a curriculum those of like length together.

    Raises:
        DataError: None fits, or none has a token to learn.
    """
    if curriculum is None:
        return ChatRows(pack_rows(examples, row_len, pad_id))
    fitting = [one for one in examples if 2 <= len(one[0]) <= row_len + 1 and any(one[1][1:])]
    if not fitting:
        return ChatRows(pack_rows(examples, row_len, pad_id))  # raises, and says why
    fitting.sort(key=lambda one: len(one[0]))
    bounds = np.array_split(np.arange(len(fitting)), min(NUM_PARTS, len(fitting)))
    parts = [pack_rows([fitting[i] for i in part], row_len, pad_id) for part in bounds]
    joined = Rows(
        np.concatenate([part.input_ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.document_ids for part in parts if part.document_ids is not None]),
        sum(part.num_examples for part in parts),
        len(examples) - len(fitting),
    )
    return ChatRows(joined, np.repeat(np.arange(len(parts), dtype=np.float64), [len(part) for part in parts]))


def _taken(rows: Rows, order: np.ndarray) -> Rows:
    documents = None if rows.document_ids is None else rows.document_ids[order]
    return Rows(rows.input_ids[order], rows.labels[order], documents)
