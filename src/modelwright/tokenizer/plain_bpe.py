"""The readable twin: byte-level BPE in plain Python, learning and encoding, equal to the fast path piece by piece.

Nothing here is used in production; a test holds both to the same merges and the same ids. Ids are: the special
tokens, the 256 bytes in the order of the byte-level alphabet, then one per merge. The most frequent pair is merged
first; of equally frequent pairs the one with the lower left id, then the lower right id.

Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", algorithm 1.
Not done: speed. Learning recounts every pair after each merge.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from modelwright.tokenizer.byte_level import BYTE_TO_CHAR, unspell
from modelwright.tokenizer.special import SPECIAL_TOKENS
from modelwright.tokenizer.train import word_splitter

Pair = tuple[int, int]


def split_words(text: str) -> list[bytes]:
    """Cut a text into the parts within which merges happen.

    >>> split_words("I'm 1234")
    [b'I', b"'m", b' ', b'12', b'34']
    """
    return [unspell(piece) for piece, _ in word_splitter().pre_tokenize_str(text)]


def merge_pair(word: list[int], pair: Pair, merged: int) -> list[int]:
    """Replace each occurrence of ``pair``, from the left, by ``merged``.

    >>> merge_pair([1, 2, 1, 2, 1], (1, 2), 9)
    [9, 9, 1]
    """
    result = []
    position = 0
    while position < len(word):
        if tuple(word[position : position + 2]) == pair:
            result.append(merged)
            position += 2
        else:
            result.append(word[position])
            position += 1
    return result


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


def train_plain(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> PlainBPE:
    """Learn merges from texts that spell out no special token."""
    pieces = [token.encode("utf-8") for token in special_tokens]
    byte_ids = [0] * 256
    for byte in sorted(range(256), key=lambda b: BYTE_TO_CHAR[b]):
        byte_ids[byte] = len(pieces)
        pieces.append(bytes([byte]))
    known = {piece: index for index, piece in enumerate(pieces)}
    counts = Counter(data for text in texts for data in split_words(text))
    words = [([byte_ids[byte] for byte in data], count) for data, count in counts.items()]
    merges: dict[Pair, int] = {}
    while len(pieces) < vocab_size:
        pairs: Counter[Pair] = Counter()
        for word, count in words:
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        joined = pieces[best[0]] + pieces[best[1]]
        if joined not in known:  # two ways of joining the same bytes share one id
            known[joined] = len(pieces)
            pieces.append(joined)
        merges[best] = known[joined]
        words = [(merge_pair(word, best, known[joined]), count) for word, count in words]
    return PlainBPE(pieces, merges, byte_ids)
