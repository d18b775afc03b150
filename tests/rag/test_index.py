import json
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from modelwright.base.artifact import lineage, read_manifest, verify
from modelwright.base.errors import CheckpointError, ConfigError, DataError, RequestError
from modelwright.base.files import hash_file, read_json, write_json
from modelwright.base.types import Document
from modelwright.data.read import read_documents, write_documents
from modelwright.rag.embed import Embedder
from modelwright.rag.fuse import FusionConfig
from modelwright.rag.index import (
    BM25,
    CHUNKS,
    DOCUMENTS,
    MAX_QUERY_CHARS,
    VECTORS,
    Index,
    IndexConfig,
    passage_text,
)

LEXICAL = IndexConfig(has_vectors=False)


@pytest.mark.parametrize("mode", ["fused", "bm25", "dense", None])
@pytest.mark.parametrize(
    ("query", "doc", "heading"),
    [
        ("What does textwrap.dedent do?", "textwrap.md", "textwrap.dedent(text)"),
        ("json.dumps", "json.md", "json.dumps(obj, *, indent=None, sort_keys=False)"),
        ("how many weeks of paid parental leave", "handbook/leave.md", "Parental leave"),
    ],
)
def test_each_mode_finds_the_passage(index: Index, mode, query: str, doc: str, heading: str):
    hits = index.search(query, 3, mode)
    # Dense search alone blurs names: it may put the module before the function.
    assert (doc, heading) in [(hit.doc, hit.heading) for hit in hits[: 2 if mode == "dense" else 1]]


def test_meaning_is_found_without_a_common_word(index: Index):
    assert index.search("staying home because of the flu", 1, "dense")[0].heading == "Sick leave"


def test_hits_are_spans_of_the_files_themselves(index: Index, pages: Path):
    hits = [hit for query in ("Satz", "textwrap", "bananas", "東京", "leave") for hit in index.search(query, 50)]
    assert {hit.doc for hit in hits} == {document.id for document in index.documents}
    for hit in hits:
        with open(pages / hit.doc, encoding="utf-8", newline="") as handle:
            assert handle.read()[hit.start : hit.end] == hit.text == index.document(hit.doc).text[hit.start : hit.end]


def test_scores_fall_and_fused_ones_lie_between_0_and_1(index: Index):
    scores = [hit.score for hit in index.search("json text leave", 50)]
    assert scores == sorted(scores, reverse=True) and 0 < scores[-1] <= scores[0] <= 1


def test_opening_brings_the_same_hits_back(index: Index, embedder: Embedder):
    again = Index.open(index.path, embedder=embedder)
    for mode in ("fused", "bm25", "dense"):
        assert again.search("text wrapping", 10, mode) == index.search("text wrapping", 10, mode)


def test_the_same_documents_give_the_same_bytes(pages: Path, lexical: Index, tmp_path):
    again = Index.build(pages, tmp_path / "again", config=LEXICAL)
    assert read_manifest(again.path).hash == read_manifest(lexical.path).hash


def test_a_documents_artifact_is_a_parent_and_its_failures_are_kept(pages: Path, tmp_path):
    shutil.copytree(pages, tmp_path / "pages")
    (tmp_path / "pages" / "broken.txt").write_bytes(b"\xff\xfe\xfa")
    write_documents(read_documents(tmp_path / "pages"), tmp_path / "documents")
    index = Index.build(tmp_path / "documents", tmp_path / "index", config=LEXICAL)
    assert [step.kind for step in lineage(index.path)] == ["index", "documents"]
    assert [failure.path for failure in index.failures] == ["broken.txt"]
    assert verify(index.path).measured["num_documents"] == len(index.documents)


def test_documents_can_be_given_as_they_are(tmp_path):
    index = Index.build((Document(f"{n}", f"number {n}") for n in range(3)), tmp_path / "index", config=LEXICAL)
    assert [hit.doc for hit in index.search("2")] == ["2"]


def test_an_index_without_vectors_takes_bm25_for_granted(lexical: Index):
    assert lexical.search("json.dumps")[0].doc == "json.md"
    with pytest.raises(RequestError, match="without vectors"):
        lexical.search("json", mode="dense")


def test_threads_can_search_at_once(index: Index):
    expected, found = index.search("paid leave", 5), []
    again = Index.open(index.path)
    threads = [threading.Thread(target=lambda: found.append(again.search("paid leave", 5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


@pytest.mark.parametrize("query", ["", "  \n", None, 7, "x" * (MAX_QUERY_CHARS + 1), "half \ud800"])
def test_queries_that_cannot_be_are_refused(index: Index, query):
    with pytest.raises(RequestError) as caught:
        index.search(query)
    assert caught.value.param == "query" and caught.value.status == 400


@pytest.mark.parametrize(
    ("k", "mode", "param"), [(0, None, "k"), (1001, None, "k"), (True, None, "k"), (5, "x", "mode")]
)
def test_other_parameters_that_cannot_be_are_refused(index: Index, k, mode, param: str):
    with pytest.raises(RequestError) as caught:
        index.search("word", k, mode)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "query", ["\x00", "?", "''); DROP TABLE", "a" * MAX_QUERY_CHARS, "\u202e\u200d", "../../etc/passwd"]
)
def test_odd_queries_are_served(index: Index, query: str):
    index.search(query, 3)


@pytest.mark.parametrize("doc", ["../index/manifest.json", "/etc/passwd", "nothing.md", "", "textwrap.md\0"])
def test_document_ids_are_keys_and_no_paths(index: Index, doc: str):
    with pytest.raises(RequestError) as caught:
        index.document(doc)
    assert caught.value.status == 404


@pytest.mark.parametrize("name", [DOCUMENTS, CHUNKS, BM25, VECTORS, "failures.jsonl"])
@pytest.mark.parametrize("damage", ["missing", "flipped", "truncated", "empty"])
def test_every_damaged_file_is_named(index: Index, tmp_path, name: str, damage: str):
    folder = shutil.copytree(index.path, tmp_path / "index")
    file, data = folder / name, bytearray((folder / name).read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        file.write_bytes(bytes(data[:-1]) + bytes([data[-1] ^ 1]) if data else b"x")
    else:
        file.write_bytes(bytes(data[: len(data) // 2]) if damage == "truncated" and data else b" ")
    with pytest.raises(CheckpointError, match=name):
        Index.open(folder)


def seal(folder: Path, name: str) -> None:
    """Write the hash of a changed file into the manifest, as somebody who means harm would."""
    manifest = read_json(folder / "manifest.json")
    manifest["measured"]["files"][name] = hash_file(folder / name)
    write_json(folder / "manifest.json", manifest)


def test_nothing_is_unpickled(index: Index, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    folder = shutil.copytree(index.path, tmp_path / "index")
    np.savez(folder / BM25, terms=np.array([Trap()], dtype=object), allow_pickle=True)
    seal(folder, BM25)
    with pytest.raises(CheckpointError, match=BM25):
        Index.open(folder)
    (folder / BM25).write_bytes(pickle.dumps(Trap()))
    seal(folder, BM25)
    with pytest.raises(CheckpointError, match=BM25):
        Index.open(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "change",
    [{"end": 10**9}, {"start": -1}, {"start": 5, "end": 5}, {"doc": "../other"}, {"start": "0"}, {"headings": None}],
)
def test_chunks_outside_their_documents_are_refused(index: Index, tmp_path, change: dict):
    folder = shutil.copytree(index.path, tmp_path / "index")
    rows = [json.loads(line) for line in (folder / CHUNKS).read_text().splitlines()]
    rows[1].update(change)
    (folder / CHUNKS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    seal(folder, CHUNKS)
    with pytest.raises(CheckpointError, match=r"chunks\.jsonl, line 2"):
        Index.open(folder)


def test_another_encoder_is_refused(index: Index, embedder: Embedder, tmp_path):
    manifest = read_json(index.path / "manifest.json")
    folder = shutil.copytree(index.path, tmp_path / "index")
    manifest["settings"]["embedder"]["hash"] = "0" * 64
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(CheckpointError, match="another encoder: hash"):
        Index.open(folder, embedder=embedder)
    later = Index.open(folder)
    assert later.search("json", mode="bm25")
    with pytest.raises(CheckpointError, match="another encoder: hash"):
        later.search("json")


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "None of the 0 documents"),
        ([Document("a", " \n ")], "None of the 1 documents"),
        ([Document("a", "x"), Document("a", "y")], "Two documents have the id 'a'"),
        ([Document("", "x")], "non-empty id"),
        ([Document("a", "half \ud800")], "surrogate"),
        (["text"], "A str was given"),
    ],
)
def test_documents_that_cannot_be_indexed_are_refused(documents, message: str, tmp_path):
    with pytest.raises(DataError, match=message):
        Index.build(documents, tmp_path / "index", config=LEXICAL)
    assert not (tmp_path / "index").exists()


def test_what_is_no_index_is_refused(pages: Path, tmp_path):
    with pytest.raises(DataError, match="not an artifact"):
        Index.open(pages)
    write_documents(read_documents(pages), tmp_path / "documents")
    with pytest.raises(DataError, match="expected an index"):
        Index.open(tmp_path / "documents")


def test_a_build_that_fails_leaves_the_old_index(lexical: Index, tmp_path):
    folder = shutil.copytree(lexical.path, tmp_path / "index")
    with pytest.raises(CheckpointError):
        Index.build([Document("a", "text")], folder, embedder=tmp_path / "no-encoder")
    assert Index.open(folder).search("json.dumps")


def test_settings_come_back_with_the_index(pages: Path, tmp_path):
    config = IndexConfig(has_vectors=False, fusion=FusionConfig(dense_weight=0.3))
    Index.build(pages, tmp_path / "index", config=config)
    assert Index.open(tmp_path / "index").config == config
    manifest = read_json(tmp_path / "index" / "manifest.json")
    manifest["settings"]["chunk"]["target_char"] = 5
    write_json(tmp_path / "index" / "manifest.json", manifest)
    with pytest.raises(ConfigError, match="target_char"):
        Index.open(tmp_path / "index")


def test_what_is_encoded_names_its_heading_once(index: Index):
    texts = {chunk.headings[-1]: passage_text(chunk) for chunk in index.chunks if chunk.headings}
    assert all(text.count(heading) >= 1 for heading, text in texts.items())
    assert texts["textwrap.dedent(text)"].count("textwrap.dedent(text)") == 1
