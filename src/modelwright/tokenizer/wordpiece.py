"""The readable twin of WordPiece: merges with a mark on pieces inside a word, and greedy longest-match encoding.

Learning is BPE over words whose characters carry ``##`` unless they begin the word, which is what the library
``tokenizers`` does under this name. The paper instead takes the merge that raises the likelihood of a language model
most; its trainer was never published. Encoding is the published part: in each word take the longest piece that fits,
go on behind it, and where nothing fits the whole word is unknown.

The library numbers the ``##`` characters in an order that changes from run to run, and ids decide ties; here they
stand sorted, so that the same text always gives the same vocabulary. Given the library's order the result is equal.

Source: Schuster & Nakajima 2012, "Japanese and Korean Voice Search"; Song et al. 2021, "Fast WordPiece Tokenization"
(the greedy rule).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from modelwright.tokenizer.merges import learn_merges

PREFIX = "##"
MAX_WORD_CHARS = 100  # longer words are unknown, as in BERT


@dataclass(frozen=True)
class PlainWordPiece:
    """A learned vocabulary: the text of each id, marked where it stands inside a word."""

    pieces: list[str]
    unk_token: str = "[UNK]"

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self.pieces)}

    def encode_word(self, word: str) -> list[int]:
        """Return the ids of one word: the longest piece that fits, again and again.

        >>> PlainWordPiece(["[UNK]", "un", "##able", "##a", "##ab"]).encode_word("unable")
        [1, 2]
        """
        ids: list[int] = []
        start = 0
        while start < len(word) <= MAX_WORD_CHARS:
            mark = PREFIX if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if mark + word[start:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[mark + word[start:end]])
            start = end
        return ids if start == len(word) else [self._ids[self.unk_token]]

    def encode(self, words: Sequence[str]) -> list[int]:
        """Return the ids of a text that is cut into words."""
        return [index for word in words for index in self.encode_word(word)]


def wordpiece_alphabet(counts: Mapping[str, int]) -> list[str]:
    """Return the first pieces: each character, then each that stands inside a word with its mark; both sorted.

    >>> wordpiece_alphabet({"ab": 1})
    ['a', 'b', '##b']
    """
    chars = {char for word in counts for char in word}
    inner = {char for word in counts for char in word[1:]}
    return [*sorted(chars), *(PREFIX + char for char in sorted(inner))]


def train_plain_wordpiece(
    counts: Mapping[str, int],
    vocab_size: int,
    special_tokens: Sequence[str] = ("[UNK]",),
    *,
    min_frequency: int = 0,
    alphabet: Sequence[str] | None = None,
) -> PlainWordPiece:
    """Learn a WordPiece vocabulary from counted words.

    Args:
        counts: Words and how often each occurs (`merges.count_words`).
        vocab_size: Pieces in all, special tokens and characters included.
        special_tokens: The first ids; the first that spells ``[UNK]`` or else the first stands for unknown words.
        min_frequency: Pairs that occur less often are not merged.
        alphabet: The pieces after the special tokens; else `wordpiece_alphabet`.
    """
    first = [*special_tokens, *(wordpiece_alphabet(counts) if alphabet is None else alphabet)]
    learned = learn_merges(counts, first, vocab_size, min_frequency=min_frequency, prefix=PREFIX)
    return PlainWordPiece(learned.pieces, "[UNK]" if "[UNK]" in special_tokens else special_tokens[0])
