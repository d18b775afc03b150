"""The readable twin of Unigram: a vocabulary that explains the words best, found by starting large and pruning.

Every piece has a log-probability, a word's probability sums over all ways to cut it, and encoding takes the best cut
(Viterbi). Learning: seed with all characters and the repeated substrings, weighted by count times length; then, until
the vocabulary is small enough, two rounds of expectation-maximisation and one pruning, which keeps the pieces whose
loss would cost the most likelihood when the best other cut takes their place.

The steps and constants of the trainer of the library ``tokenizers``, and equal to it: the same pieces for every size,
scores to rounding, encoding with its ties. One habit of the library departs from the paper and is kept, since it
decides which pieces stay (`prune`). Ties: of equal cuts the earlier start wins, of equally dear pieces the one that
comes first among the seeds. Characters that lost their score share the last places, in sorted order here and in any
order there, which changes from run to run.

Source: Kudo 2018, "Subword Regularization", section 3.2; SentencePiece (seeds, digamma as a sparse prior).
Not done: sampling of cuts, speed.
Symbols: alpha[e] is the log of the summed probability of all cuts of the first e characters, beta[s] of those of the
rest from s on.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

MAX_PIECE_CHARS = 16
NUM_ROUNDS = 2  # of expectation and maximisation between two prunings
SHRINKING_FACTOR = 0.75
UNK_PENALTY = 10.0  # an unknown character costs this much more than the least likely piece
UNK_ID = 0
_MIN_EXPECTED = 0.5

Scored = tuple[str, float]
Words = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class PlainUnigram:
    """Pieces with their log-probabilities; ``unk_id`` stands for characters that no piece covers."""

    pieces: list[Scored]
    unk_id: int = UNK_ID

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: index for index, (piece, _) in enumerate(self.pieces)}

    @cached_property
    def _max_chars(self) -> int:
        return max(len(piece) for piece, _ in self.pieces)

    @cached_property
    def _unk_score(self) -> float:
        return min(score for _, score in self.pieces if not math.isnan(score)) - UNK_PENALTY

    def nodes(self, word: str) -> Iterator[tuple[int, int, int, float]]:
        """Give every piece that stands in a word: start, end, id, score; starts ascend, then ends."""
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + self._max_chars) + 1):
                index = self._ids.get(word[start:end])
                if index is not None:
                    yield start, end, index, self.pieces[index][1]
                elif end == start + 1:
                    yield start, end, self.unk_id, self._unk_score

    def best_cut(self, word: str, is_whole_allowed: bool = True) -> list[tuple[int, int, int]]:
        """Return start, end and id of each part of the most likely cut; of equal ones the earlier start wins.

        Args:
            word: What to cut.
            is_whole_allowed: Whether the word may be one piece; if not, the list is empty where it has no other cut.
        """
        best: dict[int, tuple[float, int, int]] = {0: (0.0, 0, 0)}  # end -> score, start and id of the last part
        for start, end, index, score in self.nodes(word):
            if start not in best or (not is_whole_allowed and end - start == len(word)):
                continue
            total = score + best[start][0]
            if end not in best or total > best[end][0]:
                best[end] = (total, start, index)
        parts: list[tuple[int, int, int]] = []
        end = len(word) if len(word) in best else 0
        while end > 0:
            _, start, index = best[end]
            parts.append((start, end, index))
            end = start
        return parts[::-1]

    def encode_word(self, word: str) -> list[int]:
        """Return the ids of one word; unknown characters side by side become one id.

        >>> PlainUnigram([("<unk>", 0.0), ("a", -2.0), ("b", -2.0), ("ab", -3.0)]).encode_word("abba??")
        [3, 2, 1, 0]
        """
        ids: list[int] = []
        for _, _, index in self.best_cut(word):
            if index != self.unk_id or ids[-1:] != [self.unk_id]:
                ids.append(index)
        return ids

    def add_expected(self, word: str, count: int, expected: list[float]) -> None:
        """Add to each piece how often it is expected in ``count`` such words: forward-backward over all cuts."""
        nodes = list(self.nodes(word))
        alpha = [0.0] + [-math.inf] * len(word)
        for start, end, _, score in nodes:
            alpha[end] = _log_add(alpha[end], alpha[start] + score)
        beta = [-math.inf] * len(word) + [0.0]
        for start, end, _, score in reversed(nodes):
            beta[start] = _log_add(beta[start], beta[end] + score)
        for start, end, index, score in nodes:
            expected[index] += count * math.exp(alpha[start] + score + beta[end] - alpha[-1])


def _log_add(x: float, y: float) -> float:
    low, high = (x, y) if x < y else (y, x)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def digamma(x: float) -> float:
    """Return the derivative of log gamma; for expected counts it is their log, less for small ones.

    >>> round(digamma(1.0), 6)
    -0.577216
    """
    result = 0.0
    while x < 7.0:
        result -= 1.0 / x
        x += 1.0
    x -= 0.5
    squared = 1.0 / (x * x)
    fourth = squared * squared
    result += math.log(x) + squared / 24.0 - 7.0 / 960.0 * fourth
    return result + 31.0 / 8064.0 * fourth * squared - 127.0 / 30720.0 * fourth * fourth


def seed_pieces(words: Words) -> list[Scored]:
    """Return the characters by count, then repeated substrings by occurrences times length, as log-probabilities.

    A substring counts once for each place in the different words. It is taken if what follows it differs: one that is
    always followed by the same character (or always ends a word) says no more than the longer one.
    """
    chars: Counter[str] = Counter()
    places: Counter[str] = Counter()
    followers: defaultdict[str, set[str]] = defaultdict(set)
    for word, count in words:
        for char in word:
            chars[char] += count
        for start in range(len(word) - 1):
            for end in range(start + 2, min(len(word), start + MAX_PIECE_CHARS) + 1):
                places[word[start:end]] += 1
                followers[word[start:end]].add(word[end : end + 1])
    weights = sorted(((count, char) for char, count in chars.items()), reverse=True)
    repeated = ((n * len(part), part) for part, n in places.items() if len(followers[part]) > 1)
    weights += sorted(repeated, reverse=True)
    log_sum = math.log(sum(weight for weight, _ in weights))
    return [(piece, math.log(weight) - log_sum) for weight, piece in weights]


def reestimate(model: PlainUnigram, words: Words) -> PlainUnigram:
    """Do one round of expectation-maximisation; pieces expected less than half a time are dropped."""
    expected = [0.0] * len(model.pieces)
    for word, count in words:
        model.add_expected(word, count, expected)
    pieces = zip(model.pieces, expected, strict=True)
    kept = [(piece, n) for index, ((piece, _), n) in enumerate(pieces) if index != UNK_ID and n >= _MIN_EXPECTED]
    log_sum = digamma(sum(n for _, n in kept))
    return PlainUnigram([(model.pieces[UNK_ID][0], math.nan), *((piece, digamma(n) - log_sum) for piece, n in kept)])


def prune(model: PlainUnigram, words: Words, vocab_size: int) -> PlainUnigram:
    """Keep about three quarters of the pieces: those without another cut, then those that are the dearest to lose."""
    frequency = [0.0] * len(model.pieces)
    for word, count in words:
        for _, _, index in model.best_cut(word):
            frequency[index] += count
    total, num_words = sum(frequency), sum(count for _, count in words)
    kept, losses = [model.pieces[UNK_ID]], []
    for index, (piece, score) in enumerate(model.pieces):
        if index == UNK_ID:
            continue
        is_whole = len(model.best_cut(piece)) == 1
        others = [part for _, _, part in model.best_cut(piece, is_whole_allowed=False)] if is_whole else []
        own = frequency[index]
        if not others:
            if own or is_whole:
                kept.append((piece, score))
        elif own:
            # By the paper the total grows by the parts of this one cut less one; the library takes the number of all
            # pieces in its place, which decides near ties, so it stands here too.
            log_total = math.log(total + own * (len(model.pieces) - 1))
            log_others = sum(math.log(frequency[other] + own) - log_total for other in others)
            losses.append((own / num_words * (math.log(own) - math.log(total) - log_others), index))
    size = max(vocab_size * 11 // 10, int(len(model.pieces) * SHRINKING_FACTOR))
    losses.sort(key=lambda loss: -loss[0])
    room = max(0, size - len(kept)) if len(kept) <= size else len(losses)
    return PlainUnigram(kept + [model.pieces[index] for _, index in losses[:room]])


def train_plain_unigram(
    counts: Mapping[str, int], vocab_size: int, special_tokens: Sequence[str] = (), unk_token: str = "<unk>"
) -> PlainUnigram:
    """Learn a Unigram vocabulary from counted words.

    Args:
        counts: Words and how often each occurs (`merges.count_words`).
        vocab_size: Pieces in all, special tokens, the unknown token and all characters included.
        special_tokens: The first ids.
        unk_token: Stands for unknown characters; comes first if it is not among the special tokens.
    """
    words = [(word, count) for word, count in counts.items() if word]
    model = PlainUnigram([("<UNK>", math.nan), *seed_pieces(words)])
    while True:
        size = len(model.pieces)
        for _ in range(NUM_ROUNDS):
            model = reestimate(model, words)
        if len(model.pieces) <= vocab_size * 11 // 10:
            break
        model = prune(model, words, vocab_size)
        if len(model.pieces) >= size:
            break
    first = list(special_tokens) if unk_token in special_tokens else [unk_token, *special_tokens]
    chars = {char for word, _ in words for char in word}
    found = _final_pieces(model, chars, vocab_size - len(first))
    return PlainUnigram([*((token, 0.0) for token in first), *found], first.index(unk_token))


def _final_pieces(model: PlainUnigram, chars: set[str], size: int) -> list[Scored]:
    """Return every character and, in the order of the last pruning, what else fits; the most likely first."""
    scores = dict(model.pieces[1:])
    least = min(scores.values())
    lost = sorted(char for char in chars if char not in scores)
    pieces = [(char, scores[char]) for char in sorted(chars) if char in scores]
    pieces += [(char, least + 0.0001 * place) for place, char in enumerate(lost)]
    for piece, score in model.pieces[1:]:
        if piece not in chars and len(pieces) < size:
            pieces.append((piece, score))
    return sorted(pieces, key=lambda piece: -piece[1])
