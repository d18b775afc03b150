r"""Cut many texts into words and n-grams of words at once, each as one 64-bit number.

The texts of a batch are laid end to end as UTF-8 and all work is done by array operations over their bytes, then over
their words: no Python object is made for a word. A word is what the pattern ``\w+|[^\w\s]`` finds in the text after
`str.casefold`; `plain_words` says so in one line, and a test holds the two against each other on every script.

A word's number is a chain of mixes over its bytes, eight at a time; an n-gram's is a mix of the weighted sum of its
words' numbers. Both are the same in every run and on every machine of either byte order. Two different words of n meet
with a probability of about n**2 / 2**65.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

BATCH_CHARS = 1 << 17  # as much as stays in the cache with its numbers
_WORD = re.compile(r"\w+|[^\w\s]")
_SPACE, _LETTER, _MARK, _FOLDS = 0, 1, 2, 3
_CHUNK = 8  # bytes of a word taken at a time
_MAX_CHUNKS = 8  # a longer word goes through a digest: one endless line must not become a loop of a million steps
_LAST_FOLDING = 0x1E944  # no character above changes under str.casefold; a test looks
_SEED = 20_261_121


@dataclass(frozen=True)
class Words:
    """The words of a batch of texts, in order; those of text i are ``offsets[i]`` to ``offsets[i + 1]``."""

    hashes: Hashes  # (words,)
    offsets: Places  # (texts + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, index: int) -> Hashes:
        """Return those of one text."""
        return self.hashes[self.offsets[index] : self.offsets[index + 1]]


def plain_words(text: str) -> list[str]:
    """Return the words of a text; what `hash_words` works on, said plainly.

    >>> plain_words("Don't stop, Stra\u00dfe_1!")
    ['don', "'", 't', 'stop', ',', 'strasse_1', '!']
    """
    return _WORD.findall(text.casefold())


def word_places(text: str) -> list[tuple[int, int]]:
    """Return where each of `plain_words` begins and ends in the text itself, whose folded form may be longer.

    >>> word_places("Stra\u00dfe 1")
    [(0, 6), (7, 8)]
    """
    folded = text.casefold()
    found = [match.span() for match in _WORD.finditer(folded)]
    if len(folded) == len(text):  # folding never shortens a character, so each stands where it stood
        return found
    origin = [index for index, character in enumerate(text) for _ in character.casefold()]
    return [(origin[start], origin[stop - 1] + 1) for start, stop in found]


def mix(x: Hashes) -> Hashes:
    """The finaliser of SplitMix64: every input bit reaches every output bit. Source: Steele et al. (2014)."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hash_words(texts: Sequence[str]) -> Words:
    """Return the numbers of all words of the texts."""
    found = [_hash_batch(texts[start:stop]) for start, stop in _batches(texts)]
    if not found:
        return Words(np.empty(0, np.uint64), np.zeros(1, np.int64))
    return found[0] if len(found) == 1 else join(found)


def join(parts: Sequence[Words]) -> Words:
    """Return batches one after the other as one."""
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    return Words(np.concatenate([part.hashes for part in parts]), np.concatenate([[0], np.cumsum(counts)]))


def hash_grams(words: Words, size: int) -> Words:
    """Return the numbers of the n-grams of ``size`` words, in order; a shorter text is one n-gram of all its words."""
    hashes, offsets = words.hashes, words.offsets
    counts = np.diff(offsets)
    factors = np.random.default_rng(_SEED).integers(0, 2**64, size, dtype=np.uint64) | np.uint64(1)
    sums = hashes * factors[0]
    for place in range(1, min(size, len(hashes))):
        sums[:-place] += hashes[place:] * factors[place]
    for index in np.flatnonzero((counts > 0) & (counts < size)):  # what the sum took from the texts behind goes again
        own = hashes[offsets[index] : offsets[index + 1]]
        sums[offsets[index]] = (own * factors[: len(own)]).sum(dtype=np.uint64)
    is_start = np.ones(len(hashes), dtype=bool)
    for place in range(1, size):
        is_start[offsets[1:][counts > place] - place] = False
    num_grams = np.where(counts > 0, np.maximum(counts - size + 1, 1), 0)
    return Words(mix(sums[is_start]), np.concatenate([[0], np.cumsum(num_grams)]))


def _batches(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Ranges of texts of about BATCH_CHARS together; a longer text is a batch by itself."""
    ranges, start, size = [], 0, 0
    for index, text in enumerate(texts):
        if size and size + len(text) > BATCH_CHARS:
            ranges.append((start, index))
            start, size = index, 0
        size += len(text)
    if len(texts) > start:
        ranges.append((start, len(texts)))
    return ranges


def _hash_batch(texts: Sequence[str]) -> Words:
    # bytes.lower touches the ASCII letters only; the few others that fold are looked for below.
    encoded = [text.encode("utf-8", "surrogatepass").lower() for text in texts]
    buffer, ends = _lay_out(encoded)
    classes = _classify(buffer)
    folding = np.unique(np.searchsorted(ends, np.flatnonzero(classes == _FOLDS), side="right"))
    if len(folding):
        for index in folding:
            encoded[index] = texts[index].casefold().encode("utf-8", "surrogatepass")
        buffer, ends = _lay_out(encoded)
        classes = _classify(buffer)
    starts, stops = _segments(buffer, classes)
    offsets = np.concatenate([[0], np.searchsorted(starts, ends)])
    return Words(_hash_segments(buffer, starts, stops), offsets)


def _lay_out(encoded: list[bytes]) -> tuple[Bytes, Places]:
    """Return all bytes, a line end after each text and padding at the end, and where each text's line end stands."""
    buffer = np.frombuffer(b"\n".join([*encoded, b" " * _CHUNK]), dtype=np.uint8)
    sizes = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    return buffer, np.cumsum(sizes + 1) - 1


@cache
def _class_table() -> Bytes:
    """What each character is, by its code point."""
    table = np.full(0x110000, _MARK, dtype=np.uint8)
    characters = "".join(map(chr, range(0x110000)))
    for pattern, name in ((r"\w+", _LETTER), (r"\s+", _SPACE)):
        for found in re.finditer(pattern, characters):
            table[found.start() : found.end()] = name
    folds = [code for code in range(0x80, _LAST_FOLDING) if chr(code).casefold() != chr(code)]
    table[folds] = _FOLDS
    return table


def _classify(buffer: Bytes) -> Bytes:
    """Return for each byte what the character that it belongs to is."""
    table = _class_table()
    classes = table[:256].take(buffer)
    leads = np.flatnonzero(buffer >= 0xC0)
    if not len(leads):
        return classes
    lead = buffer[leads].astype(np.int32)
    # Nine bytes of padding stand at the end, so that the three behind a lead are always there.
    tail = [buffer[leads + place].astype(np.int32) & 0x3F for place in (1, 2, 3)]
    codes = (lead & 0x1F) << 6 | tail[0]
    is_three, is_four = lead >= 0xE0, lead >= 0xF0
    codes = np.where(is_three, (lead & 0x0F) << 12 | tail[0] << 6 | tail[1], codes)
    codes = np.where(is_four, (lead & 0x07) << 18 | tail[0] << 12 | tail[1] << 6 | tail[2], codes)
    found = table[codes]
    classes[leads] = classes[leads + 1] = found
    classes[leads[is_three] + 2] = found[is_three]
    classes[leads[is_four] + 3] = found[is_four]
    return classes


def _segments(buffer: Bytes, classes: Bytes) -> tuple[Places, Places]:
    """Return where the words begin and end: runs of letters, and each other character by itself."""
    begins = classes == _MARK
    begins[1:] |= classes[1:] != classes[:-1]
    begins[0] = True
    if (buffer >= 0x80).any():
        begins &= (buffer & 0xC0) != 0x80
    bounds = np.flatnonzero(begins)
    is_word = classes[bounds[:-1]] != _SPACE  # the last segment is the padding
    return bounds[:-1][is_word], bounds[1:][is_word]


_MASKS = np.array([(1 << 8 * n) - 1 for n in range(_CHUNK + 1)], dtype=np.uint64)


def _hash_segments(buffer: Bytes, starts: Places, stops: Places) -> Hashes:
    """Return one number for each run of bytes."""
    chunks = np.ndarray(len(buffer) - _CHUNK + 1, dtype="<u8", buffer=buffer, strides=(1,))
    sizes = stops - starts
    hashes = mix((chunks[starts] & _MASKS[np.minimum(sizes, _CHUNK)]) + sizes.astype(np.uint64))
    rest = np.flatnonzero(sizes > _CHUNK)
    for place in range(1, _MAX_CHUNKS):
        if not len(rest):
            return hashes
        masks = _MASKS[np.minimum(sizes[rest] - place * _CHUNK, _CHUNK)]
        own = hashes[rest] * np.uint64(0x9E3779B97F4A7C15)
        hashes[rest] = mix(own + (chunks[starts[rest] + place * _CHUNK] & masks))
        rest = rest[sizes[rest] > (place + 1) * _CHUNK]
    for index in rest:
        digest = hashlib.blake2b(buffer[starts[index] : stops[index]].tobytes(), digest_size=8).digest()
        hashes[index] = int.from_bytes(digest, "little")
    return hashes
