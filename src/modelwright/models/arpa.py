r"""N-gram models as ARPA text files, in and out.

    \data\
    ngram 1=4
    ngram 2=2

    \1-grams:
    -0.9    word    -0.3        log10 probability, words, log10 back-off weight (if the n-gram is a context)
    ...
    \end\

Source: the format of Doug Paul's ARPA tools as SRILM writes it (ngram-format(5)) and KenLM reads it.
Not done: binary files, gzip.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from modelwright.base.errors import DataError
from modelwright.base.files import atomic_file
from modelwright.models.ngram_smoothing import BackoffLevel

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
NEVER = -99.0  # log10 of what stands for probability 0


def write_arpa(path: Path, levels: Sequence[BackoffLevel], vocabulary: Sequence[str]) -> None:
    """Write a model of words whose boundary is the symbol past the vocabulary."""
    for word in vocabulary:
        if not word or word.split() != [word]:
            raise DataError(f"The word {word!r} is empty or holds white space, which ARPA cannot. Replace it first.")
    width = len(vocabulary) + 1
    names = np.array([*vocabulary, BOS], dtype=object)
    with atomic_file(path) as handle:
        handle.write("\\data\\\n")
        for k, level in enumerate(levels, start=1):
            handle.write(f"ngram {k}={len(level.keys)}\n")
        words = names
        for k, level in enumerate(levels, start=1):
            if k > 1:
                words = words[level.keys // width] + " " + names[level.keys % width]
            probs = _log10(level.probs)
            if k == 1:
                probs[width - 1] = NEVER
            handle.write(f"\n\\{k}-grams:\n")
            if k == len(levels):
                handle.writelines(f"{p:.12g}\t{w}\n" for p, w in zip(probs, words, strict=True))
            else:
                weights = _log10(levels[k].weights[:-1])
                handle.writelines(f"{p:.12g}\t{w}\t{b:.12g}\n" for p, w, b in zip(probs, words, weights, strict=True))
        handle.write("\n\\end\\\n")


def _log10(values: np.ndarray) -> np.ndarray:
    return np.log10(values, out=np.full(len(values), NEVER), where=values > 0)


def read_arpa(path: Path) -> tuple[list[BackoffLevel], list[str]]:
    """Return the levels of a file and its vocabulary, without the boundary that opens a sentence.

    Raises:
        DataError: The file is not there, or not what its header says; the message names the line.
    """
    try:
        with open(path, encoding="utf-8") as handle:
            lines = _Lines(path, handle)
            counts = _read_header(lines)
            levels: list[BackoffLevel] = []
            vocabulary: list[str] = []
            places: dict[str, int] = {}  # the n-grams of the order below
            ids: dict[str, int] = {}
            for k, count in enumerate(counts, start=1):
                lines.expect(f"\\{k}-grams:")
                rows = [_read_row(lines, k, k == len(counts)) for _ in range(count)]
                if k == 1:
                    vocabulary, rows = _vocabulary(lines, rows)
                    ids = {word: i for i, word in enumerate([*vocabulary, BOS])}
                level, places = _make_level(lines, rows, places, ids)
                levels.append(level)
            lines.expect("\\end\\")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Give the path of an ARPA file.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}. Give an ARPA text file, unpacked.") from error
    # A row's back-off weight belongs to it as a context, which is where the next order looks for it.
    shifted = [np.ones(2)] + [level.weights for level in levels[:-1]]
    return [BackoffLevel(level.keys, level.probs, w) for level, w in zip(levels, shifted, strict=True)], vocabulary


Row = tuple[float, list[str], float]


class _Lines:
    """The lines of a file that are not blank, with their numbers."""

    def __init__(self, path: Path, handle: Iterator[str]):
        self.path, self.handle, self.number = path, handle, 0
        self.held = ""  # a line that was read and is still to be given out

    def next(self) -> str:
        if self.held:
            line, self.held = self.held, ""
            return line
        for line in self.handle:
            self.number += 1
            if line.strip():
                return line.strip("\n")
        self.fail("the file ends too early", "It may be cut short; make or fetch it again.")

    def expect(self, wanted: str) -> None:
        found = self.next().strip()
        if found != wanted:
            self.fail(f"expected {wanted!r}, found {found[:60]!r}", "The counts in the header may be wrong.")

    def fail(self, what: str, advice: str) -> NoReturn:
        raise DataError(f"{self.path}, line {self.number}: {what}. {advice}")


def _read_header(lines: _Lines) -> list[int]:
    while lines.next().strip() != "\\data\\":  # whatever stands before it is a comment
        pass
    counts: list[int] = []
    while (line := lines.next().strip()) != "\\1-grams:":
        name, _, count = line.removeprefix("ngram ").partition("=")
        if name.strip() != str(len(counts) + 1) or not count.strip().isdigit():
            lines.fail(f"expected 'ngram {len(counts) + 1}=COUNT', found {line[:60]!r}", "Mend the header.")
        counts.append(int(count))
    if not counts:
        lines.fail("the header names no n-grams", "Give a whole ARPA file.")
    lines.held = line
    return counts


def _read_row(lines: _Lines, k: int, is_last: bool) -> Row:
    parts = lines.next().split()
    try:
        if len(parts) not in (k + 1, k + 2):
            raise ValueError
        prob = float(parts[0])
        weight = float(parts[k + 1]) if len(parts) == k + 2 else 0.0
        if not prob <= 0 or not math.isfinite(prob) or not math.isfinite(weight):
            raise ValueError
    except ValueError:
        lines.fail(
            f"expected a log10 probability, {k} words{'' if is_last else ' and a back-off weight'}, "
            f"found {' '.join(parts)[:80]!r}",
            "Mend the line or the counts in the header.",
        )
    return prob, parts[1 : k + 1], weight


def _vocabulary(lines: _Lines, rows: list[Row]) -> tuple[list[str], list[Row]]:
    """Return the words in the file's order, and their rows with the boundary moved to the end."""
    found = {row[1][0]: row for row in rows}
    if len(found) < len(rows):
        lines.fail("a word stands twice among the 1-grams", "Keep one of the two.")
    if EOS not in found:
        lines.fail(f"the 1-grams lack {EOS!r}", "A model of sentences needs their end.")
    boundary = found.pop(BOS, (NEVER, [BOS], 0.0))
    found.setdefault(UNK, (NEVER, [UNK], 0.0))
    return list(found), [*found.values(), boundary]


def _make_level(
    lines: _Lines, rows: list[Row], places: dict[str, int], ids: dict[str, int]
) -> tuple[BackoffLevel, dict[str, int]]:
    width = len(ids)
    keys = np.zeros(len(rows), np.int64)
    for i, (_, words, _) in enumerate(rows):
        try:
            context = places[" ".join(words[:-1])] if len(words) > 1 else 0
            keys[i] = context * width + ids[words[-1]]
        except KeyError as error:
            lines.fail(
                f"the {len(words)}-gram {' '.join(words)!r} above uses {error.args[0]!r}, which is not in the file",
                "Every n-gram needs its beginning among the shorter ones.",
            )
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    if (keys[1:] == keys[:-1]).any():
        lines.fail(f"a {len(rows[0][1])}-gram above stands twice", "Keep one of the two.")
    probs = 10.0 ** np.array([row[0] for row in rows])[order]
    weights = 10.0 ** np.array([row[2] for row in rows])[order]
    names = {" ".join(rows[j][1]): i for i, j in enumerate(order)}
    return BackoffLevel(keys, probs, np.append(weights, 1.0)), names
