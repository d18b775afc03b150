"""Files of conversations from one format to another, with nothing lost that the target can hold.

What a row says beyond its format's plain form (other keys, an unusual spelling, a weight on a message) is kept under
the key ``layout`` and comes back when the row is written in that format again; a kept piece that no longer agrees with
the conversation is dropped. Every row that is written is read back and compared: a row that would come back different
is refused with its line and the field, and never written.

Read: JSON lines or one JSON array, plain or ``.gz``, in bounded memory. Formats: `modelwright.data.FORMATS`.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

from modelwright.base.errors import DataError
from modelwright.base.files import atomic_file
from modelwright.base.registry import lookup
from modelwright.data import FORMATS
from modelwright.data.conversation import Conversation, Row, difference
from modelwright.data.formats import ChatFormat
from modelwright.data.json_array import array_values

LAYOUT = "layout"
MAX_ITEM_CHARS = 64_000_000  # a longer line is no conversation; it is passed over without being kept in memory
_PIECE_CHARS = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Item:
    """One entry of a file: an object, or why it is none."""

    where: str
    row: Row | None
    reason: str = ""


@dataclass(frozen=True)
class SetAside:
    """An entry that was not converted, and why."""

    where: str
    reason: str
    row: Row | None


@dataclass(frozen=True)
class Conversion:
    """What became of a file."""

    source_format: str
    target_format: str
    num_read: int
    num_written: int
    set_aside: list[SetAside] = field(default_factory=list)


def find_format(name: str) -> ChatFormat:
    """Return a format by its name."""
    return cast(ChatFormat, lookup(FORMATS, name, "format")())


def detect_format(row: Mapping[str, Any], where: str = "the row") -> str:
    """Return the name of the format that a row is of; the first in the table that fits.

    >>> detect_format({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})
    'preference-text'
    """
    for name in FORMATS:
        if find_format(name).fits(row):
            return name
    seen = ", ".join(f"{key} ({type(value).__name__})" for key, value in sorted(row.items())) or "none"
    raise DataError(
        f"{where}: no format has these keys: {seen:.300}. Known: {', '.join(FORMATS)}. Name one, or mend it."
    )


def read_items(path: Path, max_item_chars: int = MAX_ITEM_CHARS) -> Iterator[Item]:
    """Yield the entries of a file of JSON lines, or of one JSON array, plain or gzip; a damaged entry has a reason.

    Raises:
        DataError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected a .json or .jsonl file."
        )
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", errors="surrogateescape") as handle:
        try:
            head = handle.read(_PIECE_CHARS)
            is_array = head.lstrip("\ufeff \t\r\n").startswith("[") and not _is_line(head)
            yield from (_array_items if is_array else _line_items)(handle, head, path, max_item_chars)
        except (OSError, EOFError, zlib.error) as error:
            yield Item(f"{path}", None, f"the rest cannot be read: {error}")


def _is_line(head: str) -> bool:
    """Whether the first line is a whole JSON array by itself with more lines below: damaged JSON lines, no array."""
    first, _, rest = head.strip().partition("\n")
    if not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _line_items(handle: IO[str], head: str, path: Path, max_chars: int) -> Iterator[Item]:
    number, kept, is_long = 1, head.lstrip("\ufeff"), False
    while True:
        *lines, kept = kept.split("\n")
        for line in lines:
            if is_long:
                yield Item(f"{path}, line {number}", None, f"longer than {max_chars:,} characters")
            elif line.strip():
                yield _item(line, f"{path}, line {number}", max_chars)
            number, is_long = number + 1, False
        if len(kept) > max_chars:
            kept, is_long = "", True
        piece = handle.read(_PIECE_CHARS)
        if not piece:
            break
        kept = "" if is_long and "\n" not in piece else kept + piece
    if is_long or kept.strip():
        yield _item("x" * (max_chars + 1) if is_long else kept, f"{path}, line {number}", max_chars)


def _item(line: str, where: str, max_chars: int) -> Item:
    if len(line) > max_chars:
        return Item(where, None, f"longer than {max_chars:,} characters")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return Item(where, None, f"not valid JSON ({error.msg} at character {error.pos + 1})")
    except RecursionError:
        return Item(where, None, "nested too deeply to be a conversation")
    return _checked(row, line, where)


def _checked(row: Any, text: str, where: str) -> Item:
    if not isinstance(row, dict):
        return Item(where, None, f"a JSON {type(row).__name__}; expected an object")
    if _SURROGATE_ESCAPE.search(text) and _SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        return Item(where, None, "holds half of a surrogate pair (\\ud800 to \\udfff), which UTF-8 cannot hold")
    wrong = next(iter(_SURROGATE.findall(text)), None)
    if wrong is not None:
        return Item(where, None, f"not valid UTF-8 (byte 0x{ord(wrong) - 0xDC00:02x}); save the file as UTF-8")
    return Item(where, row)


def _array_items(handle: IO[str], head: str, path: Path, max_chars: int) -> Iterator[Item]:
    for found in array_values(handle, head, max_chars):
        where = f"{path}, {found.where}"
        yield Item(where, None, found.reason) if found.reason else _checked(found.value, found.text, where)


def read_conversation(row: Mapping[str, Any], format_name: str, where: str = "the row") -> Conversation:
    """Read one row, and keep what its plain form would lack under the extra key ``layout``.

    Raises:
        DataError: The row is not of that format; the message names the field.
    """
    form = find_format(format_name)
    layouts = row.get(LAYOUT)
    plain = {name: value for name, value in row.items() if name != LAYOUT}
    conversation = form.read(plain, where)
    if isinstance(layouts, dict):
        conversation = replace(conversation, extra={**conversation.extra, LAYOUT: layouts})
    try:
        written = form.write(conversation)
    except DataError:  # the plain form cannot hold it, so all of the row is kept
        written = {}
    odd = _odd_pieces(plain, written, conversation.extra)
    if not odd:
        return conversation
    others = {name: value for name, value in (layouts or {}).items() if name != format_name}
    return replace(conversation, extra={**conversation.extra, LAYOUT: {**others, format_name: odd}})


def _odd_pieces(row: Row, written: Row, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a row its plain form lacks: whole fields, entries of lists by their place, names it adds."""
    odd: dict[str, Any] = {}
    for name, value in row.items():
        if name in extra or (name in written and written[name] == value):
            continue
        other = written.get(name)
        if isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
            pairs = enumerate(zip(value, other, strict=True))
            odd[name] = {"items": {str(place): a for place, (a, b) in pairs if a != b}}
        else:
            odd[name] = {"value": value}
    absent = [name for name in written if name not in row]
    return odd | ({"": absent} if absent else {})


def write_conversation(conversation: Conversation, format_name: str, *, plain: bool = False) -> Row:
    """Write one row that reads back as the same conversation.

    Args:
        conversation: What to write.
        format_name: In which format.
        plain: Write the format's own keys alone: no extra keys, no layout.

    Raises:
        DataError: The format cannot hold it; the message names the field.
    """
    form = find_format(format_name)
    if conversation.kind != form.kind:
        raise DataError(
            f"This is a {conversation.kind} example, and {format_name} holds {form.kind} examples. "
            "Choose a format of the same kind, or say how to reduce it (take='chosen' or take='both')."
        )
    row = form.write(conversation)
    layouts = conversation.extra.get(LAYOUT, {})
    if not plain:
        row = _restored(row, layouts.get(format_name, {}), form, conversation)
        extra = dict(conversation.extra)
        if isinstance(layouts, dict) and format_name in layouts:
            extra[LAYOUT] = {name: value for name, value in layouts.items() if name != format_name}
        if format_name in ("alpaca", "self-instruct"):
            extra.pop("input_at", None)  # it says where to cut, and that was done
            extra.pop("answer_key", None)
        taken = next((name for name in extra if name in form.write(conversation)), None)
        if taken is not None:
            raise DataError(
                f"{taken} is a key of the row, and of the format {format_name} too. Rename it, or write plain."
            )
        row |= {name: value for name, value in extra.items() if name != LAYOUT or value}
    field_name = difference(form.read({k: v for k, v in row.items() if k != LAYOUT}, "the row written"), conversation)
    if field_name:
        raise DataError(f"{field_name} would not come back from the format {format_name}. Convert to messages instead.")
    return row


def _restored(row: Row, odd: Mapping[str, Any], form: ChatFormat, conversation: Conversation) -> Row:
    """Put the kept pieces back one by one, each only if the row still says the same."""
    trials: list[tuple[str, str | None, Any]] = []
    for name, piece in odd.items():
        if name == "" or "value" in piece:
            trials.append((name, None, piece if name == "" else piece["value"]))
        else:
            trials += [(name, place, item) for place, item in piece["items"].items()]
    for name, place, value in trials:
        trial = dict(row)
        if name == "":
            trial = {key: kept for key, kept in row.items() if key not in value}
        elif place is None:
            trial[name] = value
        elif isinstance(row.get(name), list) and int(place) < len(row[name]):
            trial[name] = [*row[name][: int(place)], value, *row[name][int(place) + 1 :]]
        try:
            is_same = not difference(form.read(trial, "the row"), conversation)
        except DataError:
            is_same = False
        row = trial if is_same else row
    return row


def reduce_to(conversation: Conversation, format_name: str, take: str | None = None) -> list[Conversation]:
    """Return a conversation as the kinds of example that a format holds.

    Args:
        conversation: Any kind.
        format_name: Where it is to go.
        take: None refuses to lose anything: a pair becomes two labelled answers, nothing else changes. "chosen" keeps
            the better answer of a pair and drops answers labelled bad; "both" keeps every answer.
    """
    kind = find_format(format_name).kind
    if conversation.kind == kind:
        return [conversation]
    if conversation.kind == "preference" and (kind == "label" or take):
        ends = [(conversation.chosen, True), (conversation.rejected, False)]
        return [
            replace(
                conversation,
                messages=(*conversation.messages, *end),
                chosen=(),
                rejected=(),
                label=is_good if kind == "label" else None,
            )
            for end, is_good in ends
            if kind == "label" or is_good or take == "both"
        ]
    if conversation.kind == "label" and kind == "chat" and take:
        return [replace(conversation, label=None)] if conversation.label or take == "both" else []
    return [conversation]  # `write_conversation` says what is wrong


def convert_file(
    source: Path,
    target: Path,
    to: str,
    *,
    source_format: str | None = None,
    take: str | None = None,
    plain: bool = False,
    strict: bool = False,
) -> Conversion:
    """Convert a file; an entry that cannot be converted is set aside with its place and reason.

    Args:
        source: JSON lines or a JSON array, plain or gzip.
        target: ``.jsonl``, or ``.json`` for one array; either with ``.gz``.
        to: Name of the format to write.
        source_format: Name of the format to read; None: told from the first entry.
        take: What to keep of pairs and labels that the target cannot hold; see `reduce_to`.
        plain: Write the target's own keys alone.
        strict: Stop at the first entry that cannot be converted.

    Raises:
        DataError: Nothing could be converted, or, when strict, an entry could not.
    """
    find_format(to)
    if take not in (None, "chosen", "both"):
        raise DataError(f"take is {take!r}; known: chosen, both. None refuses to lose anything.")
    run = _Run(source_format, to, take, plain, strict)
    written = run.rows(source)
    first = next(written, None)
    if first is None:
        why = f" The first was refused: {run.aside[0].where}: {run.aside[0].reason}" if run.aside else ""
        raise DataError(f"{source} gave no conversation in the format {to}: {run.num_read} entries read.{why}")
    num_written = _write_rows(Path(target), first, written)
    return Conversion(run.source_format or "", to, run.num_read, num_written, run.aside)


class _Run:
    """Reads, converts and counts."""

    def __init__(self, source_format: str | None, to: str, take: str | None, plain: bool, strict: bool):
        self.source_format, self._to, self._take = source_format, to, take
        self._plain, self._strict = plain, strict
        self.num_read = 0
        self.aside: list[SetAside] = []

    def rows(self, source: Path) -> Iterator[Row]:
        for item in read_items(source):
            self.num_read += 1
            try:
                yield from self._convert(item)
            except DataError as error:
                reason = str(error).removeprefix(f"{item.where}: ").removeprefix(f"{item.where}, ")
                if self._strict:
                    raise DataError(f"{item.where}: {reason}") from None
                self.aside.append(SetAside(item.where, reason, item.row))

    def _convert(self, item: Item) -> list[Row]:
        if item.row is None:
            raise DataError(f"{item.reason}. Mend or remove it.")
        if self.source_format is None:
            self.source_format = detect_format(item.row, item.where)
        conversation = read_conversation(item.row, self.source_format, item.where)
        parts = reduce_to(conversation, self._to, self._take)
        return [write_conversation(part, self._to, plain=self._plain) for part in parts]


def _write_rows(target: Path, first: Row, rest: Iterator[Row]) -> int:
    """Write JSON lines, or one array when the name says .json; return how many."""
    is_packed = target.suffix == ".gz"
    is_array = (target.with_suffix("") if is_packed else target).suffix == ".json"
    count = 0
    with atomic_file(target, "wb") as raw:
        # No time and no name inside, so that the same rows give the same bytes.
        handle: Any = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if is_packed else raw
        for count, row in enumerate(_chain(first, rest), start=1):
            text = json.dumps(row, ensure_ascii=False)
            before = ("[\n" if count == 1 else ",\n") if is_array else ""
            handle.write(f"{before}{text}{'' if is_array else chr(10)}".encode())
        handle.write(b"\n]\n" if is_array else b"")
        if is_packed:
            handle.close()
    return count


def _chain(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest


def summarize(aside: Sequence[SetAside], num: int = 5) -> list[str]:
    """Return the first entries set aside, one line each, and how many more there are."""
    lines = [f"{entry.where}: {entry.reason}" for entry in aside[:num]]
    if len(aside) > num:
        kinds = Counter(entry.reason.split(";")[0] for entry in aside[num:])
        lines.append(f"and {len(aside) - num} more, most often: {kinds.most_common(1)[0][0]}")
    return lines
