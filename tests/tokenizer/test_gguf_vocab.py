import os
from pathlib import Path

import pytest

import modelwright as mw
from modelwright.base.errors import CheckpointError, DataError
from modelwright.base.gguf_file import GgufFile, write_container
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.gguf_vocab import PATTERNS, gguf_vocab, read_gguf_tokenizer

DATA = Path(os.environ.get("MODELWRIGHT_DATA", "/nonexistent"))
VOCABULARIES = DATA / "tokenizers/gguf"
NAMES = ("bert-bge", "deepseek-coder", "falcon", "gpt-2", "llama-spm", "phi-3")
needs_data = pytest.mark.skipif(not VOCABULARIES.is_dir(), reason="MODELWRIGHT_DATA is not set")
SAMPLES = [
    "hello world",
    "",
    "  ",
    "a\n\n\nb  c",
    "x = {1: 'é'}\t# 12345",
    "吾輩は猫である 👩‍👩‍👧",
    "</s><|endoftext|>",
]


def expected(name: str) -> list[tuple[str, list[int]]]:
    """The test texts that stand beside a vocabulary and their ids."""
    file = VOCABULARIES / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{file}.inp").read_bytes().decode("utf-8").split("\n__ggml_vocab_test__\n")
    ids = [[int(number) for number in line.split()] for line in Path(f"{file}.out").read_text().split("\n")]
    assert len(texts) == len(ids) == 47
    return list(zip(texts, ids, strict=True))


@needs_data
@pytest.mark.parametrize("name", NAMES)
def test_published_vocabularies_give_the_ids_beside_them_also_after_writing(name: str, tmp_path: Path):
    first = mw.load_tokenizer(VOCABULARIES / f"ggml-vocab-{name}.gguf")
    write_container(tmp_path / "again.gguf", gguf_vocab(first), [])
    second = mw.load_tokenizer(tmp_path / "again.gguf")
    assert "tokenizer.huggingface.json" not in GgufFile(tmp_path / "again.gguf").metadata
    for tokenizer in (first, second):
        for text, ids in expected(name):
            assert tokenizer.encode(text, add_special_tokens=False) == ids, text
    assert second.encode_batch(SAMPLES) == first.encode_batch(SAMPLES)
    assert second.roles == first.roles
    assert second.chat_template == first.chat_template


@needs_data
def test_texts_never_become_special_tokens_and_come_back():
    for name in ("bert-bge", "deepseek-coder", "phi-3"):
        tokenizer = mw.load_tokenizer(VOCABULARIES / f"ggml-vocab-{name}.gguf")
        guarded = {i for text, i in tokenizer.special_ids.items() if text != tokenizer.roles.get("unk_token")}
        for text in list(tokenizer.special_ids)[:5]:
            ids = tokenizer.encode(f"a {text} b", add_special_tokens=False)
            assert not guarded & set(ids)
            if tokenizer.has_byte_pieces:
                assert tokenizer.decode(ids) == f"a {text} b"


@needs_data
@pytest.mark.peer
@pytest.mark.parametrize("name", ["bert-bge"])
def test_the_reference_package_reads_what_is_written(name: str, tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    source = VOCABULARIES / f"ggml-vocab-{name}.gguf"
    write_container(tmp_path / "x.gguf", gguf_vocab(mw.load_tokenizer(source)), [])
    ours, theirs = gguf.GGUFReader(tmp_path / "x.gguf").fields, gguf.GGUFReader(source).fields
    for key in ("model", "tokens", "token_type", "cls_token_id", "unknown_token_id"):
        assert ours[f"tokenizer.ggml.{key}"].contents() == theirs[f"tokenizer.ggml.{key}"].contents()
        assert ours[f"tokenizer.ggml.{key}"].types == theirs[f"tokenizer.ggml.{key}"].types


@needs_data
@pytest.mark.parametrize("name", ["tokenizers/sentencepiece/test_model.model", "weights/babyllama105/tok105.model"])
def test_sentencepiece_models_are_said_in_full(name: str, tmp_path: Path):
    first = mw.load_tokenizer(DATA / name)
    write_container(tmp_path / "x.gguf", gguf_vocab(first), [])
    assert "tokenizer.huggingface.json" not in GgufFile(tmp_path / "x.gguf").metadata
    again = mw.load_tokenizer(tmp_path / "x.gguf")
    texts = [*SAMPLES, *(DATA / "text/alice_in_wonderland.txt").read_text(encoding="utf-8").splitlines()[:300]]
    assert again.encode_batch(texts) == first.encode_batch(texts)
    assert again.decode(again.encode("a b")) == first.decode(first.encode("a b"))


def test_our_own_tokenizer_survives_although_its_rule_has_no_name(house: Tokenizer, tmp_path: Path, caplog):
    values = gguf_vocab(house)
    assert values["tokenizer.ggml.pre"] == "default"
    assert "no name for how this tokenizer cuts words" in caplog.text
    write_container(tmp_path / "x.gguf", values, [])
    again = mw.load_tokenizer(tmp_path / "x.gguf")
    assert again.encode_batch(SAMPLES) == house.encode_batch(SAMPLES)
    assert (again.roles, again.chat_template, again.eos_id) == (house.roles, house.chat_template, house.eos_id)


def test_foreign_tokenizers_survive(foreign: Tokenizer, tmp_path: Path):
    write_container(tmp_path / "x.gguf", gguf_vocab(foreign), [])
    again = mw.load_tokenizer(tmp_path / "x.gguf")
    assert again.encode_batch(SAMPLES) == foreign.encode_batch(SAMPLES)
    assert again.special_ids == foreign.special_ids


@pytest.mark.parametrize(("name", "patterns"), PATTERNS.items())
def test_every_pattern_compiles_and_loses_no_character(name: str, patterns: tuple[str, ...]):
    from tokenizers import Regex, pre_tokenizers

    text = "I'm 12345 THE'RE naïve\r\n\n  x+=1; 吾輩は猫である 한국어 <|a|> ￥! "
    cuts = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(p), behavior="isolated") for p in patterns])
    assert "".join(piece for piece, _ in cuts.pre_tokenize_str(text)) == text


def test_a_tokenizer_that_adds_what_gguf_cannot_say_is_written_whole(published: dict[str, Path], tmp_path: Path):
    first = mw.load_tokenizer(published["llama3"])
    assert first.added_ids() == ([0], [])
    strange = Tokenizer(first._backend, roles={"eos_token": "<|eot_id|>"})  # what is added in front has no role
    write_container(tmp_path / "x.gguf", gguf_vocab(strange), [])
    again = mw.load_tokenizer(tmp_path / "x.gguf")
    assert again.encode("a") == strange.encode("a") == first.encode("a")


BYTES = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
GOOD = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*BYTES, "ab", "<end>"],
    "tokenizer.ggml.token_type": [1] * 257 + [3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 257,
}


def test_a_small_vocabulary_by_hand(tmp_path: Path):
    write_container(tmp_path / "x.gguf", GOOD, [])
    tokenizer = read_gguf_tokenizer(tmp_path / "x.gguf")
    assert tokenizer.encode("ab") == [256]
    assert tokenizer.special_ids == {"<end>": 257}
    assert tokenizer.eos_id == 257


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "holds no vocabulary"),
        ({"tokens": [1, 2]}, "holds no vocabulary"),
        ({"model": "rwkv"}, "kind 'rwkv'"),
        ({"pre": "no-such-rule"}, "by the rule 'no-such-rule'.*qwen2"),
        ({"token_type": [1]}, "token_type does not have one entry"),
        ({"eos_token_id": 9999}, "eos_token_id is 9999"),
        ({"merges": ["a bbb"]}, "merge .'a', 'bbb'. joins tokens that are not there"),
        ({"merges": ["ab"]}, "merge .* joins"),
        ({"tokens": [*BYTES, "ab", "ab"]}, "a token stands twice"),
        ({"model": "llama", "scores": [0.0]}, "scores does not have one entry"),
        ({"model": "llama", "tokens": ["a"] * 258}, "holds the piece 'a' twice"),
        ({"model": "bert"}, r"has no \[CLS\]"),
        ({"add_bos_token": True}, "asks for a bos_token"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(tmp_path: Path, changes: dict, message: str):
    write_container(tmp_path / "x.gguf", GOOD | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}, [])
    with pytest.raises(DataError, match=message):
        mw.load_tokenizer(tmp_path / "x.gguf")


def test_damaged_files_and_bad_json_are_refused(tmp_path: Path):
    path = tmp_path / "x.gguf"
    write_container(path, GOOD | {"tokenizer.huggingface.json": "{"}, [])
    with pytest.raises(DataError, match=r"tokenizer\.huggingface\.json cannot be used"):
        mw.load_tokenizer(path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(CheckpointError, match="cut short|damaged"):
        mw.load_tokenizer(path)
