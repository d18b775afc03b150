"""tiktoken rank files: each line a piece's bytes in base64 and its rank, which is its id.

A rank file holds no rule for cutting text into words and no special tokens; those belong to the encoding's name, so
the published ones stand in a table here, found by file name, else by the number of ranks. Merges are recovered from
the ranks: of two neighbours, those whose joint piece has the lowest rank are joined first.

Source: openai/tiktoken, tiktoken/load.py and tiktoken_ext/openai_public.py.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from modelwright.base.errors import DataError
from modelwright.base.files import atomic_file
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.byte_level import spell, unspell
from modelwright.tokenizer.gguf_vocab import GPT2, GPT4O, LLAMA3
from modelwright.tokenizer.sentencepiece import merges_by_rank
from modelwright.tokenizer.special import END_OF_TEXT

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+")
# As published, in the words of the regular-expression engine used here: $ means the end of a line there, and {1,3}+ is
# not possessive.
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++\z|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)


@dataclass(frozen=True)
class Encoding:
    """What a rank file does not say: how text is cut into words, and which special tokens there are."""

    pattern: str
    num_ranks: int
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    eos_token: str | None = END_OF_TEXT
    bos_token: str | None = None


_LLAMA3_SPECIALS = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eot_id|>": 128009,
}
ENCODINGS = {
    "r50k_base": Encoding(GPT2, 50256, {END_OF_TEXT: 50256}),
    "p50k_base": Encoding(GPT2, 50280, {END_OF_TEXT: 50256}),
    "cl100k_base": Encoding(
        _CL100K,
        100256,
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": Encoding(GPT4O, 199998, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
    "llama3": Encoding(LLAMA3, 128000, _LLAMA3_SPECIALS, "<|end_of_text|>", "<|begin_of_text|>"),
}


def is_tiktoken(head: bytes) -> bool:
    """Whether a file begins as a rank file does."""
    return _LINE.fullmatch(head.split(b"\n", 1)[0].rstrip(b"\r")) is not None


def read_tiktoken(path: str | Path, encoding: Encoding | None = None) -> Tokenizer:
    """Read a rank file.

    Args:
        path: The file.
        encoding: Its pattern and special tokens; None: those published under the file's name, or with as many ranks.

    Raises:
        DataError: A line is damaged, ranks or bytes are missing, or the encoding is not known.
    """
    path = Path(path)
    ranks = _read_ranks(path)
    encoding = encoding or ENCODINGS.get(path.stem) or _by_size(path, len(ranks))
    if len(ranks) < encoding.num_ranks:
        raise DataError(f"{path} holds {len(ranks):,} ranks; {encoding.num_ranks:,} were expected. Fetch it again.")
    vocab = {spell(piece): rank for piece, rank in ranks.items()}
    ranked = sorted((piece for piece in vocab if len(piece) > 1), key=vocab.__getitem__)
    merges = merges_by_rank(ranked, vocab)
    taken = set(vocab.values()) | set(encoding.special_tokens.values())
    holes = {f"<|unused_{index}|>": index for index in range(max(taken)) if index not in taken}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={**vocab, **encoding.special_tokens, **holes}, merges=merges, ignore_merges=True)
    )
    split = pre_tokenizers.Split(Regex(encoding.pattern), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in encoding.special_tokens])
    named = {"eos_token": encoding.eos_token, "bos_token": encoding.bos_token}
    return Tokenizer(backend, roles={r: t for r, t in named.items() if t is not None and t in encoding.special_tokens})


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            if not _LINE.fullmatch(line):
                raise ValueError("expected base64, a space and a whole number")
            piece, rank = line.split(b" ")
            data = base64.b64decode(piece, validate=True)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"{path}, line {number}: not a line of a tiktoken file ({error}). Fetch it again."
            ) from None
        if data in ranks or not data:
            raise DataError(f"{path}, line {number}: the piece {data!r} is empty or stands twice. Fetch it again.")
        ranks[data] = int(rank)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or len(set(ranks.values())) < len(ranks):
        what = f"the byte {missing[0]} has no rank" if missing else "two pieces share a rank"
        raise DataError(f"{path} is no complete tiktoken file: {what}. Fetch it again.")
    if max(ranks.values()) > 2 * len(ranks) + 1000:
        raise DataError(f"{path} has the rank {max(ranks.values()):,} with {len(ranks):,} pieces. Fetch it again.")
    return ranks


def _by_size(path: Path, num_ranks: int) -> Encoding:
    found = next((entry for entry in ENCODINGS.values() if entry.num_ranks == num_ranks), None)
    if found is None:
        raise DataError(
            f"{path} has {num_ranks:,} ranks and no known name ({', '.join(ENCODINGS)}), so it is not known how "
            "text is cut into words. Call read_tiktoken with an Encoding, or give a tokenizer.json."
        )
    return found


def write_tiktoken(tokenizer: Tokenizer, path: str | Path) -> Encoding:
    """Write the ranks of a byte-level tokenizer, and return what the file does not hold.

    Raises:
        DataError: It is not byte-level BPE whose pieces were numbered in the order of their merges, cut by one pattern.
    """
    file = json.loads(tokenizer.to_json())
    core, steps = file["model"], (file.get("pre_tokenizer") or {}).get("pretokenizers", [])
    types, patterns = [step["type"] for step in steps], [step.get("pattern", {}).get("Regex") for step in steps]
    special = set(tokenizer.special_ids)
    is_said = core["type"] == "BPE" and types == ["Split", "ByteLevel"] and not file.get("normalizer")
    if is_said:
        pieces = {piece: rank for piece, rank in core["vocab"].items() if piece not in special}
        made = dict.fromkeys("".join(merge) for merge in core["merges"])
        in_order = [pieces[piece] for piece in made if piece in pieces]
    if not is_said or in_order != sorted(in_order):
        raise DataError(
            f"This tokenizer ({core['type']}) is not byte-level BPE with ids in the order of its merges and one "
            "pattern, which is all that a tiktoken file can hold. Write it as tokenizer.json."
        )
    lines = [f"{base64.b64encode(unspell(piece)).decode()} {rank}\n" for piece, rank in pieces.items()]
    with atomic_file(Path(path)) as handle:
        handle.writelines(sorted(lines, key=lambda line: int(line.split(" ")[1])))
    roles = tokenizer.roles
    return Encoding(
        patterns[0], len(pieces), dict(tokenizer.special_ids), roles.get("eos_token"), roles.get("bos_token")
    )
