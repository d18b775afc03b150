"""Tokenizers compared by language, at the same FLOPs, as rows and as a picture."""

import heapq
import inspect
import struct
from pathlib import Path

import pytest

from modelwright.base.errors import ConfigError, DataError
from modelwright.ops.fixed_compute import MIN_STEPS, ComputeConfig, score_tokenizer, shape_of, train_decoder
from modelwright.ops.tokenizers import compare_tokenizers, name_tokenizers, plot_comparison
from modelwright.tokenizer.train import train_bpe
from modelwright.train.budget import flops_per_token

TEXT = inspect.getsource(heapq)
SMALL = ComputeConfig(flops=2e9, hidden_size=32, num_layers=1, num_heads=1, max_seq_len=32, rows_per_step=8)
GERMAN = "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung. "


def test_equal_flops_are_more_text_for_fewer_tokens_and_training_is_what_helps():
    few, many = train_bpe([TEXT], 280), train_bpe([TEXT], 700)
    held_out = {"code": [TEXT[:1500]]}
    scores = [score_tokenizer(one, [TEXT], held_out, SMALL) for one in (few, many)]
    for one, score in zip((few, many), scores, strict=True):
        per_token = flops_per_token(shape_of(one, SMALL), SMALL.max_seq_len)
        assert score.flops_per_token == per_token
        assert 0.9 * SMALL.flops < per_token * score.num_tokens <= SMALL.flops
    assert scores[0].num_tokens > scores[1].num_tokens
    short = score_tokenizer(few, [TEXT], held_out, ComputeConfig(**{**vars(SMALL), "flops": 9.5e8}))
    untrained = 8.1  # bits of a byte where each of 280 tokens is as likely and few say more than a byte
    assert scores[0].bits_per_byte["code"] < short.bits_per_byte["code"] < untrained
    again = score_tokenizer(few, [TEXT], held_out, SMALL)
    assert again.bits_per_byte == scores[0].bits_per_byte


def test_too_few_flops_and_no_text_are_refused():
    one = train_bpe([TEXT], 280)
    with pytest.raises(ConfigError, match=f"expected {MIN_STEPS} at least. Give"):
        score_tokenizer(one, [TEXT], {}, ComputeConfig(flops=1e8))
    with pytest.raises(ConfigError, match="must be above 0"):
        ComputeConfig(flops=0)
    with pytest.raises(DataError, match="no text to train on"):
        train_decoder(one, [""], SMALL, 2)


def test_rows_tell_languages_apart_and_are_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    known = {"code": train_bpe([TEXT], 400), "german": train_bpe([GERMAN * 9], 400)}
    texts = {"python": [TEXT], "German": [GERMAN]}
    rows = compare_tokenizers(known, texts)
    found = {(row["tokenizer"], row["on"]): row for row in rows}
    assert found["german", "German"]["fertility"] < found["code", "German"]["fertility"]
    assert found["code", "python"]["bytes_per_token"] > found["german", "python"]["bytes_per_token"]
    assert all(row["bits_per_byte"] is None for row in rows)
    sizes = []
    for trained in ((), [TEXT]):
        plot_comparison(compare_tokenizers(known, texts, training=trained, compute=SMALL), tmp_path / "plot.png")
        data = (tmp_path / "plot.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        sizes.append(struct.unpack(">II", data[16:24]))
    assert sizes[1][1] > sizes[0][1]  # bits per byte add a panel
    with pytest.raises(DataError, match="nothing to draw"):
        plot_comparison([], tmp_path / "plot.png")


def test_names_are_as_short_as_they_can_be(tmp_path: Path):
    for folder in ("a/x", "b/x", "b/y"):
        train_bpe([TEXT], 270).save(tmp_path / folder)
    paths = [tmp_path / folder for folder in ("a/x", "b/x", "b/y")]
    assert list(name_tokenizers(paths)) == [str(paths[0]), str(paths[1]), "y"]
    with pytest.raises(ConfigError, match="given twice"):
        name_tokenizers([paths[0], paths[0]])
