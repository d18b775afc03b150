from modelwright.tokenizer.byte_level import BYTE_TO_CHAR, spell, unspell


def test_the_alphabet_is_the_one_of_the_library():
    from tokenizers import pre_tokenizers

    assert sorted(BYTE_TO_CHAR.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    everything = bytes(range(256))
    assert unspell(spell(everything)) == everything
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(" é\n")
    assert pieces[0][0] == spell(" é\n".encode())


def test_added_tokens_are_their_own_text():
    assert unspell("<｜end▁of▁sentence｜>") == "<｜end▁of▁sentence｜>".encode()
