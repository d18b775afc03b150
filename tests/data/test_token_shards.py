"""Shards hold what the texts hold, and the rows read from them predict each token once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base.artifact import verify
from modelwright.base.errors import CheckpointError, DataError
from modelwright.data.feed import Epochs, Feed, shuffled
from modelwright.data.pack import IGNORED
from modelwright.data.token_shards import PackedRows, StreamRows, TokenShards, write_token_shards
from modelwright.tokenizer.train import train_bpe

TEXTS = [f"document {i}: " + "words and words " * (i % 7) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def stream(tokenizer) -> list[int]:
    return [i for text in TEXTS for i in [tokenizer.eos_id, *tokenizer.encode(text)]]


@pytest.fixture(scope="module", params=[1, 60, 10_000])
def shards(request, tokenizer, tmp_path_factory) -> TokenShards:
    folder = tmp_path_factory.mktemp("shards") / "tokens"
    write_token_shards(["", *TEXTS], tokenizer, folder, shard_tokens=request.param)
    assert verify(folder).kind == "tokens"
    return TokenShards(folder, tokenizer)


def test_the_stream_is_the_texts_behind_separators(shards, stream, tokenizer):
    assert shards.num_tokens == len(stream) and shards.num_documents == len(TEXTS)
    assert shards.read(0, len(stream) + 1).tolist() == [*stream, tokenizer.eos_id]
    assert [stream[i] for i in shards.starts()] == [tokenizer.eos_id] * len(TEXTS)
    for start in range(0, len(stream) - 9, 13):
        assert shards.read(start, 9).tolist() == stream[start : start + 9]
    with pytest.raises(DataError, match="the stream has"):
        shards.read(len(stream), 2)


def test_rows_of_the_stream_predict_each_token_once(shards, stream):
    rows = StreamRows(shards, 16)
    made = rows.rows(np.arange(len(rows)))
    assert made.input_ids.ravel().tolist() == stream[: 16 * len(rows)]
    assert made.labels[:, :-1].tolist() == made.input_ids[:, 1:].tolist()
    bounded = StreamRows(shards, 16, has_boundaries=True).rows(np.arange(3)).document_ids
    assert (np.diff(bounded, axis=1) == (made.input_ids[:3, 1:] == shards.separator_id)).all()


@given(row_len=st.integers(2, 70))
@settings(max_examples=15, deadline=None)
def test_packed_rows_hold_each_document_and_predict_each_token_once(shards, stream, row_len):
    rows = PackedRows(shards, row_len)
    made = rows.rows(np.arange(len(rows)))
    labels = made.labels[made.labels != IGNORED]
    assert sorted(labels.tolist()) == sorted([*stream[1:], shards.separator_id])
    assert (made.labels[made.document_ids == -1] == IGNORED).all()
    assert rows.num_pieces >= rows.num_documents and 0 < rows.used_fraction <= 1
    longest = max(len(piece) for piece in np.split(np.array(stream), np.flatnonzero(np.array(stream) == 0)[1:]))
    if row_len >= longest:
        assert rows.num_pieces == rows.num_documents, "no document is cut that fits into a row"


def test_best_fit_cuts_fewer_documents_than_the_stream(shards):
    packed, streamed = PackedRows(shards, 64), StreamRows(shards, 64)
    is_start = streamed.rows(np.arange(len(streamed))).input_ids[:, 0] == shards.separator_id
    assert packed.num_pieces - packed.num_documents < int((~is_start).sum())
    assert packed.used_fraction > 0.9


def test_a_feed_reads_shards(shards):
    rows = PackedRows(shards, 64)
    feed = Feed([rows], Epochs(shuffled(len(rows), 0)), 2, num_workers=2)
    batch = feed.next_batch()
    assert batch.input_ids.shape == (2, 64) and batch.mask is not None
    feed.close()


def test_large_vocabularies_take_four_bytes_and_small_ones_two(shards):
    assert np.load(shards.folder / "tokens-00000.npy").dtype == np.uint16


def test_damaged_shards_and_another_tokenizer_are_refused(tokenizer, tmp_path):
    write_token_shards(TEXTS, tokenizer, tmp_path / "t", shard_tokens=60)
    with pytest.raises(DataError, match="written by another tokenizer"):
        TokenShards(tmp_path / "t", train_bpe(TEXTS, 280))
    np.save(tmp_path / "t" / "tokens-00001.npy", np.zeros(3, np.uint16))
    with pytest.raises(CheckpointError, match=r"tokens-00001.npy has 3 tokens, the index says"):
        TokenShards(tmp_path / "t")
    (tmp_path / "t" / "tokens-00001.npy").write_bytes(b"no array")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TokenShards(tmp_path / "t")
    with pytest.raises(DataError, match="it has no shards.json"):
        TokenShards(tmp_path)
    with pytest.raises(DataError, match="There is no text"):
        write_token_shards(["", ""], tokenizer, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    write_token_shards(["a"], tokenizer, tmp_path / "short")
    with pytest.raises(DataError, match="one row needs 64"):
        StreamRows(TokenShards(tmp_path / "short"), 64)
