"""One vocabulary told in another: which tokens both have, and how the rest is spelled.

Two tokens are the same if they stand for the same bytes, whatever their files call them (``Ġthe`` and ``▁the`` are
both `` the``). Special tokens are the same if they have the same text, else if they play the same part (end of text,
padding). Everything else is spelled by what the other tokenizer makes of its bytes in the middle of a text; parts of
characters, which no text can be, by the longest pieces that fit.

Not done: WordPiece, whose pieces inside words say no bytes of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelwright.base.errors import ConfigError
from modelwright.tokenizer.bpe import Tokenizer

_CARRIERS = ("\n", "", "a")  # what a text is put behind, so that it does not begin one; the last resort is nothing


@dataclass(frozen=True)
class Overlap:
    """How the tokens of a new vocabulary stand in an old one; together the three hold every new id once.

    Attributes:
        shared: New id -> old id of the same bytes or the same part.
        spelled: New id -> the old ids that spell it, two or more.
        strange: New ids that the old one cannot say: special tokens without a like, ids without a piece.
    """

    shared: Mapping[int, int]
    spelled: Mapping[int, list[int]]
    strange: Sequence[int]


def find_overlap(old: Tokenizer, new: Tokenizer) -> Overlap:
    """Return how each token of ``new`` stands in ``old``.

    Raises:
        ConfigError: One of them is WordPiece or another kind whose tokens are no bytes.
    """
    for name, one in (("old", old), ("new", new)):
        if not one.has_byte_pieces:
            raise ConfigError(
                f"The {name} tokenizer's pieces are no bytes (WordPiece?), so its tokens cannot be compared. Give "
                "byte-level BPE, or SentencePiece's BPE or Unigram."
            )
    shared = _shared_specials(old, new)
    special = set(new.special_ids.values())
    known = _ids_by_bytes(old)
    strange: list[int] = []
    waiting: dict[int, bytes] = {}
    for index in range(new.vocab_size):
        data = new.token_bytes(index)
        if index in shared:
            continue
        if index in special or not data:
            strange.append(index)
        elif data in known:
            shared[index] = known[data]
        else:
            waiting[index] = data
    spelled = dict(zip(waiting, spell_bytes(old, list(waiting.values())), strict=True))
    strange += [index for index, ids in spelled.items() if not ids]
    return Overlap(shared, {index: ids for index, ids in spelled.items() if ids}, sorted(strange))


def spell_bytes(tokenizer: Tokenizer, pieces: Sequence[bytes]) -> list[list[int]]:
    """Return the ids that spell each piece in the middle of a text; an empty list where there are none."""
    found: dict[int, list[int]] = {}
    texts = {index: text for index, piece in enumerate(pieces) if (text := _text_of(piece)) is not None}
    for carrier in _CARRIERS:
        left = [index for index in texts if index not in found]
        head = tokenizer.encode(carrier, add_special_tokens=False)
        rows = tokenizer.encode_batch([carrier + texts[index] for index in left], add_special_tokens=False)
        for index, row in zip(left, rows, strict=True):
            ids = row[len(head) :]
            if row[: len(head)] == head and b"".join(map(tokenizer.token_bytes, ids)) == pieces[index]:
                found[index] = ids
    known = _ids_by_bytes(tokenizer)
    longest = max(map(len, known), default=0)
    return [found[i] if i in found else _longest_first(piece, known, longest) for i, piece in enumerate(pieces)]


def _shared_specials(old: Tokenizer, new: Tokenizer) -> dict[int, int]:
    shared = {index: old.special_ids[text] for text, index in new.special_ids.items() if text in old.special_ids}
    for role, text in new.roles.items():
        index, other = new.special_ids.get(text), old.special_ids.get(old.roles.get(role, ""))
        if index is not None and other is not None:
            shared.setdefault(index, other)
    return shared


def _ids_by_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Return the id of each piece of text; of several that say the same the first, which merges reach."""
    special = set(tokenizer.special_ids.values())
    found: dict[bytes, int] = {}
    for index in range(tokenizer.vocab_size):
        if index not in special and (data := tokenizer.token_bytes(index)):
            found.setdefault(data, index)
    return found


def _text_of(piece: bytes) -> str | None:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _longest_first(piece: bytes, known: Mapping[bytes, int], longest: int) -> list[int]:
    ids: list[int] = []
    start = 0
    while start < len(piece):
        ends = range(min(len(piece), start + longest), start, -1)
        end = next((end for end in ends if piece[start:end] in known), None)
        if end is None:
            return []
        ids.append(known[piece[start:end]])
        start = end
    return ids
