"""Compare tokenizers by how much text one token carries."""

from collections.abc import Sequence

from modelwright.base.errors import DataError
from modelwright.tokenizer.bpe import Tokenizer


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return UTF-8 bytes per token over all texts; 1.0 is what raw bytes give.

    Raises:
        DataError: The texts hold no token.
    """
    num_tokens = sum(map(len, tokenizer.encode_batch(texts, add_special_tokens=False)))
    if not num_tokens:
        raise DataError("There is no text to measure; expected at least one non-empty text.")
    return sum(len(text.encode("utf-8")) for text in texts) / num_tokens
