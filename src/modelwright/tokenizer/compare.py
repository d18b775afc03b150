"""Compare tokenizers by how much text one token carries, and audit one for tokens that are of no use.

Bytes per token is what a model's context and compute buy; fertility, tokens per word between spaces, is the field's
other figure (of little meaning where a language writes no spaces).

Source: Rust et al. 2021, "How Good is Your Tokenizer?" (fertility); Land & Bartolo 2024, "Fishing for Magikarp"
(audit).
Not done: glitch tokens, which need the model's embeddings.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from modelwright.base.errors import DataError
from modelwright.tokenizer.bpe import Tokenizer

_CARRIERS = ("", "\n", "a", "1", ".", "a ")  # what a token's text is put behind to see whether it can come up


@dataclass(frozen=True)
class Share:
    """How texts are cut: ``fertility`` is tokens per word between spaces."""

    num_tokens: int
    bytes_per_token: float
    fertility: float


@dataclass(frozen=True)
class Audit:
    """Ids that deserve a look; special tokens and the byte pieces of a byte fallback are left out.

    Attributes:
        unreachable: No text that was tried gives the token: its own, alone and behind a letter, digit, stop, newline
            or space. Tokens that are no UTF-8 cannot be tried so and are not among these.
        invalid_utf8: Parts of characters.
        duplicates: Groups of ids that stand for the same bytes.
    """

    vocab_size: int
    unreachable: list[int]
    invalid_utf8: list[int]
    duplicates: list[list[int]]


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> Share:
    """Return how a tokenizer cuts texts.

    Raises:
        DataError: The texts hold no token.
    """
    num_tokens = sum(map(len, tokenizer.encode_batch(texts, add_special_tokens=False)))
    if not num_tokens:
        raise DataError("There is no text to measure; expected at least one non-empty text.")
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    num_words = sum(len(text.split()) for text in texts)
    return Share(num_tokens, num_bytes / num_tokens, num_tokens / max(num_words, 1))


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return UTF-8 bytes per token over all texts; 1.0 is what raw bytes give.

    Raises:
        DataError: The texts hold no token.
    """
    return measure(tokenizer, texts).bytes_per_token


def audit(tokenizer: Tokenizer) -> Audit:
    """Look at every token of a vocabulary."""
    aside = {*tokenizer.special_ids.values(), *_fallback_ids(tokenizer)}
    valid: dict[int, str] = {}
    invalid: list[int] = []
    same: defaultdict[bytes, list[int]] = defaultdict(list)
    for index in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(index)
        if index in aside or not data:
            continue
        same[data].append(index)
        try:
            valid[index] = data.decode("utf-8")
        except UnicodeDecodeError:
            invalid.append(index)
    unreached = list(valid)
    for carrier in _CARRIERS:
        rows = tokenizer.encode_batch([carrier + valid[index] for index in unreached], add_special_tokens=False)
        unreached = [index for index, row in zip(unreached, rows, strict=True) if index not in row]
    return Audit(tokenizer.vocab_size, unreached, invalid, [ids for ids in same.values() if len(ids) > 1])


def _fallback_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids of ``<0x00>`` to ``<0xFF>`` where a vocabulary spells its bytes so."""
    ids = {index for byte in range(256) if (index := tokenizer.token_id(f"<0x{byte:02X}>")) is not None}
    return ids if len(ids) == 256 else set()
