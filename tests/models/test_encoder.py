"""What holds for every encoder family and every head: folders, first weights, attention maps, backends, bad configs."""

import re
from pathlib import Path

import pytest
import torch

from modelwright.base.errors import ConfigError, RequestError
from modelwright.models import bert, bigbird, deberta, longformer, modernbert, roberta
from modelwright.models.encoder import token_mask
from modelwright.models.sentence import SentenceEncoder, save_sentence_encoder
from modelwright.models.weights import load_model, save_model
from modelwright.nn.attention import record_attention, use_backend
from modelwright.nn.init import init_weights

SIZES = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 4}
CONFIGS = {
    "bert": bert.BertConfig(**SIZES, max_seq_len=96),
    "roberta": roberta.RobertaConfig(**SIZES, max_seq_len=96),
    "modernbert": modernbert.ModernBertConfig(**SIZES, max_seq_len=96, local_attention=12, pad_token_id=0),
    "deberta": deberta.DebertaConfig(
        **SIZES, max_seq_len=96, distance=deberta.DistanceConfig(num_buckets=8, is_shared=True, has_norm=True)
    ),
    "longformer": longformer.LongformerConfig(**SIZES, max_seq_len=96, attention_window=(12,)),
    "bigbird": bigbird.BigBirdConfig(**SIZES, max_seq_len=96, block_size=4, num_random_blocks=2, sep_token_id=2),
}
ROOMS = {
    "bert": bert,
    "roberta": roberta,
    "modernbert": modernbert,
    "deberta": deberta,
    "longformer": longformer,
    "bigbird": bigbird,
}
# xlm-roberta differs from roberta by its name alone.
EVERY = [(f, name) for f in CONFIGS for name in ROOMS[f].ARCHITECTURES if not name.startswith("XLM")]
EVERY_ENCODER = [(f, name) for f, name in EVERY if name.endswith("Model")]


def make(family: str, name: str, seed: int = 0) -> torch.nn.Module:
    model = init_weights(ROOMS[family].ARCHITECTURES[name](CONFIGS[family]), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def make_ids(length: int = 60) -> torch.Tensor:
    ids = torch.randint(10, 53, (2, length), generator=torch.Generator().manual_seed(0))
    ids[:, 20] = 2
    return ids


def right_padding(length: int = 60) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, 41:] = 0
    return mask


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_a_folder_gives_back_the_same_model(family, name, tmp_path):
    model = make(family, name)
    save_model(model, tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    again = load_model(tmp_path)
    assert type(again) is type(model) and again.config == model.config
    for mine, other in zip(model(make_ids()), again(make_ids()), strict=True):
        assert (mine is None and other is None) or torch.equal(mine, other)


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_every_parameter_gets_a_first_value(family, name):
    model = ROOMS[family].ARCHITECTURES[name](CONFIGS[family])
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    init_weights(model, seed=3)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(torch.isfinite(out).all() for out in model(make_ids()) if out is not None)


@pytest.mark.parametrize(("family", "name"), EVERY_ENCODER)
def test_attention_maps_and_what_they_leave_unchanged(family, name):
    model, ids, mask = make(family, name), make_ids(), right_padding()
    with torch.no_grad():
        before = model(ids, attention_mask=mask).last_hidden_state
        with record_attention() as maps:
            during = model(ids, attention_mask=mask).last_hidden_state
    assert len(maps) == 3
    for weights in maps:
        assert weights.shape == (2, 4, 60, 60)
        assert (weights[0].sum(-1) - 1).abs().max() < 1e-5
        assert weights[1, :, :41, 41:].abs().max() == 0  # nobody looks at padding
    assert (before - during)[mask.bool()].abs().max() < 1e-5


@pytest.mark.parametrize(("family", "name"), EVERY_ENCODER)
@pytest.mark.parametrize("backend", ["plain", "flash"])
def test_backends_agree(family, name, backend):
    model, ids, mask = make(family, name), make_ids(), right_padding()
    with torch.no_grad():
        auto = model(ids, attention_mask=mask).last_hidden_state
        with use_backend(backend):
            other = model(ids, attention_mask=mask).last_hidden_state
    assert (auto - other)[mask.bool()].abs().max() < 1e-5


@pytest.mark.parametrize(("family", "name"), EVERY_ENCODER)
def test_padding_changes_no_token_and_gives_numbers(family, name):
    model, ids = make(family, name), make_ids()
    pad = CONFIGS[family].pad_token_id
    mask = right_padding()
    padded = ids.masked_fill(mask == 0, pad)
    with torch.no_grad():
        out = model(padded, attention_mask=mask).last_hidden_state
        other = model(padded.masked_fill(mask == 0, 7), attention_mask=mask).last_hidden_state
        nothing = model(padded, attention_mask=torch.zeros_like(mask)).last_hidden_state
    assert torch.isfinite(out).all() and torch.isfinite(nothing).all()
    assert (out - other)[mask.bool()].abs().max() < 1e-5


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_packed_documents_are_apart(family):
    model, ids = make(family, EVERY_ENCODER[list(CONFIGS).index(family)][1]), make_ids()
    first, second = ids[:1, :25], ids[1:, :35]
    start = CONFIGS[family].pad_token_id + 1 if family == "roberta" else 0
    positions = torch.cat((torch.arange(25), torch.arange(35)))[None] + start
    document = torch.tensor([0] * 25 + [1] * 35)
    mask = (document[:, None] == document)[None, None]
    with torch.no_grad():
        packed = model(torch.cat((first, second), dim=1), positions=positions, mask=mask).last_hidden_state
        alone = torch.cat([model(x).last_hidden_state for x in (first, second)], dim=1)
        mixed = model(torch.cat((first, second), dim=1), positions=positions).last_hidden_state
    assert (packed - alone).abs().max() < 1e-5
    assert (mixed - alone).abs().max() > 1e-3


@pytest.mark.parametrize("family", CONFIGS)
def test_configs_go_to_json_and_back_and_refuse_contradictions(family):
    config_class = type(CONFIGS[family])
    assert config_class.from_hf(CONFIGS[family].to_hf()) == CONFIGS[family]
    heads = {"num_attention_heads": 5}
    with pytest.raises(ConfigError, match="num_heads is 5"):
        config_class.from_hf(CONFIGS[family].to_hf() | heads)
    with pytest.raises(ConfigError, match="num_layers is 0"):
        config_class.from_hf(CONFIGS[family].to_hf() | {"num_hidden_layers": 0, "layer_types": []})
    with pytest.raises(ConfigError, match="activation is 'mish'"):
        config_class.from_hf(CONFIGS[family].to_hf() | {"hidden_act": "mish", "hidden_activation": "mish"})


@pytest.mark.parametrize(("family", "name"), EVERY_ENCODER)
def test_more_tokens_than_positions_are_refused(family, name):
    with pytest.raises(RequestError, match="97 tokens; this encoder reads at most 96"):
        make(family, name)(make_ids(97))


def test_a_row_of_nothing_but_padding_sees_all_of_it():
    seen = token_mask(torch.tensor([[1, 0], [0, 0]]))
    assert seen.tolist() == [[[[True, False]]], [[[True, True]]]]
    assert token_mask(None) is None


def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")
    config = bert.BertConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4)
    save_model(init_weights(bert.ARCHITECTURES["BertForMaskedLM"](config), 0), tmp_path / "bert")
    encoder = init_weights(bert.Bert(config), 0)
    save_sentence_encoder(SentenceEncoder(encoder), tmp_path / "sentences")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(examples) == 4
    for example in examples:
        exec(example, {})
    assert (tmp_path / "bert_again" / "model.safetensors").is_file()
