import base64
import os
from pathlib import Path

import pytest

import modelwright as mw
from modelwright.base.errors import DataError
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.tiktoken import Encoding, read_tiktoken, write_tiktoken

DATA = Path(os.environ.get("MODELWRIGHT_DATA", "/nonexistent"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="MODELWRIGHT_DATA is not set")
ODD = [
    "",
    " ",
    "a\n  ",
    "a \n\n  b  \n",
    "  \n",
    "12345678 9",
    "I'm THE'RE",
    "naïve 👩‍👩‍👧 吾輩は猫である",
    "<|endoftext|>",
]
# The patterns as the tiktoken library publishes them, in its own regular-expression dialect.
PUBLISHED = {
    "r50k_base": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s",
}


@needs_data
@pytest.mark.peer
@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base"])
def test_published_ranks_give_the_librarys_ids(name: str, tmp_path: Path):
    tiktoken, load = pytest.importorskip("tiktoken"), pytest.importorskip("tiktoken.load")
    file = DATA / f"tokenizers/tiktoken/{name}.tiktoken"
    ours = mw.load_tokenizer(file)
    ranks = load.load_tiktoken_bpe(str(file))
    peer = tiktoken.Encoding(
        name, pat_str=PUBLISHED[name], mergeable_ranks=ranks, special_tokens={"<|endoftext|>": ours.eos_id}
    )
    assert ours.eos_id == {"r50k_base": 50256, "cl100k_base": 100257}[name]
    lines = (DATA / "text/names.txt").read_text().splitlines()[:50]
    texts = [*ODD, *lines, Path(__file__).read_text(encoding="utf-8"), (DATA / "README.md").read_text()[:20000]]
    assert ours.encode_batch(texts) == [peer.encode(text, disallowed_special=()) for text in texts]
    assert [ours.decode(ours.encode(text)) for text in texts] == texts
    write_tiktoken(ours, tmp_path / file.name)
    again = load.load_tiktoken_bpe(str(tmp_path / file.name))
    assert {piece: rank for piece, rank in again.items() if not piece.startswith(b"<|unused_")} == ranks


@needs_data
def test_the_expected_ids_of_gpt2():
    ours = mw.load_tokenizer(DATA / "tokenizers/tiktoken/r50k_base.tiktoken")
    file = DATA / "tokenizers/gguf/ggml-vocab-gpt-2.gguf"
    texts = Path(f"{file}.inp").read_bytes().decode("utf-8").split("\n__ggml_vocab_test__\n")
    rows = Path(f"{file}.out").read_text().split("\n")
    assert [ours.encode(text) for text in texts] == [[int(i) for i in row.split()] for row in rows]


def test_our_own_tokenizer_is_written_and_read_back(house: Tokenizer, tmp_path: Path):
    path = tmp_path / "ours.tiktoken"
    encoding = write_tiktoken(house, path)
    assert encoding.special_tokens == house.special_ids
    again = read_tiktoken(path, encoding)
    assert again.encode_batch(ODD) == house.encode_batch(ODD)
    assert again.eos_id == house.eos_id
    with pytest.raises(DataError, match=r"has 797 ranks and no known name .*cl100k_base"):
        mw.load_tokenizer(path)


@pytest.mark.peer
def test_the_library_reads_what_is_written(house: Tokenizer, tmp_path: Path):
    tiktoken, load = pytest.importorskip("tiktoken"), pytest.importorskip("tiktoken.load")
    encoding = write_tiktoken(house, tmp_path / "ours.tiktoken")
    ranks = load.load_tiktoken_bpe(str(tmp_path / "ours.tiktoken"))
    peer = tiktoken.Encoding(
        "ours", pat_str=encoding.pattern, mergeable_ranks=ranks, special_tokens=dict(encoding.special_tokens)
    )
    texts = [text for text in ODD if not text.endswith("\n")]
    assert [peer.encode(text, disallowed_special=()) for text in texts] == house.encode_batch(texts)


def test_what_is_no_byte_level_bpe_is_refused(published: dict[str, Path], tmp_path: Path):
    for name in ("llama2", "unigram"):
        with pytest.raises(DataError, match="is not byte-level BPE"):
            write_tiktoken(mw.load_tokenizer(published[name]), tmp_path / "x.tiktoken")
    assert not list(tmp_path.iterdir())


LINES = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*LINES, "YWI= x"], "line 257: not a line"),
        ([*LINES, "YWI 256"], "line 257: not a line"),
        ([*LINES, "YQ== 256"], "line 257: the piece b'a' is empty or stands twice"),
        (LINES[:-1], "the byte 255 has no rank"),
        ([*LINES, "YWI= 7"], "two pieces share a rank"),
        ([*LINES, "YWI= 99999999999"], "has the rank 99,999,999,999"),
    ],
)
def test_damaged_files_are_refused_by_line(tmp_path: Path, lines: list[str], message: str):
    (tmp_path / "x.tiktoken").write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        read_tiktoken(tmp_path / "x.tiktoken", Encoding(r"\s+", 256))


def test_fewer_ranks_than_the_encoding_has_are_refused(tmp_path: Path):
    (tmp_path / "r50k_base.tiktoken").write_text("\n".join(LINES))
    with pytest.raises(DataError, match="holds 256 ranks; 50,256 were expected"):
        mw.load_tokenizer(tmp_path / "r50k_base.tiktoken")
