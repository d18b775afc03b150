"""Preparation accounts for every document and byte, keeps the split stable, and lets no secret into its reports."""

import json
import random
import time

import pytest

from modelwright.base.artifact import lineage, read_manifest
from modelwright.base.config import build, to_dict
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.types import Document
from modelwright.data.pipeline import PrepareConfig, load_dataset, num_bytes, prepare, prepare_artifact, split
from modelwright.data.read import ReadResult, write_documents

SECRET = "ghp_" + "a8Fk29dLq0ZxW7mN3bVc5RtY1uIoP4sGhJ6e"


def make_text(seed, num_words=120):
    rng = random.Random(seed)
    words = [
        rng.choice("river stone bridge morning letter garden window answer mountain paper".split())
        for _ in range(num_words)
    ]
    return f"# Page {seed}\n\n" + " ".join(f"{word}{rng.randrange(100)}" for word in words) + ".\n"


def make_documents(count):
    return [Document(f"{number:03}.md", make_text(number)) for number in range(count)]


def test_every_document_is_accounted_for():
    documents = make_documents(20)
    documents += [
        Document("copy.md", documents[0].text),
        Document("near.md", documents[1].text + "One more word.\n"),
        Document("short.md", "Too short."),
        Document("data.md", "A" * 20_000),
        Document("leak.md", f"tiny {SECRET}"),
    ]
    prepared = prepare(documents)
    out = [*prepared.train, *prepared.validation]
    reasons = {r.id: (r.stage, r.reason) for r in prepared.removed}
    assert sorted([d.id for d in out] + list(reasons)) == sorted(d.id for d in documents)
    assert reasons["copy.md"] == ("exact duplicates", "same as 000.md")
    assert reasons["near.md"][0] == "near duplicates" and "the same as 001.md" in reasons["near.md"][1]
    assert reasons["short.md"][1].startswith("too short") and "data, not text" in reasons["data.md"][1]
    for above, below in zip(prepared.funnel, prepared.funnel[1:], strict=False):
        assert (above.documents_out, above.bytes_out) == (below.documents_in, below.bytes_in)
    assert all(row.documents_in - row.documents_removed == row.documents_out for row in prepared.funnel)
    assert prepared.funnel[0].documents_in == 25 and prepared.funnel[0].bytes_in == num_bytes(documents)
    assert prepared.funnel[-1].documents_out == len(out) and prepared.funnel[-1].bytes_out == num_bytes(out)


def test_no_secret_is_left_in_anything_written(tmp_path):
    texts = [
        f"tiny {SECRET}",  # removed by the filter
        f"{make_text(1)}\nMy key is {SECRET}, mail jo@acme.org.\n",
        f"{make_text(1)}\nMy key is {SECRET}, mail jo@acme.org.\n",  # removed as a copy
        make_text(2) + f"\n{SECRET} stands here in a paragraph that is repeated in another document, word for word.\n",
        make_text(3) + f"\n{SECRET} stands here in a paragraph that is repeated in another document, word for word.\n",
    ]
    result = ReadResult([Document(f"{i}.md", text) for i, text in enumerate(texts)])
    write_documents(result, tmp_path / "documents")
    prepared = prepare_artifact(tmp_path / "documents", tmp_path / "dataset")
    written = "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "dataset").iterdir())
    assert SECRET not in written and "jo@acme.org" not in written
    assert "My key is [secret], mail [email]." in written
    assert {r.stage for r in prepared.removed} == {"filter", "exact duplicates", "repeated paragraphs"}
    kinds = sorted(redaction.kind for redaction in prepared.redactions)
    assert kinds == ["email", "email", "secret", "secret", "secret", "secret", "secret"]


def test_removed_texts_are_redacted_even_when_redaction_is_off():
    documents = [*make_documents(3), Document("leak.md", f"tiny {SECRET}")]
    prepared = prepare(documents, PrepareConfig(redact=()))
    assert [r.text for r in prepared.removed] == ["tiny [secret]\n"]


def test_the_split_is_stable_and_has_both_sides():
    documents = make_documents(400)
    train, validation = split(documents)
    assert 0.05 < num_bytes(validation) / num_bytes(documents) < 0.15
    assert split(list(reversed(documents)))[1] == validation[::-1]
    fewer = split(documents[::2])
    assert {d.id for d in fewer[1]} == {d.id for d in validation} & {d.id for d in documents[::2]}
    for count in range(2, 12):
        train, validation = split(make_documents(count))
        assert train and validation and len(train) + len(validation) == count
        assert num_bytes(validation) <= num_bytes(make_documents(count)) / 2


def test_a_large_document_is_not_taken_for_validation_when_others_can_be():
    for number in range(30):
        documents = [Document(f"large{number}", "x" * 10_000), Document("a", "y" * 100), Document("b", "z" * 100)]
        train, validation = split(documents)
        assert train[0].id == f"large{number}" and 1 <= len(validation) <= 2


def test_a_single_document_is_cut_near_its_end():
    text = "".join(f"Paragraph {i} of some length, so that there is enough of it.\n\n" for i in range(100))
    (train,), (validation,) = split([Document("book.txt", text)])
    assert validation.id == "book.txt#end" and train.id == "book.txt"
    assert f"{train.text}\n{validation.text}" == text
    assert 0.02 < len(validation.text) / len(text) <= 0.1
    assert split([Document("note.txt", "short")]) == ([Document("note.txt", "short")], [])
    assert split([Document("book.txt", text)], 0) == ([Document("book.txt", text)], [])


def test_nothing_left_says_which_stage_took_it():
    with pytest.raises(DataError, match=r"Of 2 documents(.|\n)*none is left(.|\n)*filter removed 2"):
        prepare([Document("a", "short"), Document("b", "")])
    with pytest.raises(DataError, match="Of 0 documents"):
        prepare([])


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="redact holds 'names'; known: email, phone, secret"):
        PrepareConfig(redact=("names",))
    with pytest.raises(ConfigError, match="near_duplicate_similarity"):
        PrepareConfig(near_duplicate_similarity=80)
    with pytest.raises(ConfigError, match="validation_fraction"):
        PrepareConfig(validation_fraction=1.0)
    assert build(PrepareConfig, to_dict(PrepareConfig(redact=("email",)))) == PrepareConfig(redact=("email",))


def test_stages_can_be_switched_off():
    documents = [*make_documents(3), Document("near.md", make_documents(1)[0].text + "One more word.\n")]
    off = PrepareConfig(near_duplicate_similarity=None, min_paragraph_chars=None)
    assert not prepare(documents, off).removed
    assert [row.note for row in prepare(documents, off).funnel][-2:] == ["off", "off"]


def test_the_artifact_is_sealed_with_its_parent_and_the_same_each_time(tmp_path):
    write_documents(ReadResult(make_documents(12)), tmp_path / "documents")
    prepared = prepare_artifact(tmp_path / "documents", tmp_path / "dataset")
    assert load_dataset(tmp_path / "dataset") == (prepared.train, prepared.validation)
    assert [a.kind for a in lineage(tmp_path / "dataset")] == ["dataset", "documents"]
    first = read_manifest(tmp_path / "dataset")
    assert first.measured["num_train"] + first.measured["num_validation"] == 12
    prepare_artifact(tmp_path / "documents", tmp_path / "dataset")
    assert read_manifest(tmp_path / "dataset").hash == first.hash
    funnel = json.loads((tmp_path / "dataset" / "funnel.json").read_text())
    assert [row["stage"] for row in funnel][0] == "clean"
    with pytest.raises(DataError, match="expected a dataset"):
        load_dataset(tmp_path / "documents")


def test_one_endless_line_is_dealt_with_in_bounded_time():
    documents = [
        *make_documents(3),
        Document("words.txt", "word and more " * 80_000),
        Document("b.txt", "x" * 3_000_000),
    ]
    begun = time.perf_counter()
    prepared = prepare(documents)
    assert time.perf_counter() - begun < 60
    assert {r.id for r in prepared.removed} == {"b.txt"}


def test_the_default_corpus_passes_in_seconds(reference_documents):
    documents = reference_documents
    begun = time.perf_counter()
    prepared = prepare(documents)
    assert time.perf_counter() - begun < 30  # 4 s alone on two cores
    assert num_bytes(prepared.train) > 1_500_000
    assert 0.04 < num_bytes(prepared.validation) / num_bytes(documents) < 0.2
