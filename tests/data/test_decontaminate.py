"""Items are found word for word with their places, from 13 words on; the index comes back from disk the same."""

import json
import pickle
import random
import time

import pytest

from modelwright.base.artifact import verify
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.types import Document
from modelwright.data.decontaminate import (
    Decontaminate,
    EvaluationIndex,
    IndexConfig,
    coverage,
    describe,
    load_index,
    read_items,
)


def words(seed, count):
    rng = random.Random(seed)
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


def hidden(passage, seed=99):
    return " ".join([*words(seed, 40), *passage, *words(seed + 1, 40)])


def test_thirteen_words_give_an_item_away_and_twelve_do_not():
    item = words(1, 40)
    index = EvaluationIndex([Document("q1", " ".join(item))])
    assert index.find(Document("d", hidden(item[5:17]))) == []
    text = hidden(item[5:18]).upper().replace(" ", "  ")
    (hit,) = index.find(Document("d", text))
    assert (hit.document, hit.item, hit.num_words) == ("d", "q1", 13)
    assert text[hit.start : hit.end].lower().split() == item[5:18]
    assert index.items[0].text[hit.item_start : hit.item_end].split() == item[5:18]


def test_neighbouring_ngrams_are_one_hit_and_two_places_are_two():
    item = words(2, 60)
    index = EvaluationIndex([Document("q", " ".join(item))])
    text = " ".join([*item[:30], *words(3, 5), *item[:30]])
    assert [(h.num_words, h.item_start) for h in index.find(Document("d", text))] == [(30, 0), (30, 0)]


@pytest.mark.parametrize(("count", "is_found"), [(7, False), (8, True), (12, True)])
def test_short_items_count_as_a_whole(count, is_found):
    item = words(4, count)
    index = EvaluationIndex([Document("q", " ".join(item))])
    assert bool(index.find(Document("d", hidden(item)))) == is_found
    assert index.find(Document("d", hidden(item[:-1]))) == []
    assert index.num_short == (not is_found)


def test_the_frame_of_prompts_is_left_out():
    frame = words(5, 20)
    items = [Document(f"q{i}", " ".join([*frame, *words(10 + i, 20)])) for i in range(11)]
    document = Document("d", hidden(frame))
    index = EvaluationIndex(items)
    assert index.find(document) == [] and index.num_left_out == 8
    assert len(EvaluationIndex(items[:10]).find(document)) == 10
    assert len(EvaluationIndex(items, IndexConfig(max_items=None)).find(document)) == 11
    assert index.find(Document("e", hidden(items[3].text.split()[20:])))[0].item == "q3"


def test_characters_are_right_where_folding_lengthens_the_text():
    item = "\u0130\u0130 Stra\u00dfe gro\u00df \u4e2d\u6587 and so on until there are enough words in it"
    index = EvaluationIndex([Document("q", item)])
    text = "\u0130\u0130\u00df, before it. " + item.upper() + "! After."
    (hit,) = index.find(Document("d", text))
    assert text[hit.start : hit.end] == item.upper() and (hit.item_start, hit.item_end) == (0, len(item))


def test_coverage_says_how_much_of_an_item_was_seen():
    item = words(6, 40)
    index = EvaluationIndex([Document("q", " ".join(item)), Document("other", " ".join(words(7, 30)))])
    documents = [Document("half", hidden(item[:20])), Document("most", hidden(item[:30])), Document("none", "a b c")]
    (row,) = coverage(index, [hit for d in documents for hit in index.find(d)])
    assert (row.item, row.covered_fraction, row.num_documents, row.document) == ("q", 0.75, 2, "most")
    report = describe(index, documents)
    assert report["num_documents_hit"] == 2 and len(report["hits"]) == 2 and report["num_items"] == 2
    json.dumps(report)


def test_saved_and_read_back_and_used_as_a_filter(tmp_path):
    items = [Document(f"q{i}", " ".join(words(20 + i, 5 + 3 * i))) for i in range(8)]
    index = EvaluationIndex(items)
    index.save(tmp_path / "index")
    verify(tmp_path / "index")
    back = load_index(tmp_path / "index")
    documents = [Document(f"d{i}", hidden(item.text.split())) for i, item in enumerate(items)]
    assert [back.find(d) for d in documents] == [index.find(d) for d in documents]
    assert (back.num_grams, back.num_short) == (index.num_grams, index.num_short)
    step = pickle.loads(pickle.dumps(Decontaminate(index=tmp_path / "index")))
    reason = step.reason(documents[7])
    assert reason.startswith("26 words of evaluation item q7 at characters ")
    assert step.reason(documents[0]) == "" and step.reason(Document("e", "")) == ""
    lines = "".join(json.dumps({"question": item.text, "answer": "x"}) + "\n" for item in items)
    (tmp_path / "items.jsonl").write_text(lines)
    by_file = Decontaminate(against=(tmp_path / "items.jsonl",))
    assert by_file.reason(documents[7]) == reason.replace("q7", "items.jsonl/8")


def test_refusals(tmp_path):
    for settings in ({}, {"index": tmp_path, "against": (tmp_path,)}):
        with pytest.raises(ConfigError, match="either index"):
            Decontaminate(**settings)
    with pytest.raises(ConfigError, match="min_words <= num_words"):
        IndexConfig(num_words=5, min_words=8)
    with pytest.raises(DataError, match="does not exist"):
        load_index(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"answer": "x"}\n')
    with pytest.raises(DataError, match="row 2: none of the fields"):
        read_items(tmp_path / "bad.jsonl")
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match="not an index"):
        load_index(tmp_path)
    assert EvaluationIndex([]).find(Document("d", "a b")) == []


@pytest.mark.parametrize("piece", ["a", "a ", "\u4e2d "])
def test_a_huge_document_takes_linear_time(piece):
    index = EvaluationIndex([Document("q", " ".join(words(8, 30)))])
    begun = time.perf_counter()
    index.find(Document("d", piece * (1_000_000 // len(piece))))
    assert time.perf_counter() - begun < 5
