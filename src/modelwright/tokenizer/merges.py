"""Learn byte-pair merges from counted words: the heart of BPE and of WordPiece, readable and exact about ties.

Words come with their counts, so memory follows the number of different words and not the length of the text. Pairs are
counted once; a merge then changes the counts only around the places where it happened, and a heap gives the next one.
Heap entries may be stale, too high by what other merges took away; such an entry goes back with its true count.

Exact means: the same vocabulary and the same merges in the same order as the trainer of the library ``tokenizers``.
The most frequent pair is merged first; of equally frequent pairs the one with the lower left id, then the lower right.
Two of its habits are kept since they decide ties. A merged pair's own count is not taken back, and a pair that comes up
again (two merges can spell the same piece, so an old id can gain new neighbours) is merged and listed again.

Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", algorithm 1.
Not done: limits on the alphabet and on the length of a piece.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from modelwright.tokenizer.byte_level import cut_text

Pair = tuple[int, int]


@dataclass(frozen=True)
class Merges:
    """What was learned: the text of each id, and pair of ids -> the id of the two joined, in the order of learning."""

    pieces: list[str]
    merges: dict[Pair, int]


def count_words(texts: Iterable[str], split: Callable[[str], Iterable[str]]) -> Counter[str]:
    """Count the words of texts; ``split`` gives the words of one text.

    >>> count_words(["a b a"], str.split)
    Counter({'a': 2, 'b': 1})
    """
    counts: Counter[str] = Counter()
    for text in texts:
        for part in cut_text(text):
            counts.update(split(part))
    return counts


def merge_pair(word: list[int], pair: Pair, merged: int) -> list[int]:
    """Replace each occurrence of ``pair``, from the left, by ``merged``.

    >>> merge_pair([1, 2, 1, 2, 1], (1, 2), 9)
    [9, 9, 1]
    """
    left, right = pair
    result = []
    position, last = 0, len(word) - 1
    while position <= last:
        if word[position] == left and position < last and word[position + 1] == right:
            result.append(merged)
            position += 2
        else:
            result.append(word[position])
            position += 1
    return result


def learn_merges(
    counts: Mapping[str, int], pieces: Sequence[str], vocab_size: int, *, min_frequency: int = 0, prefix: str = ""
) -> Merges:
    """Learn merges until there are ``vocab_size`` pieces or no pair is left that is frequent enough.

    Args:
        counts: Words and how often each occurs.
        pieces: The first ids: special tokens and every character of the words; with a prefix, also the characters that
            stand inside a word, each with the prefix in front.
        vocab_size: Pieces in all.
        min_frequency: Pairs that occur less often are not merged.
        prefix: Marks a piece that does not begin a word (WordPiece: ``##``).

    >>> learn_merges({"low": 3, "lot": 2}, ["l", "o", "t", "w"], 6).pieces[4:]
    ['lo', 'low']
    """
    pieces = list(pieces)
    known = {piece: index for index, piece in enumerate(pieces)}
    words = [[known[prefix + char if at else char] for at, char in enumerate(word)] for word in counts]
    board = _Board(words, list(counts.values()))
    merges: dict[Pair, int] = {}
    while len(pieces) < vocab_size:
        found = board.next_pair(max(min_frequency, 1))
        if found is None:
            break
        pair, places = found
        joined = pieces[pair[0]] + pieces[pair[1]].removeprefix(prefix)
        if joined not in known:  # two ways of joining the same text share one id
            known[joined] = len(pieces)
            pieces.append(joined)
        merges.pop(pair, None)
        merges[pair] = known[joined]
        board.merge(pair, known[joined], places)
    return Merges(pieces, merges)


class _Board:
    """The words as they stand, the count of each pair in them, and a heap of the pairs."""

    def __init__(self, words: list[list[int]], frequencies: list[int]):
        self._words, self._frequencies = words, frequencies
        self._counts: defaultdict[Pair, int] = defaultdict(int)
        places: defaultdict[Pair, set[int]] = defaultdict(set)
        for index, word in enumerate(words):
            for pair in zip(word, word[1:], strict=False):
                self._counts[pair] += frequencies[index]
                places[pair].add(index)
        self._heap: list[tuple[int, Pair, int, set[int]]] = []
        self._num_pushed = 0
        self._push(places)

    def _push(self, places: Mapping[Pair, set[int]]) -> None:
        for pair, where in places.items():
            self._num_pushed += 1  # never two entries alike, so that the sets are never compared
            heapq.heappush(self._heap, (-self._counts[pair], pair, self._num_pushed, where))

    def next_pair(self, min_frequency: int) -> tuple[Pair, set[int]] | None:
        """Take the most frequent pair and the words it stands in; None where none is frequent enough."""
        while self._heap:
            count, pair, number, where = heapq.heappop(self._heap)
            if -count != self._counts[pair]:
                heapq.heappush(self._heap, (-self._counts[pair], pair, number, where))
            elif -count < min_frequency:
                return None
            else:
                return pair, where
        return None

    def merge(self, pair: Pair, merged: int, places: set[int]) -> None:
        """Join a pair in the words it stands in, and recount the pairs around each place."""
        counts, words = self._counts, self._words
        touched: defaultdict[Pair, set[int]] = defaultdict(set)
        for index in places:
            before = words[index]
            after = merge_pair(before, pair, merged)
            if len(after) == len(before):
                continue  # an earlier merge has taken the pair out of this word
            frequency = self._frequencies[index]
            for old, new in _changes(before, pair, merged):
                counts[old] -= frequency
                counts[new] += frequency
                touched[new].add(index)
            words[index] = after
        self._push(touched)


def _changes(word: list[int], pair: Pair, merged: int) -> Iterable[tuple[Pair, Pair]]:
    """Give each pair that a merge takes out of a word, with the pair that comes in its place."""
    left, right = pair
    position, last = 0, len(word) - 1
    before = -1  # the symbol on the left as it is by now: merged already where two merges touch
    while position <= last:
        if word[position] == left and position < last and word[position + 1] == right:
            if before >= 0:
                yield (before, left), (before, merged)
            if position + 2 <= last:
                yield (right, word[position + 2]), (merged, word[position + 2])
            before = merged
            position += 2
        else:
            before = word[position]
            position += 1
