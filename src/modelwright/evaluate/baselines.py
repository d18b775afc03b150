"""What a neural model must beat: n-gram models of the same training tokens, in bits per byte."""

from collections.abc import Sequence

from modelwright.base.types import Document
from modelwright.models.ngram import NgramModel
from modelwright.tokenizer.bpe import Tokenizer


def ngram_bits_per_byte(
    train: Sequence[Document], held_out: Sequence[Document], tokenizer: Tokenizer, *, order: int
) -> float:
    """Train an interpolated Kneser-Ney model and return its held-out bits per byte; order 1 is the unigram."""
    rows = tokenizer.encode_batch([document.text for document in train])
    sizes = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.eos_id}
    model = NgramModel.train(rows, order, "kneser_ney", **sizes)
    num_bytes = sum(len(document.text.encode()) for document in held_out)
    return model.bits_per_byte(tokenizer.encode_batch([document.text for document in held_out]), num_bytes)
