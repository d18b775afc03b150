"""T5: sharing, scaling, reading and writing. Parity with the reference is in test_parity.py."""

from dataclasses import replace

import pytest
import torch

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.models.t5 import T5, T5Config, T5Encoder
from modelwright.models.weights import load_model, save_model
from modelwright.nn.attention import record_attention
from modelwright.nn.init import init_weights

SMALL = T5Config(vocab_size=53, hidden_size=24, head_dim=8, intermediate_size=32, num_layers=2, num_heads=2)
GATED = replace(SMALL, act="gelu_new", is_gated=True, tie_embeddings=False, is_output_scaled=False)


def random_model(config: T5Config = SMALL, cls: type[T5Encoder] = T5) -> T5:
    model = init_weights(cls(config), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 53, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_one_table_of_biases_serves_all_layers_of_a_stack():
    model = random_model()
    assert sum(name.endswith("bias.embed.weight") for name, _ in model.named_parameters()) == 2
    ids, written = random_ids(1, 9), random_ids(1, 5)
    before = model(ids, written).logits
    with torch.no_grad():
        model.decoder.bias.embed.weight[3] += 1.0
    assert (model(ids, written).logits - before).abs().max() > 1e-3


def test_scores_are_not_scaled():
    model = random_model(cls=T5Encoder)
    with record_attention() as maps:
        model(random_ids(1, 6))
    x = model.encoder.layers[0].attention_norm(model.embed(random_ids(1, 6)))
    q, k = (getattr(model.encoder.layers[0].attention, n)(x).view(6, 2, 8).transpose(0, 1) for n in "qk")
    assert torch.allclose(maps[0][0], (q @ k.mT + model.encoder.bias(6, 6)[0]).softmax(-1), atol=1e-5)


def test_maps_come_self_before_cross_in_every_decoder_layer():
    model = random_model()
    with record_attention() as maps:
        model(random_ids(2, 9), random_ids(2, 5))
    assert [tuple(m.shape) for m in maps] == [(2, 2, 9, 9)] * 2 + [(2, 2, 5, 5), (2, 2, 5, 9)] * 2
    assert all(torch.allclose(m.sum(-1), torch.ones(m.shape[:-1]), atol=1e-5) for m in maps)


def test_padding_of_the_input_changes_nothing():
    model = random_model()
    ids, written = random_ids(1, 70), random_ids(1, 9)
    alone = model(ids, written).logits
    padded = torch.cat([ids, torch.zeros(1, 30, dtype=torch.long)], dim=1)
    mask = (torch.arange(100) < 70).long()[None]
    assert torch.allclose(model(padded, written, attention_mask=mask).logits, alone, atol=1e-5)
    assert not torch.allclose(model(padded, written).logits, alone, atol=1e-3)  # control: unmasked padding is seen


def test_the_input_is_read_once_and_its_keys_are_remembered():
    model = random_model()
    encoded, written = model.encode(random_ids(2, 11)), random_ids(2, 80)
    state = model.new_state(2)
    first = model.decode(written[:, :1], encoded, state=state)
    kept = {name: x.clone() for name, x in state.memory(1).items()}
    assert {name: tuple(x.shape) for name, x in kept.items()} == {"cross_k": (2, 11, 2, 8), "cross_v": (2, 11, 2, 8)}
    rest = [model.decode(written[:, i : i + 1], encoded, state=state) for i in range(1, 80)]
    assert all(torch.equal(x, state.memory(1)[name]) for name, x in kept.items())
    assert torch.allclose(torch.cat([first, *rest], dim=1), model.decode(written, encoded), atol=1e-4)


@pytest.mark.parametrize("config", [SMALL, GATED, replace(SMALL, num_decoder_layers=1, tie_embeddings=False)])
def test_saved_and_loaded_it_is_the_same(config, tmp_path):
    model = random_model(config)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    ids, written = random_ids(2, 9), random_ids(2, 5)
    assert torch.equal(again(ids, written).logits, model(ids, written).logits)


def test_the_encoder_alone_says_so_in_its_config(tmp_path):
    model = random_model(cls=T5Encoder)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert type(again) is T5Encoder
    assert torch.equal(again(random_ids(1, 7)).last_hidden_state, model(random_ids(1, 7)).last_hidden_state)


@pytest.mark.peer
def test_an_untied_export_is_read_untied_by_transformers(tmp_path):
    """Flan-T5's output matrix is its own; a reader that ties it computes something else."""
    transformers = pytest.importorskip("transformers")
    model = random_model(GATED)
    save_model(model, tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids, written = random_ids(2, 90), random_ids(2, 70)
    gap = model(ids, written).logits - theirs(input_ids=ids, decoder_input_ids=written).logits
    assert gap.abs().max() < 1e-4


def test_the_last_state_is_scaled_where_the_matrix_is_tied_and_not_otherwise():
    tied = T5Config.from_hf({"model_type": "t5"})
    flan = T5Config.from_hf({"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"})
    resaved = T5Config.from_hf({"tie_word_embeddings": True, "scale_decoder_outputs": False})
    assert (tied.is_output_scaled, flan.is_output_scaled, resaved.is_output_scaled) == (True, False, False)
    assert (flan.act, flan.is_gated, tied.act, tied.is_gated) == ("gelu_new", True, "relu", False)
    assert T5Config.from_hf({"feed_forward_proj": "gated-silu"}).to_hf()["feed_forward_proj"] == "gated-silu"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"is_decoder": True}, "is_decoder"),
        ({"feed_forward_proj": "odd-gelu"}, "feed_forward_proj"),
        ({"architectures": ["T5ForQuestionAnswering"]}, "T5ForQuestionAnswering"),
        ({"num_layers": 0}, "num_layers"),
        ({"relative_attention_num_buckets": 6}, "num_buckets"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        T5Config.from_hf(values)


def test_a_missing_tensor_is_named(tmp_path):
    save_model(random_model(cls=T5Encoder), tmp_path)
    config = (tmp_path / "config.json").read_text().replace("T5EncoderModel", "T5ForConditionalGeneration")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"decoder\.block\.0\.layer\.0"):
        load_model(tmp_path)


def test_fresh_weights_give_logits_of_the_size_of_a_uniform_guess():
    model = init_weights(T5(replace(SMALL, hidden_size=256, head_dim=64)), seed=0)
    logits = model(random_ids(4, 30), random_ids(4, 20)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), random_ids(4, 20, seed=1).flatten())
    assert abs(float(loss.detach()) - torch.tensor(53.0).log()) < 0.8


def learn_to_sort(is_shuffled: bool) -> float:
    """Train on digits to be sorted, 250 steps; return the share of right tokens on rows not seen."""
    generator = torch.Generator().manual_seed(1)
    config = replace(SMALL, vocab_size=10, hidden_size=48, head_dim=24, intermediate_size=96, num_layers=1)
    model = init_weights(T5(config), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(250):
        ids = torch.randint(4, 10, (32, 4), generator=generator)
        target = ids.sort(1).values[torch.randperm(32, generator=generator)] if is_shuffled else ids.sort(1).values
        written = torch.cat([torch.zeros(32, 1, dtype=torch.long), target[:, :-1]], dim=1)
        loss = torch.nn.functional.cross_entropy(model(ids, written).logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = torch.randint(4, 10, (64, 4), generator=generator)
    written = torch.cat([torch.zeros(64, 1, dtype=torch.long), ids.sort(1).values[:, :-1]], dim=1)
    with torch.no_grad():
        return float((model(ids, written).logits.argmax(-1) == ids.sort(1).values).float().mean())


def test_it_learns_to_sort_and_not_from_shuffled_answers():
    assert learn_to_sort(is_shuffled=False) > 0.8
    assert learn_to_sort(is_shuffled=True) < 0.6  # what counting first and last digits gives: 0.42
