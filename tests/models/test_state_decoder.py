"""Mamba, Mamba-2, RWKV and the hybrid: split, packed, padded, exported, and against the reference's own cache.

Logits, gradients, padding, packing and export against transformers are held by tests/models/test_parity.py.
"""

from dataclasses import replace

import pytest
import torch

from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.hybrid import Hybrid, HybridConfig
from modelwright.models.layout import pack
from modelwright.models.mamba import Mamba, MambaConfig
from modelwright.models.mamba2 import Mamba2, Mamba2Config
from modelwright.models.rwkv import Rwkv, RwkvConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.attention import record_attention
from modelwright.nn.init import init_weights
from modelwright.nn.ssd import SsdShape
from modelwright.optim.build import OptimizerConfig, make_optimizer

SHAPE = SsdShape(num_heads=8, head_dim=8, state_size=8, num_groups=2, chunk_size=16)
HYBRID = HybridConfig(101, 32, 64, 4, (1, 3), num_heads=4, num_kv_heads=2, mixer=SHAPE, max_seq_len=256)
MODELS = {
    "mamba": (Mamba, MambaConfig(101, 32, 2, state_size=8)),
    "mamba, biases": (Mamba, MambaConfig(101, 32, 2, state_size=8, bias=True, step_rank=3, tie_embeddings=False)),
    "mamba2": (Mamba2, Mamba2Config(101, 32, 2, mixer=SHAPE)),
    "mamba2, limits": (Mamba2, Mamba2Config(101, 32, 2, mixer=replace(SHAPE, step_limit=(0.01, 0.5)), bias=True)),
    "rwkv": (Rwkv, RwkvConfig(101, 32, 3)),
    "rwkv, wide": (Rwkv, RwkvConfig(101, 32, 2, attention_size=48, intermediate_size=80, tie_embeddings=True)),
    "hybrid": (Hybrid, HYBRID),
    "hybrid, all recurrence": (Hybrid, replace(HYBRID, attention_layers=())),
    "hybrid, all attention": (Hybrid, replace(HYBRID, attention_layers=(0, 1, 2, 3), num_kv_heads=None)),
    "hybrid, attention first": (Hybrid, replace(HYBRID, attention_layers=(0,), mixer_bias=True, rotary_fraction=1.0)),
}


def random_model(name: str, seed: int = 0):
    """A model whose every parameter is away from its first value."""
    kind, config = MODELS[name]
    model = init_weights(kind(config), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.15 * torch.randn(p.shape, generator=generator)
    return model.eval()


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 101, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=MODELS)
def model(request):
    return random_model(request.param)


def test_any_split_equals_the_whole_and_the_past_matters(model):
    ids = random_ids(2, 90)
    with torch.no_grad():
        whole = model(ids).logits
        for pieces in ([40, 1, 1, 20, *[1] * 28], [1, 89], [30, 60]):
            state = model.new_state(batch_size=2)
            parts = [model(piece, state=state).logits for piece in ids.split(pieces, dim=1)]
            assert state.length == 90
            assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-4
        changed = ids.clone()
        changed[:, 80] = (ids[:, 80] + 1) % 101
        assert (model(changed).logits[:, -1] - whole[:, -1]).abs().max() > 1e-3  # negative control


def test_packed_documents_equal_separate_ones(model):
    ids = random_ids(1, 70)
    cuts = [30, 1, 39]
    positions = torch.cat([torch.arange(n) for n in cuts])[None]
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(cuts))
    mask = (document[:, None] == document)[None, None]
    with torch.no_grad():
        packed = model(ids, positions=positions, mask=mask).logits
        alone = torch.cat([model(part).logits for part in ids.split(cuts, dim=1)], dim=1)
        assert (packed - alone).abs().max() < 1e-4
        assert (model(ids).logits - alone).abs().max() > 1e-2  # negative control


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_rows_alone(model, side):
    ids, mask = random_ids(3, 60), torch.zeros(3, 60, dtype=torch.long)
    for row, length in enumerate((40, 60, 7)):
        mask[row, slice(0, length) if side == "right" else slice(60 - length, None)] = 1
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        assert torch.isfinite(padded).all()
        for row in range(3):
            keep = mask[row].bool()
            assert (padded[row][keep] - model(ids[row][keep][None]).logits[0]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv"])
def test_rows_of_unequal_length_are_prefilled_together_and_go_on(name):
    model, ids = random_model(name), random_ids(2, 50)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, 18:] = 0
    with torch.no_grad():
        state = model.new_state(batch_size=2)
        model(ids[:, :30], attention_mask=mask, state=state)
        after = model(ids[:, 30:], state=state).logits
        for row, read in ((0, 18), (1, 30)):
            alone = model(torch.cat((ids[row, :read], ids[row, 30:]))[None]).logits[0, read:]
            assert (after[row] - alone).abs().max() < 1e-4


@pytest.mark.peer
@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv", "hybrid"])
def test_steps_equal_the_reference_with_its_own_cache(name):
    transformers = pytest.importorskip("transformers")
    ours = random_model(name)
    values = {k: v for k, v in ours.config.to_hf().items() if k != "architectures"}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values)).eval()
    theirs.load_state_dict(pack(ours, ours.state_dict()), strict=name != "mamba")
    theirs.tie_weights()
    # One token of several rows: the reference's RWKV adds (B, 1, D) and (B, D), which mixes the rows.
    batch = 1 if name == "rwkv" else 2
    ids, state, cache = random_ids(batch, 80), ours.new_state(batch), {}
    kept = {"rwkv": "state", "hybrid": "past_key_values"}.get(name, "cache_params")
    with torch.no_grad():
        for at in [slice(0, 70), *[slice(t, t + 1) for t in range(70, 80)]]:
            mine = ours(ids[:, at], state=state).logits
            given = cache
            if name == "hybrid":  # the reference restarts its positions at 0 with each call
                given = cache | {"position_ids": torch.arange(at.start, at.stop)[None]}
            out = theirs(ids[:, at], use_cache=True, **given)
            cache = {kept: getattr(out, kept)}
            assert (mine - out.logits).abs().max() < 1e-4


def test_saved_and_read_again(model, tmp_path):
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert type(again) is type(model)
    defaults = {"max_seq_len": model.config.max_seq_len}
    assert replace(again.config, **defaults) == model.config
    ids = random_ids(1, 20)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_bfloat16_stays_near_float32_with_and_without_a_state(model):
    ids = random_ids(1, 40)
    with torch.no_grad():
        exact = model(ids).logits
        model.to(torch.bfloat16)
        rough = model(ids).logits
        assert rough.dtype == torch.bfloat16
        assert (rough.float() - exact).norm() < 0.1 * exact.norm()
        state = model.new_state(batch_size=1)
        steps = torch.cat([model(piece, state=state).logits for piece in ids.split(8, dim=1)], dim=1)
        assert (steps - rough).float().norm() < 0.1 * exact.norm()


def test_memory_is_what_the_layout_says(model):
    state = model.new_state(batch_size=1, max_seq_len=64)
    with torch.no_grad():
        model(random_ids(1, 20), state=state)
        model(random_ids(1, 20), state=state)
    for i, layer in enumerate(model.cache_layout()):
        kept = sum(t.numel() for t in state.memory(i).values())
        assert kept == layer.fixed_size  # whatever the length
        assert (layer.num_kv_heads > 0) == (i in state.lengths)


def test_rates_and_filters_are_not_decayed():
    model = random_model("mamba")
    groups = list(make_optimizer(model, OptimizerConfig(name="adamw")).groups())
    decayed = {id(p) for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    for name, p in model.named_parameters():
        is_matrix = name.endswith(("in_proj.weight", "out_proj.weight", "select.weight", "step.weight", "embed.weight"))
        assert (id(p) in decayed) == is_matrix, name


def test_attention_maps_can_be_asked_for():
    model, ids = random_model("hybrid"), random_ids(1, 12)
    with torch.no_grad(), record_attention() as maps:
        model(ids)
    assert [tuple(m.shape) for m in maps] == [(1, 4, 12, 12)] * 2  # of the two attention layers


def test_a_loss_falls_and_every_parameter_learns(model):
    model.train()
    ids = random_ids(4, 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_what_a_recurrence_cannot_do_is_refused():
    mamba, hybrid, ids = random_model("mamba"), random_model("hybrid"), random_ids(2, 10)
    everything = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    with pytest.raises(RequestError, match="a recurrent layer cannot follow a mask"):
        mamba(ids, mask=everything)
    with pytest.raises(RequestError, match="With a decode state, give no mask"):
        mamba(ids, mask=everything, state=mamba.new_state(2))
    padding = torch.ones(2, 10, dtype=torch.long)
    padding[0, :3] = 0
    with pytest.raises(RequestError, match="Padding was given together with a decode state"):
        hybrid(ids, attention_mask=padding, state=hybrid.new_state(2))
    with pytest.raises(RequestError, match="The input has 257 tokens; this model reads at most 256"):
        hybrid(random_ids(1, 257))
    with torch.no_grad():
        assert mamba(random_ids(1, 300)).logits.shape == (1, 300, 101)  # no such limit


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (MambaConfig, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (MambaConfig, {"intermediate_size": 99}, "intermediate_size is 99; .* computes 64 only"),
        (MambaConfig, {"state_size": 0}, "state_size is 0; it must be a whole number"),
        (MambaConfig, {"model_type": "falcon_mamba"}, "model_type is 'falcon_mamba'"),
        (Mamba2Config, {"num_heads": 6}, "6 heads of 8, together 48; this must be a multiple of hidden_size"),
        (Mamba2Config, {"expand": 3}, "expand is 3; .* computes 2 only"),
        (Mamba2Config, {"n_groups": 3}, "num_heads 8 and num_groups 3"),
        (RwkvConfig, {"num_hidden_layers": 0}, "num_layers is 0"),
        (HybridConfig, {"attn_layer_indices": [1, 4]}, r"attention_layers names \[4\]; the layers are 0 .. 3"),
        (HybridConfig, {"num_key_value_heads": 3}, "each must be a multiple of the next"),
        (HybridConfig, {"partial_rotary_factor": 0.1}, "rotary_fraction is 0.1 of heads of 8"),
        (HybridConfig, {"rope_scaling": {"rope_type": "yarn"}}, "rope scaling is 'yarn'"),
    ],
)
def test_contradictory_configs_are_refused(kind, values, message):
    published = next(c for _, c in MODELS.values() if type(c) is kind).to_hf()
    assert kind.from_hf(published)
    with pytest.raises(ConfigError, match=message):
        kind.from_hf(published | values)


def test_an_infinite_step_limit_is_read_in_both_spellings():
    published = MODELS["mamba2"][1].to_hf()
    assert "time_step_limit" not in published
    for limit in ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}]):
        assert Mamba2Config.from_hf(published | {"time_step_limit": limit}).mixer.step_limit == (0.0, float("inf"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_compiled_equals_eager_in_value_and_gradient(name):
    model, ids = random_model(name), random_ids(2, 40)
    expected = model(ids).logits
    expected.square().mean().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    out = torch.compile(model)(ids).logits
    assert (out - expected).abs().max() < 1e-4
    out.square().mean().backward()
    for n, p in model.named_parameters():
        assert (p.grad - wanted[n]).norm() <= 1e-3 * wanted[n].norm(), n
