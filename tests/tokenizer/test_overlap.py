"""Which tokens two vocabularies share, and how the others are spelled."""

from pathlib import Path

import pytest

from modelwright.base.errors import ConfigError
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.tokenizer.overlap import find_overlap, spell_bytes
from modelwright.tokenizer.subwords import train_unigram, train_wordpiece
from modelwright.tokenizer.train import train_bpe

TEXT = "the cat sat on the mat, and the dog sat on the log; a dog is no cat. " * 8


def check(old: Tokenizer, new: Tokenizer) -> None:
    """Every new id is in one part, shared ones say the same bytes, and a spelling says what the token says."""
    overlap = find_overlap(old, new)
    parts = [*overlap.shared, *overlap.spelled, *overlap.strange]
    assert sorted(parts) == list(range(new.vocab_size))
    special = set(new.special_ids.values())
    for index, other in overlap.shared.items():
        assert index in special or new.token_bytes(index) == old.token_bytes(other)
    for index, ids in overlap.spelled.items():
        assert b"".join(map(old.token_bytes, ids)) == new.token_bytes(index) and len(ids) > 1


def test_a_vocabulary_shares_everything_with_itself(house: Tokenizer):
    overlap = find_overlap(house, house)
    assert dict(overlap.shared) == {i: i for i in range(house.vocab_size)} and not overlap.spelled


def test_every_kind_is_told_in_every_other(house: Tokenizer, published: dict[str, Path]):
    kinds = [house, train_unigram([TEXT], 400), *(load_tokenizer(published[k]) for k in ("llama2", "metaspace"))]
    for old in kinds:
        for new in kinds:
            check(old, new)


def test_special_tokens_are_found_by_text_and_else_by_part(house: Tokenizer, published: dict[str, Path]):
    foreign = load_tokenizer(published["llama2"])
    overlap = find_overlap(house, foreign)
    assert overlap.shared[foreign.eos_id] == house.eos_id  # </s> and <|endoftext|>
    assert foreign.bos_id in overlap.strange  # the house has none
    other = train_bpe([TEXT], 300, ["<|x|>", "<|im_end|>", "<|endoftext|>"])
    found = find_overlap(house, other)
    assert found.shared[1] == house.special_ids["<|im_end|>"] and 0 in found.strange


def test_parts_of_characters_and_pieces_behind_spaces_are_spelled(published: dict[str, Path], house: Tokenizer):
    for one in (house, load_tokenizer(published["llama2"]), load_tokenizer(published["metaspace"])):
        for piece in (b"zqx", b" zqx", b"\xe7\x8c", b"\xc3\xa9", b" \xe7\x8c"):
            assert b"".join(map(one.token_bytes, spell_bytes(one, [piece])[0])) == piece


def test_wordpiece_is_refused(house: Tokenizer):
    with pytest.raises(ConfigError, match="WordPiece"):
        find_overlap(house, train_wordpiece([TEXT], 100))
