"""Near-copies are found at the rate the theory says, nothing else is lost, and the first in order stays."""

import random
import time

import numpy as np

from modelwright.data.dedup import (
    Shingler,
    drop_repeated_paragraphs,
    exact_duplicates,
    jaccard,
    minhash,
    near_duplicates,
)


def make_words(rng, count):
    return [f"w{rng.randrange(5000)}" for _ in range(count)]


def with_changes(words, rng, num_changes):
    words = list(words)
    for place in rng.sample(range(len(words)), num_changes):
        words[place] = f"new{rng.randrange(10**9)}"
    return words


def plain_jaccard(a, b):
    grams = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a, b)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_exact_copies_apart_from_blanks_and_case():
    found = exact_duplicates(["One  two.", "three", "one two.\n", "One two!", "THREE"])
    assert [(d.index, d.of) for d in found] == [(2, 0), (4, 1)]


def test_the_similarity_is_the_jaccard_of_word_five_grams():
    rng = random.Random(1)
    shingler = Shingler()
    for num_changes in (0, 3, 20, 150):
        first = make_words(rng, 400)
        second = with_changes(first, rng, num_changes)
        measured = jaccard(shingler(" ".join(first)), shingler(" ".join(second)))
        assert abs(measured - plain_jaccard(first, second)) < 1e-12


def test_signatures_agree_as_often_as_the_sets_do():
    rng = random.Random(2)
    shingler = Shingler()
    for num_changes in (5, 20, 60):
        first = make_words(rng, 800)
        a, b = shingler(" ".join(first)), shingler(" ".join(with_changes(first, rng, num_changes)))
        agreement = np.mean(minhash(a, 2000) == minhash(b, 2000))
        assert abs(agreement - jaccard(a, b)) < 0.04  # 4 standard errors of 2,000 draws are 0.045 at worst


def test_found_pairs_are_exactly_those_above_the_threshold():
    rng = random.Random(3)
    texts, expected = [], []
    for _ in range(150):
        base = make_words(rng, 200)
        changed = with_changes(base, rng, rng.choice([0, 1, 2, 3, 5, 8, 20]))
        texts += [" ".join(base), " ".join(changed)]
        expected += [False, plain_jaccard(base, changed) >= 0.8]
    found = [duplicate is not None for duplicate in near_duplicates(texts)]
    assert sum(expected) > 30
    assert sum(f != e for f, e in zip(found, expected, strict=True)) == 0  # each pair is missed once in 10,000


def test_the_first_stays_and_only_kept_texts_count():
    rng = random.Random(4)
    first = make_words(rng, 300)
    chain = [first]
    for _ in range(3):  # each is a near-copy of the one before, the last not of the first
        chain.append(with_changes(chain[-1], rng, 5))
    texts = [" ".join(words) for words in chain]
    verdicts = list(near_duplicates(texts, threshold=0.8))
    assert verdicts[0] is None and verdicts[1] is not None and verdicts[1].of == 0
    removed = {v.index for v in verdicts if v}
    assert all(v.of not in removed for v in verdicts if v)
    assert all(plain_jaccard(chain[v.index], chain[v.of]) >= 0.8 for v in verdicts if v)


def test_short_and_empty_texts():
    verdicts = list(near_duplicates(["", "", "two words", "two words", "two other"]))
    assert [v and v.of for v in verdicts] == [None, None, None, 2, None]


def test_a_thousand_copies_are_quick():
    text = " ".join(make_words(random.Random(5), 200))
    begun = time.perf_counter()
    assert sum(v is not None for v in near_duplicates([text] * 1000)) == 999
    assert time.perf_counter() - begun < 10


def test_repeated_paragraphs_go_and_headings_and_short_lines_stay():
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy of this text."
    heading = "# A long heading that stands in both of these documents and that names what is below it"
    texts = [f"{heading}\n\n{licence}\n\nOne.\n", f"{heading}\n\nOne.\n\n{licence.upper()}\n\nTwo.\n\n\n{licence}\n"]
    kept, repeated = drop_repeated_paragraphs(texts, 40)
    assert kept[0] == texts[0]
    assert kept[1] == f"{heading}\n\nOne.\n\nTwo.\n"
    assert [(r.index, r.of) for r in repeated] == [(1, 0), (1, 0)]
    assert drop_repeated_paragraphs([f"{licence}\n\n{licence}\n"], 40)[0] == [f"{licence}\n"]
