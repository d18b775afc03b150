"""Texts stream from every place, in order, and never more of them than one is in memory."""

import json
import tracemalloc
from pathlib import Path

import pytest
from tests.conftest import Toy

from modelwright.base.errors import DataError
from modelwright.data import text_lines
from modelwright.data.plan import read_pipeline
from modelwright.data.run import RunParams, run_pipeline
from modelwright.data.shards import read_texts
from modelwright.ops import make, texts
from modelwright.ops.make import make_tokenizer
from modelwright.ops.texts import stream_texts


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_files_and_folders_come_in_the_order_of_their_names(tmp_path: Path):
    (tmp_path / "a.txt").write_text("first\n", encoding="utf-8")
    write_lines(tmp_path / "b.jsonl", [{"id": 1, "text": "second"}, {"text": "third"}])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md").write_text("# fourth\n", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("no", encoding="utf-8")
    (tmp_path / "d.bin").write_bytes(b"\x00")
    found = [text.strip() for text in stream_texts([tmp_path])]
    assert found == ["first", "second", "third", "# fourth"]
    assert list(stream_texts([tmp_path / "b.jsonl"])) == ["second", "third"]
    assert list(stream_texts([tmp_path], held_out=True)) == []


def test_a_data_set_gives_its_parts(toy: Toy):
    train, held_out = list(stream_texts([toy.data])), list(stream_texts([toy.data], held_out=True))
    assert train and held_out and not set(train) & set(held_out)
    with pytest.raises(DataError, match="kind 'model'"):
        list(stream_texts([toy.model]))


def test_a_data_set_in_many_files_or_parquet_gives_its_texts(tmp_path: Path):
    pytest.importorskip("pyarrow")
    written = [f"text number {i} of some length" for i in range(9)]
    source = write_lines(tmp_path / "in.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(written)])
    for name in ("jsonl", "parquet"):
        pipeline = {"source": str(source), "steps": ["clean"], "out": str(tmp_path / name), "format": name}
        run_pipeline(read_pipeline({**pipeline, "shard": {"out_bytes": 300}}), RunParams(num_workers=1))
        assert [text.strip() for text in stream_texts([tmp_path / name])] == written
        assert list(stream_texts([tmp_path / name], held_out=True)) == []


def test_long_text_comes_in_pieces_that_end_with_lines_and_lose_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(texts, "_WHOLE_BYTES", 10)
    monkeypatch.setattr(texts, "PIECE_CHARS", 50)
    for text in ("some words é\n" * 40, "no lines at all but words " * 20, "x" * 333, "\n" + "y" * 90, "\n" * 200):
        (tmp_path / "long.txt").write_text(text, encoding="utf-8")
        pieces = list(stream_texts([tmp_path / "long.txt"]))
        assert "".join(pieces) == text and max(map(len, pieces)) <= 150
    (tmp_path / "long.txt").write_bytes(b"ab \xff" * 30)
    with pytest.raises(DataError, match="not UTF-8"):
        list(stream_texts([tmp_path / "long.txt"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        (b'{"text": "a"}\n\n{"txt": "b"}\n', 'line 3: expected an object with a "text"'),
        (b"[" * 100_000 + b"\n", "line 1: not valid JSON"),
        (b'{"text": "' + b"x" * 200 + b'"}\n', "more than 100 bytes"),
        (b'{"text": "\xff"}\n', "not UTF-8"),
    ],
)
def test_damaged_lines_are_named_and_in_a_folder_the_rest_goes_on(tmp_path, content, message, monkeypatch, caplog):
    monkeypatch.setattr(text_lines, "MAX_LINE_BYTES", 100 if b"xxx" in content else 1 << 20)
    (tmp_path / "bad.jsonl").write_bytes(content)
    (tmp_path / "good.txt").write_text("good", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        list(stream_texts([tmp_path / "bad.jsonl"]))
    assert list(stream_texts([tmp_path]))[-1] == "good" and message in caplog.text


def test_damaged_lines_are_set_aside_with_their_place_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lines, "MAX_LINE_BYTES", 100)
    bad = [b'{"text": ', b'{"text": "\xff"}', b'{"txt": "b"}', b'{"text": "' + b"x" * 1000 + b'"}', b"7"]
    good = [json.dumps({"text": f"good {number}"}).encode() for number in range(6)]
    lines = [line for pair in zip(good, bad, strict=False) for line in pair]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([*lines, good[-1]]) + b"\n")
    asides: list[tuple[str, str]] = []
    found = list(stream_texts([tmp_path / "in.jsonl"], set_aside=lambda *told: asides.append(told)))
    assert found == [f"good {number}" for number in range(6)]
    assert [place.rpartition(", ")[2] for place, _ in asides] == [f"line {number}" for number in (2, 4, 6, 8, 10)]
    reasons = ("not valid JSON", "not UTF-8", 'with a "text"', "more than 100 bytes", 'with a "text"')
    assert all(expected in reason for (_, reason), expected in zip(asides, reasons, strict=True))


def test_a_parquet_row_without_a_text_is_named_or_set_aside(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"id": ["a", "b", "c"], "text": ["good", None, "too"], "metadata": ["{}"] * 3}
    parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="row 2: text is None; expected a text"):
        list(read_texts(tmp_path))
    asides: list[tuple[str, str]] = []
    assert list(read_texts(tmp_path, set_aside=lambda *told: asides.append(told))) == ["good", "too"]
    assert [place.rpartition(", ")[2] for place, _ in asides] == ["row 2"]


def test_what_is_not_there_is_said(tmp_path: Path):
    for path, message in ((tmp_path / "none", "does not exist"), (tmp_path, "nothing readable")):
        with pytest.raises(DataError, match=message):
            list(stream_texts([path]))


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "wordpiece"])
def test_memory_follows_the_words_and_not_the_text(tmp_path: Path, algorithm: str, monkeypatch):
    """Python's own memory while a tokenizer learns from a text, and from ten times that text."""
    monkeypatch.setattr(make, "MAX_MEASURED_CHARS", 20_000)
    words = " ".join(f"{first}{last}ing" for first in "abcdefgh" for last in ("lo", "mi", "ta", "ru", "zen"))
    peaks = {}
    for times in (400, 4000):
        rows = [{"text": f"{words} {number % 7}"} for number in range(times)]
        file = write_lines(tmp_path / f"{times}.jsonl", rows)
        make_tokenizer([file], tmp_path / "warm", 420, algorithm)
        tracemalloc.start()
        figures = make_tokenizer([file], tmp_path / str(times), 420, algorithm)
        peaks[times] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert figures["bytes_per_token"] > 1
    size = (tmp_path / "4000.jsonl").stat().st_size
    assert size > 700_000 and peaks[4000] < peaks[400] + size / 10
