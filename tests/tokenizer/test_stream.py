import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.tokenizer.stream import StreamDecoder


def stream(tokenizer: Tokenizer, ids: list[int], **options) -> list[str]:
    decoder = StreamDecoder(tokenizer, **options)
    return [*map(decoder.push, ids), decoder.finish()]


@given(st.text(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_pieces_of_a_text_are_whole_characters(house: Tokenizer, text: str, skip: bool):
    pieces = stream(house, house.encode(text), skip_special_tokens=skip)
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 810), max_size=30), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_ids_stream_to_what_decode_gives(house: Tokenizer, ids: list[int], skip: bool):
    assert "".join(stream(house, ids, skip_special_tokens=skip)) == house.decode(ids, skip_special_tokens=skip)


def test_foreign_vocabularies_stream_to_what_decode_gives(foreign: Tokenizer):
    chance = random.Random(0)
    for length in (0, 1, 2, 5, 40):
        for _ in range(60):
            ids = [chance.randrange(foreign.vocab_size) for _ in range(length)]
            for skip in (True, False):
                pieces = stream(foreign, ids, skip_special_tokens=skip)
                assert "".join(pieces) == foreign.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.parametrize("kind", ["llama2", "metaspace"])
def test_sentencepiece_loses_the_space_in_front_once(published: dict, kind: str):
    tokenizer = load_tokenizer(published[kind])
    for text in ("hello world", "two  three", "👩‍👩‍👧 é"):
        assert "".join(stream(tokenizer, tokenizer.encode(text))) == text


def test_every_kind_of_character_comes_whole_byte_by_byte(house: Tokenizer):
    """Each 23rd of the 1,112,064 scalar values, one token a byte: a character is shown with its last byte."""
    single = {house.token_bytes(i): i for i in range(house.vocab_size) if len(house.token_bytes(i)) == 1}
    decoder = StreamDecoder(house)
    for value in range(1, 0x110000, 23):
        if not 0xD800 <= value < 0xE000:
            data = chr(value).encode()
            shown = [decoder.push(single[data[i : i + 1]]) for i in range(len(data))]
            assert shown == [*[""] * (len(data) - 1), chr(value)], hex(value)
    assert decoder.finish() == ""


def test_an_unfinished_character_is_told_at_the_end(house: Tokenizer):
    first = next(i for i in range(house.vocab_size) if house.token_bytes(i) == b"\xf0")
    decoder = StreamDecoder(house)
    assert decoder.push(first) == ""
    assert decoder.finish() == "\ufffd"


def test_wordpiece_streams_too(tmp_path):
    import tokenizers
    from tokenizers import decoders, models

    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "now": 3}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(prefix="##")
    tokenizer = Tokenizer(backend, roles={"unk_token": "[UNK]"})
    assert stream(tokenizer, [1, 2, 3]) == ["play", "ing", " now", ""]
    assert tokenizer.token_bytes(2) == b"ing"
