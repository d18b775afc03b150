"""Each rule keeps what lies at its bound, removes what lies just beyond, and says which rule it was."""

import pickle
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base.errors import ConfigError
from modelwright.base.types import Document
from modelwright.data.filters import C4Page, FineWebLines, GopherQuality, GopherRepetition


def reason(step, text):
    return step.reason(Document("x", text))


def prose(count, seed=0):
    """Different words of five letters, two stop words among them."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("abcdefghij") for _ in range(5)) for _ in range(count - 2)]
    return [*words, "the", "of"]


def joined(count, **changes):
    words = prose(count)
    for place, word in changes.items():
        words[int(place[1:])] = word
    return " ".join(words)


@pytest.mark.parametrize(
    ("kept", "gone", "why"),
    [
        (joined(50), joined(49), "49 words, at least 50"),
        (joined(1000), joined(1001), "1001 words, at most 1000"),
        ("abc " * 97 + "abcd the of", "abc " * 98 + "the of", "words of 2.99"),
        (joined(99) + " " + "#" * 10, joined(99) + " " + "#" * 11, "hash signs a word: 0.110"),
        (joined(98) + " " + "..." * 10 + " end", joined(98) + " " + "..." * 11 + " end", "ellipses a word: 0.110"),
        (
            "\n".join(["- " + joined(6)] * 9 + [joined(6)]),
            "\n".join(["- " + joined(6)] * 10),
            "begin with a bullet",
        ),
        (
            "\n".join([joined(12) + "..."] * 3 + [joined(12)] * 7),
            "\n".join([joined(12) + "..."] * 4 + [joined(12)] * 6),
            "end with an ellipsis",
        ),
        (joined(80) + " 12345" * 20, joined(79) + " 12345" * 21, "words with a letter"),
        (joined(60), " ".join(prose(60)[:-1] + ["thee"]), "1 of the stop words"),
    ],
)
def test_gopher_quality(kept, gone, why):
    step = GopherQuality(max_words=1000)
    assert reason(step, kept) == ""
    assert why in reason(step, gone)


def test_gopher_word_length_at_its_upper_bound():
    words = ["the", "of", *["abcdefghij"] * 46, "x" * 17, "y" * 18]
    assert len(words) == 50 and sum(map(len, words)) == 500
    assert reason(GopherQuality(), " ".join(words)) == ""
    assert "words of 10.02" in reason(GopherQuality(), " ".join([*words[:-1], words[-1] + "y"]))


def test_repeated_lines_and_paragraphs():
    step = GopherRepetition(max_repeated_line_chars=1, max_repeated_paragraph_chars=1, max_top_2grams=1)
    step = replace(step, max_top_3grams=1, max_top_4grams=1, **{f"max_repeated_{n}grams": 1.0 for n in range(5, 11)})
    own = [f"{word}{i}" for i, word in enumerate(prose(70))]
    at_bound = "\n".join([*own[:69], *["same"] * 31])  # 30 of 100 stood there before
    beyond = "\n".join([*own[:68], *["same"] * 32])
    assert reason(step, at_bound) == reason(step, at_bound.replace("\n", "\n\n")) == ""
    assert reason(step, beyond) == "repeated lines: 0.310, at most 0.3"
    assert reason(step, beyond.replace("\n", "\n \n")) == "repeated paragraphs: 0.310, at most 0.3"


def test_characters_in_repeated_lines_and_paragraphs():
    own = [f"{i:08}" for i in range(79)]
    at_bound = "\n".join([*own, "y" * 80, "y" * 80, "y" * 88])  # 80 of 880 are repeated
    exact = 80 / 880
    for name, text in (("line", at_bound), ("paragraph", at_bound.replace("\n", "\n\n"))):
        kept, gone = (GopherRepetition(**{f"max_repeated_{name}_chars": exact - d}) for d in (0, 1e-9))
        assert reason(kept, text) == ""
        assert f"characters in repeated {name}s: 0.091" in reason(gone, text)
    assert GopherRepetition().max_repeated_line_chars == GopherRepetition().max_repeated_paragraph_chars == 0.2


def with_gram(gram, count, num_own):
    """Words all different, of four letters, and one n-gram ``count`` times between them."""
    own = [f"{i:04}" for i in range(num_own)]
    step = max(1, num_own // count)
    words = []
    for i in range(count):
        words += own[i * step : (i + 1) * step] + gram
    return " ".join(words + own[count * step :])


@pytest.mark.parametrize(("size", "bound"), [(2, 0.20), (3, 0.18), (4, 0.16)])
def test_the_top_ngram(size, bound):
    gram = ["aaaa", "bbbb", "cccc", "dddd"][:size]
    total = 100 * size  # words; all have four letters, so shares of words are shares of characters
    count = round(bound * total / size)
    step = GopherRepetition()
    found = reason(step, with_gram(gram, count, total - count * size))
    assert f"top {size}-gram" not in found
    beyond = reason(step, with_gram(gram, count + 1, total - (count + 1) * size))
    assert f"top {size}-gram: {(count + 1) * size / total:.3f}" in beyond or (size > 2 and "top" in beyond)


@pytest.mark.parametrize(("size", "bound"), [(5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)])
def test_repeated_ngrams_are_counted_from_the_second_on_and_each_character_once(size, bound):
    total = 1000
    num_later = int(bound * total)
    own = [f"{i:04}" for i in range(total)]
    length = 2 * size  # long enough to hold several n-grams that overlap
    words = own[:]
    done, at = 0, 500
    while done < num_later:  # copies of stretches of the first half, one after the other in the second
        take = min(length, num_later - done)
        if take < size:
            break
        words[at : at + take] = own[done * 2 : done * 2 + take]
        at, done = at + take + 1, done + take
    settings_of = {f"max_repeated_{n}grams": 1.0 for n in range(5, 11)}
    exact = done / total
    kept = GopherRepetition(**{**settings_of, f"max_repeated_{size}grams": exact})
    gone = GopherRepetition(**{**settings_of, f"max_repeated_{size}grams": exact - 1e-9})
    assert reason(kept, " ".join(words)) == ""
    assert f"repeated {size}-gram: {exact:.3f}" in reason(gone, " ".join(words))
    assert getattr(GopherRepetition(), f"max_repeated_{size}grams") == bound


def test_a_text_of_one_word_over_and_over_is_covered_once():
    assert "top 2-gram: 1.000" in reason(GopherRepetition(), "ha " * 100)
    assert reason(GopherRepetition(), "one two three four five six") == ""


def test_c4_pages():
    step = C4Page(bad_words=("darn",))
    three = "This is one. Is this two? Yes!"
    assert reason(step, three) == ""
    assert reason(step, "This is one. And two!") == "2 sentences, at least 3"
    assert reason(step, "version 1.2.3 is not a sentence. Two. Three.") == ""
    assert "lorem ipsum" in reason(step, three + " Lorem Ipsum dolor.")
    assert "'{' at character" in reason(step, three + " int main() { }")
    assert "1 of the words" in reason(step, three + " Oh darn, no.") and "darn" not in reason(step, three + " darn.")
    assert reason(C4Page(), "\u4e00\u3002\u4e8c\u3002\u4e09\u3002") == ""


def test_bad_words_are_a_list_of_one_s_own(tmp_path):
    three = "This is one. Is this two? Yes!"
    file = tmp_path / "words.txt"
    file.write_text("# not these\nGosh\n\n  holy   moly \n", encoding="utf-8")
    step = C4Page(bad_words=("darn",), bad_words_file=file)
    assert reason(step, three + " Goshawks are birds that darned socks, not these.") == ""
    assert "1 of the words" in reason(step, three + " GOSH!")
    assert "1 of the words" in reason(step, three + " (Holy\nmoly)")
    assert "2 of the words" in reason(step, three + " gosh-darn gosh")
    assert "moly" not in reason(step, three + " holy moly")
    assert reason(C4Page(), three + " darn") == ""  # none are built in
    with pytest.raises(ConfigError, match=r"bad_words_file .*none.txt cannot be read"):
        reason(C4Page(bad_words_file=tmp_path / "none.txt"), three)
    many = C4Page(bad_words=tuple(f"word{i}" for i in range(400)))
    begun = time.perf_counter()
    assert "1 of the words" in reason(many, three + " wor" * 300_000 + " word399")
    assert time.perf_counter() - begun < 10


def test_fineweb_lines_at_their_bounds():
    step = FineWebLines()
    long = [f"a line of its own that is long enough, number {i}" for i in range(100)]
    assert reason(step, "\n".join([*(line + "." for line in long[:13]), *long[13:]])) == ""
    assert "0.120, above 0.12" in reason(step, "\n".join([*(line + "." for line in long[:12]), *long[12:]]))
    ended = [line + "." for line in long]
    assert reason(step, "\n".join([*ended[:34], *(f"short {i}." for i in range(66))])) == ""
    assert "0.670, below 0.67" in reason(step, "\n".join([*ended[:33], *(f"short {i}." for i in range(67))]))
    thirty = [f"{i:029}." for i in range(67)]  # exactly 30 characters are not short
    assert reason(step, "\n".join([*ended[:33], *thirty])) == ""
    same = [f"{i:029}." for i in range(90)]
    assert reason(step, "\n".join([*same, *[same[0]] * 9])) == ""
    assert "0.100, below 0.1" in reason(step, "\n".join([*same, *[same[0]] * 10]))
    assert reason(step, " \n") == "no line of text"


STEPS = [GopherQuality(), GopherRepetition(), C4Page(), FineWebLines()]


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab \n.#-\u2026\u4e2d\u0301{\x00") | st.characters(), max_size=200))
def test_any_text_gets_a_verdict_and_always_the_same(text):
    for step in STEPS:
        assert reason(step, text) == reason(pickle.loads(pickle.dumps(step)), text)


@pytest.mark.parametrize("piece", ["a", "a ", ".", "\n", "ab. ", "{", "\u4e2d\u3002", "- ...\n"])
def test_a_huge_text_takes_linear_time(piece):
    text = piece * (1_000_000 // len(piece))
    begun = time.perf_counter()
    for step in STEPS:
        reason(step, text)
    assert time.perf_counter() - begun < 8
