"""Unigram and WordPiece as trained here: what comes back, and that text never becomes a special token."""

import os
import random
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base.errors import ConfigError, DataError
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.byte_level import spell
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.tokenizer.special import SPECIAL_TOKENS
from modelwright.tokenizer.subwords import train_unigram, train_wordpiece
from modelwright.tokenizer.train import train_bpe

DATA = Path(os.environ.get("MODELWRIGHT_DATA", "/nonexistent"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="MODELWRIGHT_DATA is not set")
SOURCE = Path(__file__).read_text(encoding="utf-8")
PIECES = ["<unk>", "<0x0A>", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##a", " ", "\n", "猫", "é", "👩‍👩‍👧", "a"]
hostile = st.lists(st.sampled_from([*PIECES, *SPECIAL_TOKENS]), max_size=10).map("".join)


@pytest.fixture(scope="module")
def unigram() -> Tokenizer:
    return train_unigram([SOURCE], 500)


@pytest.fixture(scope="module")
def wordpiece() -> Tokenizer:
    return train_wordpiece([SOURCE], 400)


@given(st.one_of(st.text(), hostile))
@settings(max_examples=300, deadline=None)
def test_unigram_gives_back_any_text_and_no_special_token(unigram: Tokenizer, text: str):
    text = text.replace("\u2581", "_")  # stands for the space, as in SentencePiece
    ids = unigram.encode(text)
    assert unigram.decode(ids) == text
    assert not set(unigram.special_ids.values()) & set(ids)


@given(st.one_of(st.text(), hostile))
@settings(max_examples=200, deadline=None)
def test_wordpiece_takes_no_special_token_from_text_but_the_unknown(wordpiece: Tokenizer, text: str):
    guarded = set(wordpiece.special_ids.values()) - {wordpiece.special_ids["[UNK]"]}
    assert not guarded & set(wordpiece.encode(text, add_special_tokens=False))


def test_wordpiece_gives_back_known_words_and_marks_both_ends(wordpiece: Tokenizer):
    ids = wordpiece.encode("def unigram text")
    assert [ids[0], ids[-1]] == [wordpiece.special_ids["[CLS]"], wordpiece.special_ids["[SEP]"]]
    assert wordpiece.decode(ids) == "def unigram text"


def test_both_are_read_back_from_their_files(unigram: Tokenizer, wordpiece: Tokenizer, tmp_path: Path):
    for number, one in enumerate([unigram, wordpiece]):
        one.save(tmp_path / str(number))
        again = load_tokenizer(tmp_path / str(number))
        assert again.encode(SOURCE) == one.encode(SOURCE) and again.special_ids == one.special_ids
        assert again.roles == one.roles


def test_too_little_text_for_unigram_is_said(caplog):
    assert train_unigram(["aa bb"], 2000).vocab_size < 2000
    assert "of the 2000 asked for" in caplog.text


def test_sizes_are_kept_and_settings_that_cannot_be_are_refused(unigram: Tokenizer, wordpiece: Tokenizer):
    assert unigram.vocab_size == 500 and wordpiece.vocab_size == 400
    with pytest.raises(ConfigError, match="vocab_size is 200; expected at least"):
        train_unigram(["a"], 200)
    with pytest.raises(ConfigError, match=r"needs \[UNK\]"):
        train_wordpiece(["a"], 200, ["[PAD]"])
    with pytest.raises(ConfigError, match="different, non-empty"):
        train_wordpiece(["a"], 200, ["[UNK]", "[UNK]"])
    with pytest.raises(DataError, match="no text to learn"):
        train_wordpiece([""], 200)


def test_frequent_words_become_unigram_pieces_although_they_always_end_alike():
    tokenizer = train_unigram(["the men came from the sea and from the land, " * 30 + SOURCE], 550)
    assert tokenizer.token_id("\u2581from") in tokenizer.encode("sent from home")
    assert tokenizer.token_id("\U0001e8d0") is None and tokenizer.token_id("\ue000") is None
    assert tokenizer.vocab_size == 550


@needs_data
def test_every_language_of_the_declaration_comes_back(unigram: Tokenizer):
    byte_level = train_bpe([SOURCE], 400)
    with zipfile.ZipFile(DATA / "text/nltk/udhr2.zip") as archive:
        texts = [
            archive.read(name).decode("utf-8", errors="replace") for name in archive.namelist() if name.endswith(".txt")
        ]
    assert len(texts) > 300
    for one in (byte_level, unigram):
        rows = one.encode_batch([text[:4000] for text in texts])
        assert [one.decode(row) for row in rows] == [text[:4000] for text in texts]


def test_random_bytes_code_and_emoji_come_back_on_byte_level():
    byte_level = train_bpe([SOURCE], 400)
    draw = random.Random(0)
    blobs = [draw.randbytes(draw.randrange(1, 400)).decode("latin-1") for _ in range(200)]
    texts = [*blobs, SOURCE, "👩‍👩‍👧🏳️‍🌈🇩🇪👍🏽", "\x00\x7f\ufeff\U0010ffff", "\t\tif (a->b[0] != NULL) { return; }\r\n"]
    assert [byte_level.decode(ids) for ids in byte_level.encode_batch(texts)] == texts
    raw = draw.randbytes(2000)  # no UTF-8: ids of bytes stand for these bytes
    ids = [index for char in spell(raw) if (index := byte_level.token_id(char)) is not None]
    assert byte_level.decode_bytes(ids) == raw
