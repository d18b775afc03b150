import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.byte_level import spell
from modelwright.tokenizer.plain_bpe import PlainBPE, train_plain
from modelwright.tokenizer.train import train_bpe

TEXTS = [
    "low low low low low lower lower newest newest newest newest newest newest widest widest widest",
    "abab baba abba baab cdcd dcdc   \n\n tie tie eit eit 2024 2025 20 30 naïve café 名前はまだ無い 👩‍👩‍👧",
    open(__file__, encoding="utf-8").read(),
]


@pytest.fixture(scope="module")
def pair() -> tuple[Tokenizer, PlainBPE]:
    return train_bpe(TEXTS, 480), train_plain(TEXTS, 480)


def test_the_twin_learns_the_same_pieces_and_merges(pair):
    import json

    fast, plain = pair
    model = json.loads(fast._backend.to_str())["model"]
    assert [fast.token_bytes(i) for i in range(fast.vocab_size)] == plain.pieces
    spelled = [[spell(plain.pieces[a]), spell(plain.pieces[b])] for a, b in plain.merges]
    assert model["merges"] == spelled


@given(st.one_of(st.text(), st.text(alphabet="lowernstdiab 20\n'")))
@settings(max_examples=200, deadline=None)
def test_the_twin_gives_the_same_ids(pair, text: str):
    fast, plain = pair
    assert plain.encode(text) == fast.encode(text)
    assert plain.decode(plain.encode(text)) == text


def test_ties_go_to_the_lower_ids():
    plain = train_plain(["ba ab"], 259 + 1)
    assert plain.pieces[-1] == b"ab"  # "ab" and "ba" occur once each
    assert train_bpe(["ba ab"], 260).token_bytes(259) == b"ab"


def test_training_stops_when_nothing_is_left():
    assert len(train_plain(["a b"], 1000).pieces) == len(train_bpe(["a b"], 1000).special_ids) + 256 + 1
