"""Rules of thumb for web text, each with its paper's threshold and a reason for every document it removes.

`GopherQuality`   Rae et al., "Scaling Language Models: Gopher" (2021), appendix A.1.1, "Quality filtering"
`GopherRepetition`  the same, "Repetition removal", table A1; RefinedWeb and FineWeb take it over unchanged
`C4Page`          Raffel et al., "Exploring the Limits of Transfer Learning" (JMLR 2020), section 2.2; its rules for
                  single lines are `modelwright.data.boilerplate.C4Lines`
`FineWebLines`    Penedo et al., "The FineWeb Datasets" (2024), section 3.4 (datatrove's code takes 0.01 where the paper
                  says 0.1 for characters in repeated lines; here the paper's figure stands)

A value that equals a bound of Gopher's is kept; FineWeb's bounds say "at most 0.12 goes", so there it goes. Words are
what stands between blanks, as in the papers: for scripts without blanks between words these rules do not fit. Not
done: a list of obscenities (`C4Page` takes yours; such lists also remove harmless pages about people, Dodge et al.
2021). C4's removal of repeated three-sentence spans is `modelwright.data.sentences.RepeatedSentences`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelwright.base.errors import ConfigError
from modelwright.base.types import Document

Places = npt.NDArray[np.int64]

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_BULLETS = ("\u2022", "\u2023", "\u25cf", "\u25e6", "\u25aa", "*", "-")
_ELLIPSES = ("...", "\u2026")
_TERMINAL = (".", "!", "?", '"', "\u201d", "\u3002", "\uff01", "\uff1f", "\u2026")
_LONGEST_TOP = 4  # words; of longer n-grams all repetitions count
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f]+[\"'\u201d\u2019)\]]*(?=\s|$)|[\u3002\uff01\uff1f]")


def _filled_lines(text: str) -> list[str]:
    return [line for line in (line.strip() for line in text.split("\n")) if line]


def _above(what: str, value: float, bound: float) -> str:
    return f"{what}: {value:.3f}, at most {bound}" if value > bound else ""


@dataclass(frozen=True)
class GopherQuality:
    """Gopher's rules on words and lines; the thresholds are the paper's."""

    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_chars: float = 3.0
    max_mean_word_chars: float = 10.0
    max_symbols_per_word: float = 0.1  # of "#", and of ellipses
    max_bullet_fraction: float = 0.9  # lines that begin with a bullet
    max_ellipsis_fraction: float = 0.3  # lines that end with an ellipsis
    min_alphabetic_fraction: float = 0.8  # words with at least one letter
    min_stop_words: int = 2  # how many of the stop words stand in the text, each counted once
    stop_words: tuple[str, ...] = STOP_WORDS  # English; give those of the language of the texts

    def reason(self, document: Document) -> str:
        """Say which rule the document breaks first; empty if none."""
        text, words = document.text, document.text.split()
        count = len(words)
        if count < self.min_words:
            return f"{count} words, at least {self.min_words}"
        if count > self.max_words:
            return f"{count} words, at most {self.max_words}"
        if not count:
            return ""
        mean = sum(map(len, words)) / count
        if not self.min_mean_word_chars <= mean <= self.max_mean_word_chars:
            return f"words of {mean:.2f} characters, {self.min_mean_word_chars} to {self.max_mean_word_chars}"
        num_ellipses = text.count("...") + text.count("\u2026")
        found = _above("hash signs a word", text.count("#") / count, self.max_symbols_per_word)
        found = found or _above("ellipses a word", num_ellipses / count, self.max_symbols_per_word)
        lines = _filled_lines(text)
        bullets = sum(line.startswith(_BULLETS) for line in lines) / len(lines)
        ellipses = sum(line.endswith(_ELLIPSES) for line in lines) / len(lines)
        found = found or _above("lines that begin with a bullet", bullets, self.max_bullet_fraction)
        found = found or _above("lines that end with an ellipsis", ellipses, self.max_ellipsis_fraction)
        return found or self._reason_of_words(words)

    def _reason_of_words(self, words: Sequence[str]) -> str:
        alphabetic = sum(any(map(str.isalpha, word)) for word in words) / len(words)
        if alphabetic < self.min_alphabetic_fraction:
            return f"words with a letter: {alphabetic:.3f}, at least {self.min_alphabetic_fraction}"
        wanted = set(self.stop_words)
        present = {word for word in (w.strip(".,;:!?\"'()").lower() for w in words) if word in wanted}
        if len(present) < self.min_stop_words:
            return f"{len(present)} of the stop words, at least {self.min_stop_words}"
        return ""


@dataclass(frozen=True)
class GopherRepetition:
    """Gopher's rules against texts that repeat themselves; the thresholds are those of table A1.

    The first of several equal lines, paragraphs or n-grams is not a repetition. Characters of n-grams are those of
    their words, each counted once however many n-grams overlap on it; an n-gram that stands there once is no top.
    """

    max_repeated_lines: float = 0.30
    max_repeated_line_chars: float = 0.20
    max_repeated_paragraphs: float = 0.30
    max_repeated_paragraph_chars: float = 0.20
    max_top_2grams: float = 0.20  # of all characters, those in the most frequent n-gram
    max_top_3grams: float = 0.18
    max_top_4grams: float = 0.16
    max_repeated_5grams: float = 0.15  # of all characters, those in n-grams that stood there before
    max_repeated_6grams: float = 0.14
    max_repeated_7grams: float = 0.13
    max_repeated_8grams: float = 0.12
    max_repeated_9grams: float = 0.11
    max_repeated_10grams: float = 0.10

    def reason(self, document: Document) -> str:
        """Say which rule the document breaks first; empty if none."""
        paragraphs = [p for p in (p.strip() for p in _PARAGRAPH.split(document.text)) if p]
        share, chars = _repeated(paragraphs)
        found = _above("repeated paragraphs", share, self.max_repeated_paragraphs)
        found = found or _above("characters in repeated paragraphs", chars, self.max_repeated_paragraph_chars)
        share, chars = _repeated(_filled_lines(document.text))
        found = found or _above("repeated lines", share, self.max_repeated_lines)
        found = found or _above("characters in repeated lines", chars, self.max_repeated_line_chars)
        return found or self._reason_of_ngrams(document.text.split())

    def _reason_of_ngrams(self, words: list[str]) -> str:
        numbers: dict[str, int] = {}
        ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), dtype=np.int64, count=len(words))
        sizes = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
        grams, length = ids, 1
        for size in range(2, 11):
            while length < size and len(grams) > 1:
                # A pair of numbers becomes one: exact, as each length counts its different n-grams anew.
                pairs = grams[:-1] * len(words) + ids[length:]
                grams, length = np.unique(pairs, return_inverse=True)[1], length + 1
            if length < size:
                return ""
            is_top = size <= _LONGEST_TOP
            starts = _top(grams, sizes, size) if is_top else _later(grams)
            share = sizes[_cover(starts, size, len(words))].sum() / sizes.sum()
            bound = getattr(self, f"max_{'top' if is_top else 'repeated'}_{size}grams")
            if share > bound:
                return f"characters in {'the top' if is_top else 'repeated'} {size}-gram: {share:.3f}, at most {bound}"
        return ""


def _repeated(pieces: list[str]) -> tuple[float, float]:
    """Return the shares of pieces, and of characters, that stood there before."""
    if not pieces:
        return 0.0, 0.0
    counts = Counter(pieces)
    chars = sum((count - 1) * len(piece) for piece, count in counts.items())
    return (len(pieces) - len(counts)) / len(pieces), chars / sum(map(len, pieces))


def _top(grams: Places, sizes: Places, size: int) -> Places:
    """Return where the most frequent n-gram stands; of several equally frequent ones the longest in characters."""
    counts = np.bincount(grams)
    if counts.max(initial=0) < 2:
        return np.empty(0, dtype=np.int64)
    is_most = (counts == counts.max())[grams]
    sums = np.concatenate([[0], np.cumsum(sizes)])
    chars = (sums[size:] - sums[:-size])[: len(grams)]
    place = np.flatnonzero(is_most)[np.argmax(chars[is_most])]
    return np.flatnonzero(grams == grams[place])


def _later(grams: Places) -> Places:
    """Return where n-grams stand that stood there before."""
    is_later = np.ones(len(grams), dtype=bool)
    is_later[np.unique(grams, return_index=True)[1]] = False
    return np.flatnonzero(is_later)


def _cover(starts: Places, size: int, count: int) -> npt.NDArray[np.bool_]:
    """Return which of ``count`` words lie in an n-gram that begins at one of the places."""
    edges = np.zeros(count + 1, dtype=np.int64)
    np.add.at(edges, starts, 1)
    np.add.at(edges, starts + size, -1)
    return np.cumsum(edges[:-1]) > 0


@dataclass(frozen=True)
class C4Page:
    """C4's rules on whole pages."""

    min_sentences: int = 3
    forbidden: tuple[str, ...] = ("lorem ipsum", "{")  # in any case of letters; a brace marks program text
    bad_words: tuple[str, ...] = ()  # words or phrases of yours; a page that holds one goes. None are built in
    bad_words_file: Path | None = None  # more of them, one a line; lines that begin with "#" are left out

    def reason(self, document: Document) -> str:
        """Say which rule the page breaks first; empty if none."""
        lowered = document.text.lower()
        for piece in self.forbidden:
            at = lowered.find(piece)
            if at >= 0:
                return f"holds {piece!r} at character {at}"
        count = sum(1 for _ in SENTENCE_END.finditer(document.text))
        if count < self.min_sentences:
            return f"{count} sentences, at least {self.min_sentences}"
        pattern = _bad_word_pattern(self.bad_words, self.bad_words_file)
        if pattern is not None:
            num_found = len(set(pattern.findall(lowered)))
            if num_found:
                return f"holds {num_found} of the words that are not wanted"
        return ""


@lru_cache(maxsize=8)
def _bad_word_pattern(words: tuple[str, ...], file: Path | None) -> re.Pattern[str] | None:
    """Return what finds the words where no letter or digit stands beside them; None for no words."""
    lines: list[str] = []
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"bad_words_file {file} cannot be read ({type(error).__name__}). Give a text file, a word a line."
            ) from error
    wanted = {" ".join(word.lower().split()) for word in (*words, *(x for x in lines if not x.startswith("#")))} - {""}
    if not wanted:
        return None
    longest_first = sorted(wanted, key=lambda word: (-len(word), word))
    pieces = (r"\s+".join(map(re.escape, word.split())) for word in longest_first)
    return re.compile(rf"(?<!\w)(?:{'|'.join(pieces)})(?!\w)")


@dataclass(frozen=True)
class FineWebLines:
    """FineWeb's three rules on lines."""

    max_unpunctuated: float = 0.12  # at most this share of lines ends with punctuation: goes
    max_repeated_chars: float = 0.1  # at least this share of characters stands in repeated lines: goes
    max_short_lines: float = 0.67  # at least this share of lines is short: goes
    short_line_chars: int = 30  # a shorter line is short

    def reason(self, document: Document) -> str:
        """Say which rule the document breaks first; empty if none."""
        lines = _filled_lines(document.text)
        if not lines:
            return "no line of text"
        punctuated = sum(line.endswith(_TERMINAL) for line in lines) / len(lines)
        if punctuated <= self.max_unpunctuated:
            return f"lines that end with punctuation: {punctuated:.3f}, above {self.max_unpunctuated}"
        short = sum(len(line) < self.short_line_chars for line in lines) / len(lines)
        if short >= self.max_short_lines:
            return f"lines shorter than {self.short_line_chars} characters: {short:.3f}, below {self.max_short_lines}"
        chars = _repeated(lines)[1]
        if chars >= self.max_repeated_chars:
            return f"characters in repeated lines: {chars:.3f}, below {self.max_repeated_chars}"
        return ""
