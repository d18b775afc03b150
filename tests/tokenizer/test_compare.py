import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from modelwright.base.errors import DataError
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.compare import audit, bytes_per_token, measure
from modelwright.tokenizer.train import train_bpe


def test_raw_bytes_give_one_and_merges_give_more(house: Tokenizer):
    text = "the quick brown fox; the parser's argument, für alle"
    assert bytes_per_token(train_bpe([text], 259), [text]) == 1.0
    assert bytes_per_token(house, [text]) > 1.5


def test_nothing_to_measure_is_refused(house: Tokenizer):
    with pytest.raises(DataError, match="no text to measure"):
        bytes_per_token(house, ["", ""])


def test_fertility_is_tokens_per_word():
    share = measure(train_bpe(["ab ab"], 259), ["ab ab"])
    assert (share.num_tokens, share.bytes_per_token, share.fertility) == (5, 1.0, 2.5)


def test_the_audit_finds_what_was_planted_and_nothing_in_a_sound_vocabulary(house: Tokenizer):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, "ab", "xyz"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    found = audit(Tokenizer(backend, roles={}))
    assert found.unreachable == [257]  # no merge makes "xyz"
    assert len(found.invalid_utf8) == 128 and found.duplicates == []
    assert audit(house).unreachable == [] and audit(house).duplicates == []


def test_pieces_inside_words_and_behind_a_space_are_reached(foreign: Tokenizer):
    found = audit(foreign)
    assert len(found.unreachable) < 0.2 * foreign.vocab_size and found.vocab_size == foreign.vocab_size
