import gzip
import os
import struct
import zipfile
from pathlib import Path

import pytest

import modelwright as mw
from modelwright.base.errors import DataError
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    PieceModel,
    build_tokenizer,
    read_sentencepiece,
    to_piece_model,
    write_sentencepiece,
)
from modelwright.tokenizer.stream import StreamDecoder

DATA = Path(os.environ.get("MODELWRIGHT_DATA", "/nonexistent"))
ODD = [
    "",
    " ",
    "  two  spaces ",
    "a \n\n  b  \n",
    "tab\there\nnew",
    "▁odd",
    "naïve ﬁ ① ｆｕｌｌ",
    "é 👩‍👩‍👧 x\u200by\u3000z",
]
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="MODELWRIGHT_DATA is not set")


@pytest.fixture(scope="session")
def many_texts() -> list[str]:
    """Three lines of every language of the UDHR, some English, and oddities."""
    texts = list(ODD)
    with zipfile.ZipFile(DATA / "text/nltk/udhr2.zip") as archive:
        for name in archive.namelist():
            if name.endswith(".txt"):
                lines = archive.read(name).decode("utf-8", errors="replace").splitlines()
                texts += [line for line in lines if line][3:6]
    with gzip.open(DATA / "text/botchan.txt.gz", "rt", encoding="utf-8") as handle:
        texts += handle.read().splitlines()[:200]
    return texts


@needs_data
@pytest.mark.peer
@pytest.mark.parametrize("name", ["tokenizers/sentencepiece/test_model.model", "weights/babyllama105/tok105.model"])
def test_published_models_give_the_librarys_ids(name: str, many_texts: list[str], tmp_path: Path):
    peer = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(DATA / name))
    ours = mw.load_tokenizer(DATA / name)
    assert ours.vocab_size == peer.vocab_size()
    assert ours.encode_batch(many_texts) == [peer.encode(text) for text in many_texts]
    assert (ours.bos_id, ours.eos_id) == (peer.bos_id(), peer.eos_id())
    # The same after our own tokenizer.json, and after writing a model file that the library reads.
    ours.save(tmp_path)
    assert mw.load_tokenizer(tmp_path).encode_batch(many_texts) == ours.encode_batch(many_texts)
    write_sentencepiece(ours, tmp_path / "again.model")
    again = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(tmp_path / "again.model"))
    assert [again.encode(text) for text in many_texts] == [peer.encode(text) for text in many_texts]
    assert mw.load_tokenizer(tmp_path / "again.model").encode_batch(many_texts) == ours.encode_batch(many_texts)


@needs_data
@pytest.mark.peer
@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True},
        {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False, "add_dummy_prefix": False},
        {"model_type": "bpe", "user_defined_symbols": ["<sep>", "ing"], "split_by_whitespace": False},
        {"model_type": "unigram", "byte_fallback": True},
        {"model_type": "unigram", "user_defined_symbols": ["<sep>"], "normalization_rule_name": "nfkc_cf", "pad_id": 3},
    ],
)
def test_models_of_every_kind_give_the_librarys_ids(options: dict, many_texts: list[str], tmp_path: Path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(many_texts[-200:]),
        model_prefix=str(tmp_path / "m"),
        vocab_size=420,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ours = mw.load_tokenizer(tmp_path / "m.model")
    texts = [*many_texts, "going<sep>on <sep> and<sep>"]
    assert ours.encode_batch(texts) == [peer.encode(text) for text in texts]
    write_sentencepiece(ours, tmp_path / "again.model")
    again = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "again.model"))
    assert [again.encode(text) for text in texts] == [peer.encode(text) for text in texts]
    if options.get("byte_fallback"):
        lossless = [t for t in texts if "  " not in t and t == t.strip() and "▁" not in t]
        assert [ours.decode(ours.encode(t)) for t in lossless] == [peer.decode(peer.encode(t)) for t in lossless]


def letters(kind: str, **changes: object) -> Tokenizer:
    """A hand-made vocabulary: control pieces, all bytes, "a" to "z", a few joint pieces, one user-defined piece."""
    made = [("ab", -1.0), ("abc", -2.0), ("▁ab", -0.5), ("bc", -3.0)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁<>/|abcs", *(p for p, _ in made), "@@"]
    types = [UNKNOWN, CONTROL, CONTROL, *[6] * 256, *[NORMAL] * 13, USER_DEFINED]
    scores = [0.0] * 259 + [-9.0] * 9 + [score for _, score in made] + [0.0]
    model = PieceModel(
        kind=kind,  # type: ignore[arg-type]
        pieces=pieces,
        scores=scores,
        types=types,
        roles={"unk_token": 0, "bos_token": 1, "eos_token": 2},
        **changes,  # type: ignore[arg-type]
    )
    return build_tokenizer(model, "test", add_bos=True)


def spelled(tokenizer: Tokenizer, text: str) -> list[bytes]:
    return [tokenizer.token_bytes(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def test_bpe_joins_the_neighbours_whose_piece_scores_best():
    assert spelled(letters("bpe"), "abc") == [b" ab", b"c"]  # not " ", "abc": "▁ab" scores above "abc"
    assert spelled(letters("bpe", add_dummy_prefix=False), "abc abc") == [b"abc", b" ab", b"c"]
    assert spelled(letters("bpe"), "a@@b@@@") == [b" ", b"a", b"@@", b"b", b"@@", b"@"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_text_never_becomes_a_control_piece(kind: str):
    tokenizer = letters(kind)
    for text in ("<s>", "</s>", "a</s>b<s>", "<unk>", "<0x41>"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a")[0] == 1


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_streaming_is_exact_on_bytes(kind: str):
    tokenizer = letters(kind)
    for text in ("héllo 👩‍👩‍👧 abc", " abc", "吾輩は猫である"):
        ids = tokenizer.encode(text)
        stream = StreamDecoder(tokenizer)
        parts = [stream.push(i) for i in ids]
        assert "".join(parts) + stream.finish() == tokenizer.decode(ids) == text
        assert all("\ufffd" not in part for part in parts)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_vocabulary_is_written_and_read_back(kind: str, tmp_path: Path):
    tokenizer = letters(kind)
    write_sentencepiece(tokenizer, tmp_path / "m.model")
    model = read_sentencepiece(tmp_path / "m.model")
    assert model.kind == kind
    assert model.types == to_piece_model(tokenizer).types
    assert model.roles == {"unk_token": 0, "bos_token": 1, "eos_token": 2}
    again = mw.load_tokenizer(tmp_path / "m.model")
    texts = [*ODD, "abcabc ab@@c", "</s>"]
    assert again.encode_batch(texts, False) == tokenizer.encode_batch(texts, False)


def test_a_folder_with_only_a_model_file_is_read_with_its_config(tmp_path: Path):
    write_sentencepiece(letters("bpe"), tmp_path / "tokenizer.model")
    assert mw.load_tokenizer(tmp_path).encode("ab") == [269 + 1]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "chat_template": "T"}')
    tokenizer = mw.load_tokenizer(tmp_path)
    assert tokenizer.encode("ab") == [1, 270]
    assert tokenizer.chat_template == "T"


def test_byte_level_is_refused(house: Tokenizer, tmp_path: Path):
    with pytest.raises(DataError, match="rules that a SentencePiece model cannot say"):
        write_sentencepiece(house, tmp_path / "m.model")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_named(tmp_path: Path):
    path = tmp_path / "m.model"
    write_sentencepiece(letters("unigram"), path)
    data = path.read_bytes()
    for length in [*range(5, 100), *range(100, len(data) - 100, 37)]:
        path.write_bytes(data[:length])
        try:
            read_sentencepiece(path)  # whole pieces may be left
        except DataError as error:
            assert "m.model" in str(error)
    for broken in (
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0a\x04\x0a\x7fab",
        b"\x0b",
        b"\x0a\x03\x0a\x01\xff",
    ):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"m\.model is not a SentencePiece model, or damaged"):
            read_sentencepiece(path)
    path.write_bytes(data + b"\x12\x02\x18\x03")  # a second trainer_spec: type 3, words
    with pytest.raises(DataError, match="type 3"):
        read_sentencepiece(path)
    path.write_bytes(data + struct.pack("<BBBBB", 0x12, 3, 0xC0, 0x01, 1))
    with pytest.raises(DataError, match="whitespace as a suffix"):
        read_sentencepiece(path)
    path.write_bytes(b"hello, this is text")
    with pytest.raises(DataError, match="no tokenizer that is read here"):
        mw.load_tokenizer(path)


def test_a_piece_that_stands_twice_is_refused():
    with pytest.raises(DataError, match="m holds the piece 'a' twice, as 0 and 1"):
        build_tokenizer(PieceModel("bpe", ["a", "a"], [0.0, 0.0], [1, 1]), "m")


@needs_data
@pytest.mark.peer
def test_a_vocabulary_of_32_000_pieces_gives_the_librarys_ids(many_texts: list[str], tmp_path: Path):
    sentencepiece = pytest.importorskip("sentencepiece")
    ours = mw.load_tokenizer(DATA / "tokenizers/gguf/ggml-vocab-llama-spm.gguf")
    write_sentencepiece(ours, tmp_path / "llama.model")
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "llama.model"))
    assert peer.vocab_size() == 32000
    assert ours.encode_batch(many_texts, False) == [peer.encode(text) for text in many_texts]
