"""The readable twin: byte-level BPE in plain Python, learning and encoding, equal to the fast path piece by piece.

Nothing here is used in production; a test holds both to the same merges and the same ids. Ids are: the special
tokens, the 256 bytes in the order of the byte-level alphabet, then one per merge. Which pair is merged next, and what
decides ties, stands in `merges`.

Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units"; Radford et al. 2019
(byte level).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers.pre_tokenizers import PreTokenizer

from modelwright.tokenizer.byte_level import BYTE_TO_CHAR, CHAR_TO_BYTE, unspell
from modelwright.tokenizer.merges import Pair, count_words, learn_merges, merge_pair
from modelwright.tokenizer.special import SPECIAL_TOKENS
from modelwright.tokenizer.train import word_splitter


def split_words(text: str) -> list[bytes]:
    """Cut a text into the parts within which merges happen.

    >>> split_words("I'm 1234")
    [b'I', b"'m", b' ', b'12', b'34']
    """
    return [unspell(piece) for piece, _ in word_splitter().pre_tokenize_str(text)]


@dataclass(frozen=True)
class PlainBPE:
    """A learned vocabulary: the bytes of each id, and the merges in the order in which they were learned."""

    pieces: list[bytes]
    merges: dict[Pair, int]  # pair of ids -> the id of the two joined
    byte_ids: list[int]  # byte -> id

    def encode(self, text: str) -> list[int]:
        """Return ids: in each word, merge the pair that was learned earliest until none is left."""
        ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        ids: list[int] = []
        for data in split_words(text):
            word = [self.byte_ids[byte] for byte in data]
            while len(word) > 1:
                pair = min(zip(word, word[1:], strict=False), key=lambda p: ranks.get(p, len(ranks)))
                if pair not in ranks:
                    break
                word = merge_pair(word, pair, self.merges[pair])
            ids += word
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


def train_plain(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    *,
    min_frequency: int = 0,
    splitter: PreTokenizer | None = None,
) -> PlainBPE:
    """Learn merges from texts that spell out no special token.

    Args:
        texts: Documents; read once.
        vocab_size: Pieces in all, special tokens and the 256 bytes included.
        special_tokens: The first ids.
        min_frequency: Pairs that occur less often are not merged.
        splitter: Cuts text into words spelled in the byte-level alphabet; else `word_splitter`.
    """
    cut = (splitter or word_splitter()).pre_tokenize_str
    counts = count_words(texts, lambda text: [word for word, _ in cut(text)])
    alphabet = sorted(CHAR_TO_BYTE)
    learned = learn_merges(counts, [*special_tokens, *alphabet], vocab_size, min_frequency=min_frequency)
    first = len(special_tokens)
    pieces = [token.encode("utf-8") for token in special_tokens]
    pieces += [bytes(CHAR_TO_BYTE[char] for char in piece) for piece in learned.pieces[first:]]
    return PlainBPE(pieces, learned.merges, [first + alphabet.index(BYTE_TO_CHAR[byte]) for byte in range(256)])
