import json
import os
import subprocess
import sys

import pytest

from modelwright.base.errors import ConfigError, DataError
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.train import train_bpe

TRAIN = """
import sys, hashlib
from modelwright.tokenizer.train import train_bpe
texts = [open(f).read() for f in sys.argv[1:]]
print(hashlib.sha256(train_bpe(texts, 700)._backend.to_str().encode()).hexdigest())
"""


def test_training_is_deterministic_for_any_number_of_threads(tmp_path):
    files = []
    for number in range(3):
        file = tmp_path / f"{number}.txt"
        file.write_text("ab ba abab baba cd dc cdcd " * 50 + open(__file__, encoding="utf-8").read())
        files.append(str(file))
    hashes = set()
    for threads in ("1", "4"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true", "LC_ALL": "C"}
        run = subprocess.run([sys.executable, "-c", TRAIN, *files], env=environment, capture_output=True, check=True)
        hashes.add(run.stdout)
    assert len(hashes) == 1


def test_the_vocabulary_has_the_size_asked_for(house: Tokenizer):
    assert house.vocab_size == len(house._backend.get_vocab()) == 800
    assert sorted(house.token_bytes(i) for i in range(3, 259)) == [bytes([b]) for b in range(256)]


@pytest.mark.parametrize("specials", [("<|endoftext|>",), ("hello",), ("ab",), ("é",)])
def test_no_merge_makes_a_special_token(specials):
    texts = ["hello <|endoftext|> <|endoftext|> othello abba abab éé été hello"] * 20
    tokenizer = train_bpe(texts, 330, special_tokens=specials)
    merges = json.loads(tokenizer._backend.to_str())["model"]["merges"]
    made = {"".join(pair) for pair in merges}
    from modelwright.tokenizer.byte_level import spell

    for text in specials:
        assert text not in made and spell(text.encode()) not in made
        assert tokenizer.special_ids[text] not in tokenizer.encode(" ".join(texts))


def test_digits_stand_in_groups_of_two(house: Tokenizer):
    tokenizer = train_bpe(["2024 2025 2026 123456 1999"] * 100, 300)
    assert max(len(tokenizer.token_bytes(i)) for i in tokenizer.encode("123456 2024") if i > 258) <= 2


def test_merges_do_not_cross_words(house: Tokenizer):
    for index in range(259, house.vocab_size):
        piece = house.token_bytes(index).decode("utf-8", errors="ignore")
        assert not piece.strip() or " " not in piece.strip(), piece


@pytest.mark.parametrize(
    ("size", "specials", "message"),
    [
        (100, ("<|endoftext|>",), "vocab_size is 100; .* at least 257"),
        (300, ("a", "a"), "different, non-empty"),
        (300, ("",), "different, non-empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(size, specials, message):
    with pytest.raises(ConfigError, match=message):
        train_bpe(["text"], size, special_tokens=specials)


@pytest.mark.parametrize("texts", [[], ["", ""], ["<|endoftext|>"]])
def test_no_text_is_refused(texts):
    with pytest.raises(DataError, match="no text to learn"):
        train_bpe(texts, 300)


def test_too_little_text_gives_fewer_pieces_and_says_so(caplog):
    tokenizer = train_bpe(iter(["aa bb"]), 5000)
    assert tokenizer.vocab_size < 300
    assert "of the 5000 asked for" in caplog.text


def test_other_special_tokens_bring_no_template():
    tokenizer = train_bpe(["hello there"], 260, special_tokens=("<|endoftext|>", "<|x|>"))
    assert tokenizer.chat_template is None
    assert tokenizer.stop_ids == (0,)
