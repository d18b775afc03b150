import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base.errors import ConfigError, DataError
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.byte_level import cut_text
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.tokenizer.special import SPECIAL_TOKENS
from modelwright.tokenizer.train import train_bpe

PIECES = [
    "<|",
    "|>",
    "im_end",
    "im_start",
    "endoftext",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "\n",
    " ",
    "▁",
    "é",
    "👩‍👩‍👧",
]
hostile = st.lists(st.sampled_from([*PIECES, *SPECIAL_TOKENS, "a", "user"]), max_size=12).map("".join)
any_text = st.one_of(st.text(), hostile)


@given(any_text)
@settings(max_examples=300, deadline=None)
def test_decode_gives_back_any_text(house: Tokenizer, text: str):
    ids = house.encode(text)
    assert house.decode(ids, skip_special_tokens=False) == text
    assert house.decode(ids) == text
    assert house.decode_bytes(ids) == text.encode("utf-8")
    assert sum(len(house.token_bytes(i)) for i in ids) == len(text.encode("utf-8"))


@given(any_text)
@settings(max_examples=200, deadline=None)
def test_text_never_becomes_a_special_token(house: Tokenizer, text: str):
    assert not set(house.special_ids.values()) & set(house.encode(text))


@given(st.lists(any_text, max_size=6))
@settings(max_examples=100, deadline=None)
def test_a_batch_gives_the_ids_of_each_text(house: Tokenizer, texts: list[str]):
    assert house.encode_batch(texts) == [house.encode(text) for text in texts]


@given(text=hostile)
@settings(max_examples=100, deadline=None)
def test_foreign_vocabularies_give_no_special_id_for_text(published: dict, text: str):
    for folder in published.values():
        tokenizer = cached(folder)
        guarded = set(tokenizer.special_ids.values()) - {tokenizer.special_ids.get("<unk>")}
        assert not guarded & set(tokenizer.encode(text, add_special_tokens=False))
        assert tokenizer.encode_batch([text, text]) == [tokenizer.encode(text)] * 2


_loaded: dict = {}


def cached(folder) -> Tokenizer:
    if folder not in _loaded:
        _loaded[folder] = load_tokenizer(folder)
    return _loaded[folder]


@given(text=st.text())
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("kind", ["llama2", "metaspace", "llama3"])
def test_foreign_vocabularies_give_back_any_text(published: dict, kind: str, text: str):
    tokenizer = cached(published[kind])
    if kind != "llama3":
        text = text.replace("▁", "_")  # SentencePiece spells the space so, and cannot tell the two apart
    if kind == "metaspace":
        text = text.lstrip(" ")  # it puts no space before one that is there, and takes one away when decoding
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_unigram_vocabulary_with_the_end_token_as_a_piece_is_guarded(published: dict):
    tokenizer = load_tokenizer(published["unigram"])
    plain = tokenizer._backend.encode("a</s>b", add_special_tokens=False).ids
    assert 1 in plain, "negative control: the library alone gives the special id"
    assert 1 not in tokenizer.encode("a</s>b", add_special_tokens=False)
    assert tokenizer.encode("a</s>b")[-1] == 1, "the post-processor's own stays"


@pytest.mark.parametrize("kind", ["llama2", "metaspace", "llama3"])
def test_the_post_processor_adds_bos_exactly_once(published: dict, kind: str):
    tokenizer = load_tokenizer(published[kind])
    for text in ("", "hello", "<s> hello", "<|begin_of_text|>"):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
        assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.encode_batch(["a", "b"])[1].count(tokenizer.bos_id) == 1


def test_the_house_tokenizer_adds_nothing(house: Tokenizer):
    assert house.bos_id is None
    assert house.encode("hello") == house.encode("hello", add_special_tokens=False)
    assert house.encode("") == []


@given(
    st.lists(st.one_of(st.text(max_size=5), st.sampled_from(["a b", "c\nd", "e, ", "吾輩。", "'s", " 12", "\n\n x"])))
)
@settings(max_examples=200, deadline=None)
def test_a_text_handed_over_in_pieces_has_the_ids_of_the_whole(house: Tokenizer, parts: list[str]):
    text = "".join(parts)
    pieces = cut_text(text, size=3)
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in house.encode(piece)] == house.encode(text)


def test_long_texts_are_handed_over_in_pieces(house: Tokenizer):
    text = "A fairly long line, without any newline at all. " * 5000
    whole = house._backend.encode(text, add_special_tokens=False).ids
    assert house.encode(text) == house.encode_batch([text, "b"])[0] == whole
    assert house.decode(house.encode("a" * 1_200_000)) == "a" * 1_200_000


def test_special_ids_and_stops(house: Tokenizer):
    assert house.special_ids == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (house.eos_id, house.pad_id, house.stop_ids) == (0, 0, (0, 2))
    assert house.vocab_size == 800
    assert house.token_bytes(2) == b"<|im_end|>"


def test_special_tokens_are_skipped_or_shown(house: Tokenizer):
    ids = [1, *house.encode("hi"), 2]
    assert house.decode(ids) == "hi"
    assert house.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"


def test_broken_bytes_become_replacement_characters(house: Tokenizer):
    ids = house.encode("é")[:1] if len(house.encode("é")) == 2 else house.encode("吾")[:1]
    assert house.decode(ids) == "\ufffd"
    assert len(house.decode_bytes(ids)) < 3


def test_ids_without_a_piece_stand_for_nothing(house: Tokenizer):
    assert house.token_bytes(house.vocab_size + 5) == b""
    assert house.decode([*house.encode("a"), house.vocab_size + 5]) == "a"
    with pytest.raises(DataError, match="-100 is negative"):
        house.token_bytes(-100)


@pytest.mark.parametrize("text", ["a\ud800b", 5, None])
def test_what_is_no_text_is_refused(house: Tokenizer, text):
    with pytest.raises(DataError, match="surrogate.*character 1|is a (int|NoneType); expected str"):
        house.encode(text)
    with pytest.raises(DataError):
        house.encode_batch(["fine", text])


def test_one_text_is_no_batch(house: Tokenizer):
    with pytest.raises(DataError, match="Call encode"):
        house.encode_batch("abc")


def test_a_tokenizer_without_eos_says_so():
    tokenizer = train_bpe(["hello"], 256, special_tokens=())
    assert tokenizer.stop_ids == ()
    with pytest.raises(ConfigError, match="names no eos_token"):
        _ = tokenizer.eos_id
    with pytest.raises(ConfigError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
