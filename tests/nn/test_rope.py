"""Rotary positions: tables equal the published ones, scores depend on distance alone, and the buffers survive."""

import pytest
import torch

from modelwright.base.errors import ConfigError, RequestError
from modelwright.nn.rope import (
    RopeScaling,
    RotaryTable,
    attention_factor,
    half_split_order,
    inverse_frequencies,
    ntk_theta,
    rope_from_hf,
    rope_to_hf,
    rotate,
    rotate_interleaved,
    scaling_from_hf,
    scaling_to_hf,
)

SCALINGS = {
    "default": None,
    "linear": RopeScaling("linear", 4.0),
    "llama3": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    "llama3, short": RopeScaling("llama3", 32.0, 1.0, 4.0, 64),
    "yarn": RopeScaling("yarn", 4.0, original_max_seq_len=64),
    "yarn, long": RopeScaling("yarn", 16.0, original_max_seq_len=4096, beta_fast=48.0, beta_slow=2.0),
    "yarn, bounds not rounded": RopeScaling("yarn", 32.0, original_max_seq_len=4096, truncate=False),
    "yarn, DeepSeek": RopeScaling("yarn", 40.0, original_max_seq_len=4096, mscale=1.0, mscale_all_dim=0.707),
    "yarn, own temperature": RopeScaling("yarn", 4.0, original_max_seq_len=4096, attention_factor=1.5),
    "yarn, bounds in one place": RopeScaling("yarn", 4.0, original_max_seq_len=6, beta_fast=1.0, beta_slow=1.0),
    "proportional": RopeScaling("proportional", 2.0, rotated_fraction=0.25),
}


def longrope(rotary_dim: int, original: int = 64, factor: float = 4.0) -> RopeScaling:
    pairs = rotary_dim // 2
    short, long = (tuple(start + i / pairs for i in range(pairs)) for start in (1.0, 3.0))
    return RopeScaling("longrope", factor, original_max_seq_len=original, short_factor=short, long_factor=long)


def published_config(rope: dict, head_dim: int, max_seq_len: int = 256):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=head_dim * 2, num_attention_heads=2, max_position_embeddings=max_seq_len, rope_parameters=rope
    )


def published_tables(scaling, head_dim, theta, seq_len, rotary_dim=None, max_seq_len=256):
    """inv_freq, cos and sin of transformers, cos and sin cut to one of each pair."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = rope_to_hf(theta, scaling, rotary_dim or head_dim, head_dim)
    config = published_config(rope, head_dim, max_seq_len)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(seq_len)[None])
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        frequency, factor = LlamaRotaryEmbedding(config).inv_freq, 1.0
    else:
        frequency, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=seq_len)
    return frequency, factor, cos[0, :, : cos.shape[-1] // 2], sin[0, :, : sin.shape[-1] // 2]


@pytest.mark.peer
@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10000.0), (128, 500000.0)])
def test_tables_equal_transformers(name, head_dim, theta):
    pytest.importorskip("transformers")
    scaling = SCALINGS[name]
    frequency, factor, cos, sin = published_tables(scaling, head_dim, theta, 300, max_seq_len=100_000)
    assert (inverse_frequencies(head_dim, theta, scaling) - frequency).abs().max() < 1e-6
    assert abs(attention_factor(scaling) - factor) < 1e-6
    if scaling is None or scaling.kind in ("linear", "llama3"):
        assert torch.equal(inverse_frequencies(head_dim, theta, scaling), frequency)
    ours = RotaryTable(head_dim, 300, theta, scaling)
    assert ours.cos.isfinite().all() and ours.sin.isfinite().all()
    assert (ours.cos - cos).abs().max() < 1e-6
    assert (ours.sin - sin).abs().max() < 1e-6


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("seq_len", [10, 64, 65, 256, 700])  # below, at, just beyond and far beyond the original 64
def test_tables_that_depend_on_the_length_equal_transformers(kind, seq_len):
    pytest.importorskip("transformers")
    scaling = RopeScaling("dynamic", 4.0, original_max_seq_len=64) if kind == "dynamic" else longrope(32)
    max_seq_len = 64 if kind == "dynamic" else 256
    frequency, factor, cos, sin = published_tables(scaling, 32, 10000.0, seq_len, max_seq_len=max_seq_len)
    assert (inverse_frequencies(32, 10000.0, scaling, seq_len) - frequency).abs().max() < 1e-6
    assert abs(attention_factor(scaling) - factor) < 1e-6
    table = RotaryTable(32, max_seq_len, 10000.0, scaling)
    for positions in (None, torch.arange(seq_len)[None]):
        ours = table(seq_len, positions)
        assert (ours[0][0, :, 0] - cos).abs().max() < 2e-6 and (ours[1][0, :, 0] - sin).abs().max() < 2e-6
    back = table(10)  # a short sequence after a long one is turned as if the long one had never been
    assert torch.equal(back[0], RotaryTable(32, max_seq_len, 10000.0, scaling)(10)[0])


@pytest.mark.peer
@pytest.mark.parametrize("name", ["linear", "llama3", "yarn", "yarn, bounds not rounded", "longrope", "dynamic"])
def test_partial_tables_equal_transformers(name):
    """Phi-style partial heads: the fraction counts in the exponent, not only in how much is turned."""
    pytest.importorskip("transformers")
    extra = {
        "longrope": longrope(16),
        "dynamic": RopeScaling("dynamic", 4.0, original_max_seq_len=256),
    }
    scaling = extra.get(name) or SCALINGS[name]
    frequency, factor, _, _ = published_tables(scaling, 64, 10000.0, 32, rotary_dim=16)
    assert frequency.shape == (8,)
    assert (inverse_frequencies(16, 10000.0, scaling, 32) - frequency).abs().max() < 1e-6
    assert abs(attention_factor(scaling) - factor) < 1e-6


def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor():
    plain, slowed = inverse_frequencies(64, 10000.0), inverse_frequencies(64, 10000.0, RopeScaling("ntk", 8.0))
    assert slowed[0] == plain[0] == 1
    assert torch.isclose(slowed[-1], plain[-1] / 8)
    assert torch.equal(slowed, inverse_frequencies(64, ntk_theta(10000.0, 8.0, 64)))
    # dynamic at the full length of its factor is not the same as ntk with that factor, but ntk with its stretch
    dynamic = RopeScaling("dynamic", 4.0, original_max_seq_len=64)
    assert torch.equal(inverse_frequencies(64, 1e4, dynamic, 64), plain)
    assert torch.allclose(
        inverse_frequencies(64, 1e4, dynamic, 256), inverse_frequencies(64, 1e4, RopeScaling("ntk", 13.0))
    )


@pytest.mark.parametrize("original", [1, 2, 6, 7, 63, 64])
def test_a_ramp_of_no_width_does_not_divide_by_zero(original):
    for beta in (1.0, 32.0):
        for truncate in (True, False):
            scaling = RopeScaling(
                "yarn", 4.0, original_max_seq_len=original, beta_fast=beta, beta_slow=beta, truncate=truncate
            )
            frequency = inverse_frequencies(8, 10000.0, scaling)
            assert frequency.isfinite().all() and (frequency > 0).all()


@pytest.mark.parametrize("turn", [rotate, rotate_interleaved])
@pytest.mark.parametrize("scaling", [None, "linear", "yarn", "llama3, short"])
@pytest.mark.parametrize("rotary_dim", [32, 12])
def test_scores_depend_on_the_distance_alone(turn, scaling, rotary_dim):
    torch.manual_seed(0)
    table = RotaryTable(rotary_dim, 4000, 10000.0, SCALINGS[scaling or "default"])
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def score(at_q: int, at_k: int) -> torch.Tensor:
        turned = [turn(x, table(1, torch.tensor([[at]]))) for x, at in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum()

    near = score(130, 100)
    for shift in (1, 97, 1024, 3800):  # no wrapping, wherever a block ends
        assert torch.allclose(score(130 + shift, 100 + shift), near, atol=2e-3)
    assert max(float((score(130 + more, 100) - near).abs()) for more in range(1, 9)) > 1e-1
    scale = attention_factor(table.scaling) ** 2
    kept = (q * k)[..., rotary_dim:].sum()
    assert torch.allclose(score(5, 5), (q * k)[..., :rotary_dim].sum() * scale + kept, atol=1e-5)


def test_layouts_agree_after_reordering_and_differ_without():
    torch.manual_seed(0)
    table = RotaryTable(12, 200, 10000.0)
    q, k = torch.randn(2, 200, 3, 16), torch.randn(2, 200, 3, 16)
    order, rope = half_split_order(16, 12), table(200)

    def scores(turn, q, k):
        return torch.einsum("btnh,bsnh->bnts", turn(q, rope), turn(k, rope))

    right = scores(rotate_interleaved, q, k)
    assert torch.allclose(scores(rotate, q[..., order], k[..., order]), right, atol=1e-4)
    assert torch.equal(rotate(q[..., order], rope)[..., order.argsort()], rotate_interleaved(q, rope))
    wrong = (scores(rotate, q, k) - right).abs()
    assert wrong[..., 64:, :].max() > 1  # the published mistake: it shows beyond the first few positions
    assert torch.equal(rotate(q, rope)[..., 12:], q[..., 12:])  # the rest of a head is left alone


@pytest.mark.peer
def test_interleaved_equals_complex_products_and_deepseek():
    """The original formula: neighbours are one complex number, turned by a product."""
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    torch.manual_seed(0)
    q, k = torch.randn(2, 100, 3, 16), torch.randn(2, 100, 3, 16)
    cos, sin = RotaryTable(16, 100, 10000.0)(100)
    turns = torch.view_as_complex(torch.stack((cos, sin), dim=-1))
    want = torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (8, 2))) * turns).flatten(-2)
    ours = [rotate_interleaved(x, (cos, sin)) for x in (q, k)]
    assert torch.allclose(ours[0], want, atol=1e-5)
    full = [torch.cat((x, x), dim=-1)[0, :, 0][None] for x in (cos, sin)]
    theirs = apply_rotary_pos_emb_interleave(q.transpose(1, 2), k.transpose(1, 2), *full)
    scores = torch.einsum("btnh,bsnh->bnts", *ours)
    assert torch.allclose(theirs[0] @ theirs[1].transpose(2, 3), scores, atol=1e-4)


def test_a_table_too_short_is_refused_and_one_that_grows_is_not():
    with pytest.raises(RequestError, match="41 positions are asked of a rotary table of 40"):
        RotaryTable(8, 40, 10000.0)(41)
    with pytest.raises(IndexError):
        RotaryTable(8, 40, 10000.0)(1, torch.tensor([[40]]))
    growing = RotaryTable(8, 40, 10000.0, RopeScaling("dynamic", 2.0, original_max_seq_len=40))
    assert growing(100)[0].shape == (1, 100, 1, 4)
    assert growing(1, torch.tensor([[99]]))[0].shape == (1, 1, 1, 4)
    assert torch.equal(growing(100)[0][:, 99:], growing(1, torch.tensor([[99]]))[0])


def test_positions_pick_rows_of_the_table():
    table = RotaryTable(8, 50, 100.0)
    x = torch.randn(2, 6, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 7, 0, 49, 3, 1]])
    whole = rotate(x, table(6, positions))
    assert torch.equal(whole[:1], rotate(x[:1], table(6)))
    one = rotate(x[1:, 3:4], table(1, torch.tensor([[49]])))
    assert torch.equal(whole[1:, 3:4], one)


def test_tables_survive_the_meta_device_poison_and_casts():
    right = RotaryTable(16, 40, 10000.0, SCALINGS["llama3, short"])
    with torch.device("meta"):
        model = torch.nn.Sequential(RotaryTable(16, 40, 10000.0, SCALINGS["llama3, short"]))
    assert model[0].cos.is_meta
    model.to_empty(device="cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model[0].cos.fill_(float("nan"))
        model.to(dtype)
        assert model[0].cos.dtype == torch.float32
        assert torch.equal(model[0].cos, right.cos) and torch.equal(model[0].sin, right.sin)
    assert model.state_dict() == {}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_numbers_also_while_a_model_is_built_on_the_meta_device(name):
    right = inverse_frequencies(64, 10000.0, SCALINGS[name])
    with torch.device("meta"):
        assert torch.equal(inverse_frequencies(64, 10000.0, SCALINGS[name]), right)


def test_bfloat16_far_positions_keep_their_angle():
    """Position 20,001 in bfloat16 would be 19,968: the fast pairs would be off by whole turns."""
    table = RotaryTable(64, 20_002, 10000.0).to(torch.bfloat16)
    assert torch.allclose(table.cos[20_001, 0], torch.tensor(20_001.0).cos())
    x = torch.randn(1, 1, 2, 64).to(torch.bfloat16)
    assert rotate(x, table(1, torch.tensor([[20_001]]))).dtype == torch.bfloat16


def test_scaling_reads_old_and_new_spellings():
    assert scaling_from_hf(None) is None
    assert scaling_from_hf({"rope_type": "default", "rope_theta": 1e4}) is None
    assert scaling_from_hf({"type": "linear", "factor": 4.0}) == SCALINGS["linear"]
    for scaling in (*SCALINGS.values(), longrope(16), RopeScaling("dynamic", 2.0, original_max_seq_len=77)):
        assert (
            scaling is not None and scaling.kind == "proportional" or scaling_from_hf(scaling_to_hf(scaling)) == scaling
        )
        for rotary_dim in (64, 16):
            if scaling is None or scaling.kind != "proportional" or rotary_dim == 64:
                rope = rope_to_hf(5e5, scaling, rotary_dim, 64)
                assert rope_from_hf({"rope_parameters": rope}) == (5e5, scaling, rotary_dim / 64)


def test_the_length_before_the_extension_is_that_of_the_config_where_the_scaling_does_not_say():
    for kind in ("yarn", "dynamic"):
        for new in (
            {"rope_parameters": {"rope_type": kind, "factor": 2.0}},
            {"rope_scaling": {"type": kind, "factor": 2}},
        ):
            read = rope_from_hf({"max_position_embeddings": 96, **new}).scaling
            assert read == RopeScaling(kind, 2.0, original_max_seq_len=96)


def test_configs_of_published_models_are_read():
    qwen = {
        "rope_theta": 1e6,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    }
    assert rope_from_hf(qwen) == (1e6, RopeScaling("yarn", 4.0, original_max_seq_len=32768), 1.0)
    deepseek = {
        "max_position_embeddings": 163840,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
    }
    read = rope_from_hf(deepseek).scaling
    assert read == RopeScaling("yarn", 40.0, original_max_seq_len=4096, mscale=0.707, mscale_all_dim=0.707)
    assert attention_factor(read) == 1.0
    factors = {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48}
    phi = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_theta": 10000.0}
    read = rope_from_hf(phi | {"rope_scaling": {"type": "su", **factors}}).scaling
    assert read is not None and (read.kind, read.factor, read.original_max_seq_len) == ("longrope", 32.0, 4096)
    gemma = {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        }
    }
    assert rope_from_hf(gemma, "full_attention") == (1e6, RopeScaling("linear", 8.0), 1.0)
    assert rope_from_hf(gemma, "sliding_attention") == (1e4, None, 1.0)
    with pytest.raises(ConfigError, match="part for each of"):
        rope_from_hf(gemma)
    assert rope_from_hf({"partial_rotary_factor": 0.4}) == (10000.0, None, 0.4)


@pytest.mark.peer
def test_what_is_written_is_what_transformers_reads():
    pytest.importorskip("transformers")
    kinds = [*SCALINGS.values(), longrope(64, 128), RopeScaling("dynamic", 4.0, original_max_seq_len=256)]
    for scaling in kinds:
        for rotary_dim in (64, 16):
            if scaling is not None and scaling.kind in ("longrope", "proportional") and rotary_dim != 64:
                continue
            config = published_config(rope_to_hf(7e4, scaling, rotary_dim, 64), 64)
            assert rope_from_hf(config.to_dict()) == (7e4, scaling, rotary_dim / 64)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"rope_type": "mrope", "factor": 4.0}, "'mrope'; known: default, linear, dynamic"),
        ({"rope_type": "linear"}, "needs the field 'factor'"),
        ({"rope_type": "yarn", "factor": 4.0, "type": "linear"}, "rope_type 'yarn' and type 'linear'"),
        ({"rope_type": "linear", "factor": 0.5}, "at least 1"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "'linear' has the field 'beta_fast'"),
        ({"rope_type": "default", "factor": 4.0}, "'default' has the field 'factor'"),
        ({"rope_type": "llama3", "factor": 4.0}, "needs the field 'low_freq_factor'"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 64}, "needs the field 'factor'"),
        ({"rope_type": "yarn", "factor": 4.0}, "needs the field 'original_max_position_embeddings'"),
        ({"rope_type": "dynamic", "factor": 4.0}, "needs the field 'original_max_position_embeddings'"),
        ({**YARN, "beta_fast": 1, "beta_slow": 2}, "beta_slow 2.0 and beta_fast 1.0"),
        ({**YARN, "attention_factor": -1.0}, "attention_factor is -1.0"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "needs the field 'long_factor'"),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0],
                "long_factor": [1.0, 2.0],
                "original_max_position_embeddings": 64,
            },
            "1 short and 2 long factors",
        ),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_refuses_scalings_by_name(values, match):
    with pytest.raises(ConfigError, match=match):
        scaling_from_hf(values)


def test_refuses_whole_configs_that_contradict_themselves():
    new, old = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ConfigError, match="rope_parameters has factor 4.0 and rope_scaling 2.0"):
        rope_from_hf({"rope_parameters": new, "rope_scaling": old})
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(
        ConfigError, match="original_max_position_embeddings 64 and the config max_position_embeddings 256"
    ):
        rope_from_hf({"max_position_embeddings": 256, "rope_scaling": dynamic})
    with pytest.raises(ConfigError, match="partial_rotary_factor is 1.5"):
        rope_from_hf({"partial_rotary_factor": 1.5})
    with pytest.raises(ConfigError, match="24 factors and the heads 16 rotated pairs"):
        inverse_frequencies(32, 1e4, longrope(48))
    with pytest.raises(ConfigError, match="5 numbers of a head"):
        inverse_frequencies(5, 1e4)
    with pytest.raises(ConfigError, match="divides by zero"):
        inverse_frequencies(2, 1e4, RopeScaling("ntk", 2.0))
    with pytest.raises(ConfigError, match="no published name"):
        scaling_to_hf(RopeScaling("ntk", 2.0))


def test_llama3_band_of_no_width_is_refused():
    with pytest.raises(ConfigError, match="low one must be above 0 and below"):
        RopeScaling("llama3", 8.0, 4.0, 4.0, 64)
