import pytest

from modelwright.base.errors import DataError
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.compare import bytes_per_token
from modelwright.tokenizer.train import train_bpe


def test_raw_bytes_give_one_and_merges_give_more(house: Tokenizer):
    text = "the quick brown fox; the parser's argument, für alle"
    assert bytes_per_token(train_bpe([text], 259), [text]) == 1.0
    assert bytes_per_token(house, [text]) > 1.5


def test_nothing_to_measure_is_refused(house: Tokenizer):
    with pytest.raises(DataError, match="no text to measure"):
        bytes_per_token(house, ["", ""])
