"""Near-copies are found at the rate the theory says, nothing else is lost, and the first in order stays."""

import random
import time

import numpy as np
import pytest

from modelwright.base.errors import ConfigError
from modelwright.base.types import Document
from modelwright.data.dedup import (
    ExactDuplicates,
    NearDuplicates,
    RepeatedPieces,
    jaccard,
    near_duplicates,
    shingle,
)
from modelwright.data.minhash import Bands, sign_sets
from modelwright.data.shingles import Words
from modelwright.data.step import Removal, decide_all, name_uniquely, run_step


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
    documents = as_documents(["One  two.", "three", "one two.\n", "One two!", "THREE", " ", "\n"])
    assert decide_all(ExactDuplicates(), documents) == {2: "d0", 4: "d1"}  # blanks are no copies of each other


def test_the_similarity_is_the_jaccard_of_word_five_grams():
    rng = random.Random(1)
    for num_changes in (0, 3, 20, 150):
        first = make_words(rng, 400)
        second = with_changes(first, rng, num_changes)
        measured = jaccard(shingle(" ".join(first)), shingle(" ".join(second)))
        assert abs(measured - plain_jaccard(first, second)) < 1e-12


def test_signatures_agree_as_often_as_the_sets_do():
    rng = random.Random(2)
    for num_changes in (5, 20, 60):
        first = make_words(rng, 800)
        a, b = shingle(" ".join(first)), shingle(" ".join(with_changes(first, rng, num_changes)))
        signatures = sign_sets(Words(np.concatenate([a, b]), np.array([0, len(a), len(a) + len(b)])), 2000)
        agreement = np.mean(signatures[0] == signatures[1])
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


def test_texts_that_share_nothing_are_all_kept():
    assert list(near_duplicates(["one two", "three four"])) == [None, None]
    assert list(near_duplicates(["alone"])) == [None] and list(near_duplicates([])) == []


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
    step, documents = RepeatedPieces(min_chars=40), as_documents(texts)
    kept = run_step(step, documents)
    assert kept[0] == documents[0]
    assert kept[1].text == f"{heading}\n\nOne.\n\nTwo.\n"
    decisions = decide_all(step, documents)
    assert step.taken(documents[1], decisions[1]) == [(licence.upper(), "d0"), (licence, "d0")]
    assert run_step(step, as_documents([f"{licence}\n\n{licence}\n"]))[0].text == f"{licence}\n"


def run(step, documents):
    """What a pipeline does: sign each, decide, carry out."""
    decisions = step.decide((d.id, step.sign(d)) for d in documents)
    return [step.apply(d, decisions[d.id]) if d.id in decisions else d for d in documents]


def as_documents(texts):
    return [Document(f"d{index}", text) for index, text in enumerate(texts)]


def make_family(seed, count):
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        base = make_words(rng, rng.choice([8, 60, 200]))
        texts += [" ".join(base), " ".join(with_changes(base, rng, min(len(base), rng.choice([0, 1, 3, 8]))))]
    return [*texts, "", " \n", "one", "one", texts[0]]


def test_the_steps_decide_as_the_functions_do():
    texts = make_family(6, 60)
    expected = [v and (f"d{v.of}", v.similarity) for v in near_duplicates(texts)]
    documents = as_documents(texts)
    step = NearDuplicates()
    assert step.bands == Bands(25, 5)
    decisions = step.decide((d.id, step.sign(d)) for d in documents)
    assert [decisions.get(d.id) for d in documents] == expected
    assert step.sign_all(documents) == [step.sign(d) for d in documents]
    plain = [" ".join(text.split()).casefold() for text in texts]
    same = [f"same as d{plain.index(text)}" if text and plain.index(text) < i else None for i, text in enumerate(plain)]
    assert [r.reason if isinstance(r, Removal) else None for r in run(ExactDuplicates(), documents)] == same


def test_running_a_step_in_memory_is_what_a_pipeline_does_and_equal_ids_are_told_apart():
    documents = as_documents(make_family(9, 20))
    for step in (ExactDuplicates(), NearDuplicates(), RepeatedPieces("line", 4)):
        assert run_step(step, documents) == run(step, documents)
    same_ids = [Document("page", text) for text in ("one text", "another text", "one text")]
    results = run_step(ExactDuplicates(), same_ids)
    assert results[:2] == same_ids[:2] and results[2] == Removal("same as page")
    assert list(name_uniquely(["a", "a", "a#2", "a"])) == ["a", "a#2", "a#2#2", "a#3"]


def test_near_duplicates_are_those_that_comparing_all_pairs_finds():
    texts = make_family(7, 80)
    sets = [shingle(text) for text in texts]
    kept, expected = [], []
    for index, own in enumerate(sets):
        measured = [(jaccard(own, sets[other]), -other) for other in kept] if len(own) else []
        similarity, other = max(measured, default=(0.0, 0))
        is_copy = similarity >= 0.8
        expected.append((-other, similarity) if is_copy else None)
        if not is_copy and len(own):
            kept.append(index)
    assert [v and (v.of, v.similarity) for v in near_duplicates(texts)] == expected


def test_without_the_check_a_shared_band_is_enough():
    texts = [" ".join(make_words(random.Random(seed), 300)) for seed in range(20)]
    step = NearDuplicates(threshold=0.8, num_hashes=128, check=False)
    assert step.bands == Bands(9, 13) and step.sign(Document("a", texts[0]))[1] == b""
    results = run(step, as_documents([*texts, *texts]))
    assert all(isinstance(r, Document) for r in results[:20])
    assert [r.reason for r in results[20:]] == [f"nearly the same as d{i}" for i in range(20)]


def test_threshold_at_its_edge():
    words = [f"w{i}" for i in range(104)]  # 100 n-grams; 18 of them end in the last 18 words
    texts = [" ".join(words), " ".join(words[:-1] + ["other"])]  # 99 of 101 shared
    similarity = 99 / 101
    at, above = NearDuplicates(threshold=similarity), NearDuplicates(threshold=similarity + 1e-9)
    assert isinstance(run(at, as_documents(texts))[1], Removal)
    assert run(above, as_documents(texts))[1] == Document("d1", texts[1])
    assert run(at, as_documents(texts))[1].reason == "98% the same as d0"


def test_repeated_lines_and_paragraphs_as_steps():
    texts = make_family(8, 5)
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy of this text."
    texts = [f"# {texts[0]}\n\n{licence}\n\nOne.\n", f"Two.\n\n{licence.upper()}\n\n\n{licence}\n", licence, ""]
    results = run(RepeatedPieces(min_chars=40), as_documents(texts))
    assert results[0].text == texts[0] and results[1].text == "Two.\n"
    assert results[2].reason == "every paragraph stood before, the first in d0" and results[3].text == ""
    lines = run(RepeatedPieces("line", 10), as_documents(["a first line\nshort\nshort\n", "b\n  A  first LINE\nc"]))
    assert lines[0].text == "a first line\nshort\nshort\n" and lines[1].text == "b\nc\n"
    at_edge = RepeatedPieces("line", 12), RepeatedPieces("line", 13)
    twice = as_documents(["a first line\na first line\n"])
    assert [run(step, twice)[0].text.count("first") for step in at_edge] == [1, 2]


def test_refusals_of_steps():
    for wrong, why in (
        (dict(threshold=0), "threshold"),
        (dict(gram_words=0), "gram_words"),
        (dict(num_hashes=0), "num"),
    ):
        with pytest.raises(ConfigError, match=why):
            NearDuplicates(**wrong)
    with pytest.raises(ConfigError, match="take more hashes"):
        NearDuplicates(threshold=0.1, num_hashes=4)
    with pytest.raises(ConfigError, match="paragraph or line"):
        RepeatedPieces(unit="word")
    assert NearDuplicates().decide([]) == {} and RepeatedPieces().decide([]) == {}


@pytest.mark.parametrize("piece", ["a", "a ", "\u4e2d", "\n", "x. "])
def test_a_huge_line_takes_linear_time(piece):
    document = Document("x", piece * (1_000_000 // len(piece)))
    begun = time.perf_counter()
    for step in (ExactDuplicates(), NearDuplicates(), RepeatedPieces()):
        run(step, [document])
    assert time.perf_counter() - begun < 8
