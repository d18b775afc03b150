import os
import struct
from pathlib import Path

import pytest

import modelwright as mw
from modelwright.base.errors import DataError

DATA = Path(os.environ.get("MODELWRIGHT_DATA", "/nonexistent"))


def write(path: Path, pieces: list[tuple[float, bytes]], longest: int | None = None) -> Path:
    longest = max((len(p) for _, p in pieces), default=1) if longest is None else longest
    body = b"".join(struct.pack("<fi", score, len(piece)) + piece for score, piece in pieces)
    path.write_bytes(struct.pack("<i", longest) + body)
    return path


FIRST = [(0.0, b"<unk>"), (0.0, b"\n<s>\n"), (0.0, b"\n</s>\n"), *((0.0, b"<0x%02X>" % i) for i in range(256))]


def test_pieces_join_by_score_and_unknown_characters_become_bytes(tmp_path: Path):
    own = [(-1.0, b" a"), (-2.0, b"ab"), (-3.0, b" ab"), (-9.0, b" "), (-9.0, b"a"), (-9.0, b"b")]
    tokenizer = mw.load_tokenizer(write(tmp_path / "tok.bin", FIRST + own))
    assert tokenizer.encode("ab") == [1, 261]  # " a" first, then " ab"
    assert tokenizer.encode("é") == [1, 262, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer.encode("ab é <s>")) == "ab é <s>"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 265)


@pytest.mark.skipif(not DATA.is_dir(), reason="MODELWRIGHT_DATA is not set")
def test_a_published_file(tmp_path: Path):
    tokenizer = mw.load_tokenizer(DATA / "weights/stories260K/tok512.bin")
    text = (DATA / "weights/stories260K/expected_greedy_200.txt").read_text(encoding="utf-8")
    assert tokenizer.vocab_size == 512
    assert tokenizer.encode("Once upon a time") == [1, 403, 407, 261, 378]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save(tmp_path)
    assert mw.load_tokenizer(tmp_path).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "its longest piece has -1 bytes"),
        (struct.pack("<i", 1 << 30), "its longest piece has 1073741824 bytes"),
        (struct.pack("<ifi", 5, 0.0, 9) + b"123456789", "piece 0 has 9 bytes"),
        (struct.pack("<ifi", 5, 0.0, 5) + b"<un", "piece 0 has 5 bytes"),
        (struct.pack("<ifi", 5, 0.0, -4), "piece 0 has -4 bytes"),
        (struct.pack("<ifi", 5, 0.0, 2) + b"\xff\xff", "piece 0 is no UTF-8"),
        (struct.pack("<ifi", 5, 0.0, 5) + b"<unk>", "holds 1 pieces"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes, message: str):
    (tmp_path / "tok.bin").write_bytes(data)
    with pytest.raises(DataError, match=message):
        mw.load_tokenizer(tmp_path / "tok.bin")
