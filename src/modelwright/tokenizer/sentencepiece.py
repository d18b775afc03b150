"""SentencePiece vocabularies: pieces with scores, as BPE or Unigram, read from ``.model`` files and written back.

A ``.model`` is one protocol-buffer message; the few fields that decide ids are read by hand. The vocabulary becomes a
``tokenizers`` backend with the same ids: normalisation by the file's own character map, one space in front, spaces
spelled as U+2581, and BPE merges recovered from the scores (SentencePiece joins the neighbours whose joint piece
scores best). Pieces that the file marks as user-defined are cut out first, as SentencePiece does; control pieces never
come from text. GGUF and llama2.c vocabularies of this kind go through the same `PieceModel`.

Source: Kudo and Richardson 2018, arXiv 1808.06226; sentencepiece_model.proto.
Not done: whitespace as suffix, WORD and CHAR models, sampling. Departure: where text spells out a control piece of a
Unigram vocabulary, it is cut inside it.
"""

import base64
import itertools
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from modelwright.base.errors import DataError
from modelwright.base.files import atomic_file
from modelwright.tokenizer.bpe import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # piece types, in GGUF too
SPACE = "\u2581"
_KINDS: dict[int, Literal["unigram", "bpe"]] = {1: "unigram", 2: "bpe"}
_UNSAID = (UNKNOWN, CONTROL)  # pieces that no text gives
_MAX_BYTES = 1 << 29
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_ROLE_FIELDS = (("unk_token", 40, 0), ("bos_token", 41, 1), ("eos_token", 42, 2), ("pad_token", 43, (1 << 64) - 1))


@dataclass(frozen=True)
class PieceModel:
    """A vocabulary of scored pieces and the rules that belong to it."""

    kind: Literal["unigram", "bpe"]
    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    byte_fallback: bool = True  # characters without a piece become their bytes' pieces
    add_dummy_prefix: bool = True  # a space in front of every text
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""  # the compiled character map; empty: characters stay as they are
    roles: Mapping[str, int] = field(default_factory=dict)  # "bos_token": 1

    def roles_by_text(self) -> dict[str, str]:
        """Return the special tokens by role as tokenizer_config.json names them."""
        return {role: self.pieces[index] for role, index in self.roles.items()}


def is_sentencepiece(head: bytes) -> bool:
    """Whether a file begins as a SentencePiece model does: field 1, holding a piece that is field 1 again."""
    return len(head) > 3 and head[0] == 0x0A and head[2 if head[1] < 0x80 else 3] == 0x0A


def read_sentencepiece(path: Path) -> PieceModel:
    """Read a ``.model`` file.

    Raises:
        DataError: The file is damaged, or of a kind that is not computed here.
    """
    data = path.read_bytes()
    if len(data) > _MAX_BYTES:
        raise DataError(f"{path} has {len(data):,} bytes; no SentencePiece model is that large. Check the path.")
    try:
        fields = _Message(data)
        pieces = [_Message(item) for item in fields.blobs(1)]
        trainer, normalizer = _Message(fields.blob(2)), _Message(fields.blob(3))
        model = PieceModel(
            kind=_KINDS[trainer.number(3, 1)],
            pieces=[piece.blob(1).decode("utf-8") for piece in pieces],
            scores=[piece.float(2) for piece in pieces],
            types=[piece.number(3, NORMAL) for piece in pieces],
            byte_fallback=bool(trainer.number(35, 0)),
            add_dummy_prefix=bool(normalizer.number(3, 1)),
            remove_extra_whitespaces=bool(normalizer.number(4, 1)),
            charsmap=normalizer.blob(2),
            roles={
                role: index
                for role, number, usual in _ROLE_FIELDS
                if 0 <= (index := _signed(trainer.number(number, usual))) < len(pieces)
            },
        )
    except KeyError as error:
        raise DataError(f"{path} is a SentencePiece model of type {error}; read are 1 (Unigram) and 2 (BPE).") from None
    except (ValueError, struct.error) as error:
        raise DataError(f"{path} is not a SentencePiece model, or damaged: {error}. Fetch it again.") from None
    if not pieces:
        raise DataError(f"{path} is not a SentencePiece model: it holds no pieces. Check the path.")
    if trainer.number(24, 0):
        raise DataError(f"{path} treats whitespace as a suffix, which is not computed here. Train one without it.")
    return model


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


class _Message:
    """The fields of one protocol-buffer message, by number; the last of a repeated one wins, as the format says."""

    def __init__(self, data: bytes):
        self._fields: dict[int, list[Any]] = {}
        for number, value in _fields(data):
            self._fields.setdefault(number, []).append(value)

    def blobs(self, number: int) -> list[bytes]:
        found = self._fields.get(number, [])
        if not all(isinstance(value, bytes) for value in found):
            raise ValueError(f"field {number} is not text")
        return found

    def blob(self, number: int) -> bytes:
        return (self.blobs(number) or [b""])[-1]

    def number(self, number: int, usual: int) -> int:
        value = self._fields.get(number, [usual])[-1]
        if not isinstance(value, int):
            raise ValueError(f"field {number} is not a whole number")
        return value

    def float(self, number: int) -> float:
        value = self._fields.get(number, [b"\0\0\0\0"])[-1]
        return float(struct.unpack("<f", value)[0])


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value): whole numbers as int, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {at}")
        size = 4
        if wire != 5:
            size, at = (8, at) if wire == 1 else _varint(data, at)
        if size > len(data) - at:
            raise ValueError(f"field {key >> 3} is cut short at byte {at}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends inside a number")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value & ((1 << 64) - 1), at
    raise ValueError(f"a number of more than ten bytes at byte {at}")


# -- to a backend ------------------------------------------------------------------------------------------------------


def merges_by_rank(ranked: Sequence[str], known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges that make each piece, best piece first; within one, by how early its parts stand.

    >>> merges_by_rank(["ab", "abc"], {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4})
    [('a', 'b'), ('ab', 'c')]
    """
    merges = []
    for piece in ranked:
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += sorted(
            ((left, right) for left, right in pairs if left in known and right in known),
            key=lambda pair: (known[pair[0]], known[pair[1]]),
        )
    return merges


def build_tokenizer(
    model: PieceModel, name: str, *, add_bos: bool = False, add_eos: bool = False, chat_template: str | None = None
) -> Tokenizer:
    """Make a tokenizer of a vocabulary of scored pieces.

    Raises:
        DataError: A piece stands twice, or a special token that is to be added is not named. ``name`` is the file's.
    """
    backend = tokenizers.Tokenizer(_build_model(model, name))
    _set_rules(backend, model)
    kinds = zip(model.pieces, model.types, strict=True)
    specials = {piece for piece, kind in kinds if kind in _UNSAID} | set(model.roles_by_text().values())
    ordered = [piece for piece in model.pieces if piece in specials]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in ordered])
    roles = model.roles_by_text()
    wanted = ("bos_token" if add_bos else "", "eos_token" if add_eos else "")
    add_around(backend, roles, wanted, name)
    return Tokenizer(backend, roles=roles, chat_template=chat_template)


def add_around(backend: tokenizers.Tokenizer, roles: Mapping[str, str], wanted: tuple[str, str], name: str) -> None:
    """Make the backend put special tokens, given by role, in front of and behind a text; "" adds none."""
    if not any(wanted):
        return
    missing = [role for role in wanted if role and role not in roles]
    if missing:
        raise DataError(f"{name} asks for a {missing[0]} around texts but names none. Fetch the file again.")
    texts = [roles[role] for role in wanted if role]
    first, last = (roles[role] if role else "" for role in wanted)
    single = " ".join(part for part in (_quoted(first), "$A", _quoted(last)) if part)
    pair = " ".join(part for part in (_quoted(first), "$A", _quoted(last), "$B:1", _quoted(last, ":1")) if part)
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(text, backend.token_to_id(text)) for text in dict.fromkeys(texts)]
    )


def _quoted(text: str, part: str = "") -> str:
    return f"{text}{part}" if text else ""


def _build_model(model: PieceModel, name: str) -> Any:
    known: dict[str, int] = {}
    for index, piece in enumerate(model.pieces):
        if known.setdefault(piece, index) != index:
            raise DataError(f"{name} holds the piece {piece!r} twice, as {known[piece]} and {index}. Fetch it again.")
    unknown = model.roles.get("unk_token")
    if model.kind == "unigram":
        scored = list(zip(model.pieces, map(float, model.scores), strict=True))
        return models.Unigram(scored, unk_id=unknown, byte_fallback=model.byte_fallback)
    usable = {piece: known[piece] for piece, kind in zip(model.pieces, model.types, strict=True) if kind == NORMAL}
    ranked = sorted(usable, key=lambda piece: (-model.scores[known[piece]], known[piece]))
    # User-defined pieces stand alone after the split in front, where a whole word that is a piece is taken as it is.
    return models.BPE(
        vocab=known,
        merges=merges_by_rank([piece for piece in ranked if len(piece) > 1], usable),
        unk_token=None if unknown is None else model.pieces[unknown],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=USER_DEFINED in model.types,
    )


def _set_rules(backend: tokenizers.Tokenizer, model: PieceModel) -> None:
    """Set what happens to text before and after the pieces."""
    before: list[Any] = []
    if model.charsmap:
        before.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        before += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        before.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    if splits := _splits(model):
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    after = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*after, *([decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else [])])


def _splits(model: PieceModel) -> list[Any]:
    """Return the steps that keep text apart before it is cut into pieces."""
    kinds = list(zip(model.pieces, model.types, strict=True))
    own = sorted((piece for piece, kind in kinds if kind == USER_DEFINED), key=len, reverse=True)
    steps = [pre_tokenizers.Split(Regex("|".join(map(re.escape, own))), behavior="isolated")] if own else []
    # Text that spells out a control piece is cut after its first character, where the backend could find it whole.
    control = [re.escape(p[0]) + f"(?={re.escape(p[1:])})" for p, kind in kinds if kind in _UNSAID and len(p) > 1]
    control += ["<(?=0x[0-9A-F]{2}>)"] if BYTE in model.types else []
    if control and (own or model.kind == "unigram"):
        steps.append(pre_tokenizers.Split(Regex("|".join(control)), behavior="merged_with_previous"))
    return steps


# -- from a tokenizer --------------------------------------------------------------------------------------------------


def to_piece_model(tokenizer: Tokenizer) -> PieceModel:
    """Return a tokenizer's vocabulary as scored pieces, where its rules are SentencePiece's.

    Raises:
        DataError: It is byte-level BPE, WordPiece, or has steps that the format cannot say.
    """
    file = json.loads(tokenizer.to_json())
    core, kind = file["model"], file["model"]["type"]
    steps = (file.get("normalizer") or {}).get("normalizers") or []
    names = [step["type"] + str(step.get("pattern", {}).get("Regex", "")) for step in steps]
    is_plain = kind in ("BPE", "Unigram") and steps and steps[-1].get("pattern") == {"String": " "}
    front = [name for name in names[:-1] if name not in ("Precompiled", "Prepend", r"Replace\A +| +\z", "Replace {2,}")]
    cuts = (file.get("pre_tokenizer") or {}).get("pretokenizers", [file.get("pre_tokenizer")])
    if not is_plain or front or any(step is not None and step["type"] != "Split" for step in cuts):
        raise DataError(
            f"This tokenizer ({kind}) has rules that a SentencePiece model cannot say. Write it as tokenizer.json."
        )
    if kind == "Unigram":
        pieces = [piece for piece, _ in core["vocab"]]
        scores = [score for _, score in core["vocab"]]
    else:
        pieces = sorted(core["vocab"], key=core["vocab"].__getitem__)
        scores = _scores_of(pieces, core["merges"])
    patterns = [step["pattern"]["Regex"] for step in cuts if step and step["behavior"] == "Isolated"]
    own = frozenset(piece for piece in pieces if any(re.fullmatch(pattern, piece) for pattern in patterns))
    index_of = {piece: index for index, piece in enumerate(pieces)}
    if set(index_of) < set(tokenizer.special_ids):
        raise DataError("This tokenizer has special tokens outside its vocabulary. Write it as tokenizer.json.")
    unknown = tokenizer.roles.get("unk_token")
    return PieceModel(
        kind="unigram" if kind == "Unigram" else "bpe",
        pieces=pieces,
        scores=scores,
        types=[_type_of(piece, unknown, tokenizer.special_ids, own) for piece in pieces],
        byte_fallback=core["byte_fallback"],
        add_dummy_prefix="Prepend" in names,
        remove_extra_whitespaces="Replace {2,}" in names,
        charsmap=next((base64.b64decode(s["precompiled_charsmap"]) for s in steps if s["type"] == "Precompiled"), b""),
        roles={role: index_of[text] for role, text in tokenizer.roles.items() if text in index_of},
    )


def _scores_of(pieces: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Return scores under which the neighbours that a merge list joins first are those that score best."""
    joined = ["".join(merge) for merge in merges]
    ranked = list(dict.fromkeys(joined))
    # Every way of making a piece ranks alike in SentencePiece; a list that tells them apart cannot be said by scores.
    if [len(list(group)) for _, group in itertools.groupby(joined)] != _ways(ranked, merges):
        raise DataError("The merges of this tokenizer do not follow from scores. Write it as tokenizer.json.")
    scores = {piece: -float(rank) for rank, piece in enumerate(ranked)}
    return [scores.get(piece, -float(len(ranked))) for piece in pieces]


def _ways(ranked: Sequence[str], merges: Sequence[Sequence[str]]) -> list[int]:
    """Count in how many ways each piece can be made of two that take part in merges."""
    usable = {part for merge in merges for part in merge} | set(ranked)
    return [sum(p[:cut] in usable and p[cut:] in usable for cut in range(1, len(p))) for p in ranked]


def _type_of(piece: str, unknown: str | None, specials: Mapping[str, int], own: frozenset[str]) -> int:
    if piece == unknown:
        return UNKNOWN
    if piece in specials:
        return CONTROL
    return USER_DEFINED if piece in own else BYTE if _BYTE_PIECE.fullmatch(piece) else NORMAL


def write_sentencepiece(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a tokenizer as a SentencePiece ``.model`` file, which the sentencepiece library reads.

    Raises:
        DataError: Its rules are not those of SentencePiece.
    """
    model = to_piece_model(tokenizer)
    parts = []
    for piece, score, kind in zip(model.pieces, model.scores, model.types, strict=True):
        parts.append(_blob(1, _blob(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _whole(3, kind)))
    trainer = _whole(3, 1 if model.kind == "unigram" else 2) + _whole(4, len(model.pieces))
    trainer += _whole(35, int(model.byte_fallback))
    for role, number, _ in _ROLE_FIELDS:
        trainer += _whole(number, model.roles.get(role, (1 << 64) - 1))  # -1: none
        trainer += _blob(number + 5, model.pieces[model.roles[role]].encode()) if role in model.roles else b""
    rules = _blob(1, b"modelwright") + _blob(2, model.charsmap) + _whole(3, int(model.add_dummy_prefix))
    rules += _whole(4, int(model.remove_extra_whitespaces)) + _whole(5, 1)
    with atomic_file(Path(path), "wb") as handle:
        handle.write(b"".join(parts) + _blob(2, trainer) + _blob(3, rules))


def _blob(number: int, data: bytes) -> bytes:
    return _varint_bytes(number << 3 | 2) + _varint_bytes(len(data)) + data


def _whole(number: int, value: int) -> bytes:
    return _varint_bytes(number << 3) + _varint_bytes(value)


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
