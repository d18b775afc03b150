import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from modelwright.tokenizer.merges import count_words
from modelwright.tokenizer.wordpiece import PlainWordPiece, train_plain_wordpiece, wordpiece_alphabet

SOURCE = open(__file__, encoding="utf-8").read()
SPECIALS = ("[PAD]", "[UNK]", "[CLS]")


def cut(text: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)]


def library(text: str, vocab_size: int, min_frequency: int = 0) -> tuple[tokenizers.Tokenizer, list[str]]:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(SPECIALS), show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    vocabulary = backend.get_vocab()
    return backend, sorted(vocabulary, key=vocabulary.__getitem__)


@pytest.mark.parametrize(("vocab_size", "min_frequency"), [(300, 0), (500, 0), (1000, 2)])
def test_given_the_librarys_order_of_the_alphabet_the_vocabulary_is_the_same(vocab_size: int, min_frequency: int):
    counts = count_words([SOURCE], cut)
    _, pieces = library(SOURCE, vocab_size, min_frequency)
    size = len(wordpiece_alphabet(counts))
    alphabet = pieces[len(SPECIALS) :][:size]
    assert sorted(alphabet) == sorted(wordpiece_alphabet(counts))
    plain = train_plain_wordpiece(counts, vocab_size, SPECIALS, min_frequency=min_frequency, alphabet=alphabet)
    assert plain.pieces == pieces


def test_the_same_text_gives_the_same_vocabulary_and_without_ties_the_librarys():
    clear = {"lot": 9, "low": 5, "slow": 2}
    _, pieces = library(" ".join(word for word, count in clear.items() for _ in range(count)), 12)
    assert sorted(train_plain_wordpiece(clear, 12, SPECIALS).pieces) == sorted(pieces)
    counts = count_words([SOURCE], cut)
    plain = train_plain_wordpiece(counts, 300, SPECIALS)
    assert plain.pieces == train_plain_wordpiece(dict(reversed(counts.items())), 300, SPECIALS).pieces


@pytest.fixture(scope="module")
def pair() -> tuple[tokenizers.Tokenizer, PlainWordPiece]:
    backend, pieces = library(SOURCE, 400)
    backend.encode_special_tokens = True
    return backend, PlainWordPiece(pieces)


@given(st.one_of(st.text(), st.text("abdeforstu_ (#[]", max_size=60), st.just("a" * 101), st.just("e" * 100)))
@settings(max_examples=300, deadline=None)
def test_the_twin_gives_the_same_ids(pair, text: str):
    backend, plain = pair
    assert plain.encode(cut(text)) == backend.encode(text, add_special_tokens=False).ids


def test_where_nothing_fits_the_whole_word_is_unknown():
    plain = PlainWordPiece(["[UNK]", "a", "##b"])
    assert plain.encode_word("abb") == [1, 2, 2]
    assert plain.encode_word("abc") == plain.encode_word("b") == [0]


def test_the_longest_piece_wins_even_where_it_leads_nowhere():
    plain = PlainWordPiece(["[UNK]", "ab", "a", "##bc"])
    assert plain.encode_word("abc") == [0]  # "ab" first; a ##bc would have fitted
    assert json.dumps(plain.encode_word("ab")) == "[1]"
