"""Llama against transformers on random weights, against itself step by step, compiled, padded and packed."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from modelwright.base import config as settings
from modelwright.base.device import can_compile
from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.llama import ARCHITECTURE_OF, Llama, LlamaConfig
from modelwright.models.weights import load_model, to_published
from modelwright.nn.decode_state import KVState
from modelwright.nn.init import init_weights
from modelwright.nn.rope import RopeScaling

SMALL = LlamaConfig(
    vocab_size=101,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=256,
)
VARIANTS = {
    "gqa": SMALL,
    "mha tied": replace(SMALL, num_kv_heads=4, tie_embeddings=True),
    "mqa, wide heads": replace(SMALL, num_kv_heads=1, head_dim=32, rope_theta=500000.0),
    "biases": replace(SMALL, attention_bias=True, mlp_bias=True, norm_eps=1e-3),
    "llama3 scaling": replace(SMALL, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
    "linear scaling": replace(SMALL, rope_scaling=RopeScaling("linear", 4.0)),
    "yarn scaling": replace(SMALL, rope_scaling=RopeScaling("yarn", 4.0, original_max_seq_len=64)),
    "mistral": replace(SMALL, family="mistral"),
    "mistral, window": replace(SMALL, family="mistral", sliding_window=48),
    "qwen2, late window": replace(SMALL, family="qwen2", attention_bias=True, sliding_window=32, num_full_layers=1),
    "qwen3": replace(SMALL, family="qwen3", head_dim=32, tie_embeddings=True),
    "qwen3, window": replace(SMALL, family="qwen3", sliding_window=40, num_full_layers=2),
    "qwen2": replace(SMALL, family="qwen2", attention_bias=True, tie_embeddings=True),
}


def random_model(config: LlamaConfig, seed: int = 0) -> Llama:
    """A model whose every parameter, norms and biases included, is away from its first value."""
    model = init_weights(Llama(config), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 101, (batch, length), generator=torch.Generator().manual_seed(seed))


def reference(model: Llama):
    """The transformers model with the same weights, by way of the published names."""
    transformers = pytest.importorskip("transformers")
    values = {k: v for k, v in model.config.to_hf().items() if k != "architectures"}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values)).eval()
    assert type(theirs).__name__ == ARCHITECTURE_OF[model.config.family]
    theirs.load_state_dict({to_published(model, name): value for name, value in model.state_dict().items()})
    return theirs


@pytest.mark.peer
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_equal_transformers(name):
    ours = random_model(VARIANTS[name])
    theirs = reference(ours)
    ids = random_ids(2, 200)
    mine, other = ours(ids).logits, theirs(ids).logits
    assert (mine - other).abs().max() < 1e-4
    for out in (mine, other):
        out.log_softmax(-1)[..., 7].sum().backward()
    expected = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        wanted = expected[to_published(ours, parameter_name)].grad
        assert (parameter.grad - wanted).norm() <= 1e-3 * wanted.norm(), parameter_name


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["ntk", "dynamic", "longrope"])
@pytest.mark.parametrize("length", [40, 200])  # within the original length and beyond it
def test_scalings_without_a_cache_across_their_bound_equal_transformers(kind, length):
    factors = {f"{x}_factor": [y + i / 8 for i in range(8)] for x, y in (("short", 1.0), ("long", 2.0))}
    scaling = RopeScaling(kind, 4.0, original_max_seq_len=64, **(factors if kind == "longrope" else {}))
    if kind == "ntk":
        scaling = RopeScaling("ntk", 4.0)
    ours = random_model(replace(SMALL, rope_scaling=scaling))
    theirs = reference(ours)
    ids = random_ids(2, length)
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4
    again = LlamaConfig.from_hf(ours.config.to_hf())
    assert again.max_seq_len == 256
    assert again.rope_scaling == (None if kind == "ntk" else scaling)  # NTK is published as a larger theta


@pytest.mark.peer
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_transformers_and_the_unpadded_rows(side):
    ours = random_model(SMALL)
    theirs = reference(ours)
    lengths, longest = (120, 150, 90), 150
    ids, mask = random_ids(3, longest), torch.zeros(3, longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(longest - length, None)] = 1
    keep = mask.bool()
    with torch.no_grad():
        mine = ours(ids, attention_mask=mask).logits
        other = theirs(ids, attention_mask=mask).logits
        assert torch.isfinite(mine).all()
        assert (mine - other)[keep].abs().max() < 1e-4
        for row in range(3):  # padding changes nothing: rotary positions are relative
            alone = ours(ids[row][keep[row]][None]).logits[0]
            assert (mine[row][keep[row]] - alone).abs().max() < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_step_by_step_equals_the_whole_sequence(name):
    model = random_model(VARIANTS[name])
    ids = random_ids(2, 150)
    with torch.no_grad():
        whole = model(ids).logits
        state = model.new_state(batch_size=2)
        pieces = []
        for piece in ids.split([70, 1, 1, 30, *[1] * 48], dim=1):
            pieces.append(model(piece, positions=state.positions(piece.shape[1]), state=state).logits)
        assert state.length == 150
        assert (torch.cat(pieces, dim=1) - whole).abs().max() < 1e-4
        other = model(ids.roll(1, dims=1)).logits  # negative control: the order of the past matters
        assert (other[:, -1] - whole[:, -1]).abs().max() > 1e-2


def test_packed_documents_equal_separate_ones():
    model = random_model(SMALL)
    first, second = random_ids(1, 70, 1), random_ids(1, 90, 2)
    ids = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(70), torch.arange(90)])[None]
    document = torch.tensor([0] * 70 + [1] * 90)
    mask = (document[:, None] == document[None])[None, None]
    with torch.no_grad():
        packed = model(ids, positions=positions, mask=mask).logits
        assert (packed[:, :70] - model(first).logits).abs().max() < 1e-4
        assert (packed[:, 70:] - model(second).logits).abs().max() < 1e-4
        assert (model(ids).logits[:, 70:] - packed[:, 70:]).abs().max() > 1e-2


def test_last_only_and_the_separate_head():
    model = random_model(SMALL)
    ids = random_ids(2, 20)
    with torch.no_grad():
        whole = model(ids).logits
        assert whole.shape == (2, 20, 101)
        assert torch.allclose(model(ids, last_only=True).logits, whole[:, -1:], atol=1e-6)
        assert torch.equal(model.lm_head(model.hidden(ids)), whole)


def test_a_token_sees_no_later_one():
    model = random_model(SMALL)
    ids = random_ids(1, 40)
    changed = ids.clone()
    changed[0, 25] = (changed[0, 25] + 1) % 101
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    assert difference[:25].max() == 0 and difference[25:].min() > 0


@pytest.mark.peer
def test_bfloat16_is_as_near_to_float32_as_transformers():
    model = random_model(SMALL)
    theirs = reference(model)
    ids = random_ids(2, 200)
    with torch.no_grad():
        exact = model(ids).logits
        mine = (model.to(torch.bfloat16)(ids).logits.float() - exact).abs().mean()
        other = (theirs.to(torch.bfloat16)(ids).logits.float() - exact).abs().mean()
    assert model(ids).logits.dtype == torch.bfloat16
    assert mine < 1.1 * other


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
@pytest.mark.parametrize("masking", ["causal", "packed"])
def test_compiled_equals_eager_in_one_graph(masking):
    model = random_model(replace(SMALL, num_layers=1))
    ids = random_ids(2, 200)
    mask = None if masking == "causal" else (torch.arange(200)[:, None] // 70 == torch.arange(200) // 70)[None, None]
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    eager, fast = model(ids, mask=mask).logits, compiled(ids, mask=mask).logits
    assert (fast - eager).abs().max() < 1e-4
    fast.logsumexp(-1).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    eager.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert (grads[name] - parameter.grad).norm() <= 1e-3 * parameter.grad.norm(), name


def test_every_parameter_gets_a_gradient():
    model = random_model(VARIANTS["biases"])
    model(random_ids(1, 30)).logits.logsumexp(-1).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_parameter_count_counts_a_tied_matrix_once():
    untied, tied = Llama(SMALL), Llama(replace(SMALL, tie_embeddings=True))
    assert untied.num_parameters() - tied.num_parameters() == 101 * 64
    assert len({p.data_ptr() for p in tied.parameters()}) == len(list(tied.parameters()))


@pytest.mark.parametrize("name", VARIANTS)
def test_config_goes_to_json_and_back(name):
    config = replace(VARIANTS[name], eos_token_id=(0, 2), bos_token_id=1)
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert settings.build(LlamaConfig, settings.to_dict(config)) == config


@pytest.mark.peer
@pytest.mark.parametrize("name", VARIANTS)
def test_config_of_transformers_is_read(name, tmp_path):
    reference(Llama(VARIANTS[name])).save_pretrained(tmp_path)  # rope_parameters, the newer spelling
    config = load_model(tmp_path).config
    assert replace(config, bos_token_id=None, eos_token_id=()) == VARIANTS[name]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_kv_heads": 3}, "must divide the query heads"),
        ({"hidden_size": 66, "head_dim": None}, "must divide it evenly"),
        ({"head_dim": 5}, "even number"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"family": "falcon"}, "known: llama, mistral, qwen2"),
    ],
)
def test_refuses_contradictory_settings(changes, match):
    with pytest.raises(ConfigError, match=match):
        replace(SMALL, **changes)


def test_refuses_more_tokens_than_the_context():
    model = random_model(SMALL)
    with pytest.raises(RequestError, match="257 tokens; this model reads at most 256"):
        model(random_ids(1, 257))
    state = model.new_state(1, max_seq_len=8)
    with pytest.raises(RequestError, match="reaches 9 tokens"):
        model(random_ids(1, 9), positions=state.positions(9), state=state)
    with pytest.raises(RequestError, match="give positions and no mask"):
        model(random_ids(1, 4), state=KVState(batch_size=1, max_seq_len=8))


def read_llama2c(path) -> Llama:
    """The trained 260K-parameter model in llama2.c's first format: 7 int32, then float32 in a fixed order."""

    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = np.frombuffer(raw, dtype="<i4", count=7).tolist()
    data = torch.from_numpy(np.frombuffer(raw, dtype="<f4", offset=28).copy())
    place = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal place
        size = int(np.prod(shape))
        place += size
        return data[place - size : place].view(shape)

    def half_split(x: torch.Tensor, n: int) -> torch.Tensor:  # its rotary pairs are neighbours
        return x.view(n, -1, 2, dim).transpose(1, 2).reshape(-1, dim)

    config = LlamaConfig(abs(vocab), dim, hidden, layers, heads, kv_heads, max_seq_len=length, tie_embeddings=True)
    size = dim // heads
    state = {"embed.weight": take(abs(vocab), dim)}
    parts = {
        "attention_norm": take(layers, dim),
        "attention.q": take(layers, heads * size, dim),
        "attention.k": take(layers, kv_heads * size, dim),
        "attention.v": take(layers, kv_heads * size, dim),
        "attention.o": take(layers, dim, heads * size),
        "mlp_norm": take(layers, dim),
        "mlp.gate": take(layers, hidden, dim),
        "mlp.down": take(layers, dim, hidden),
        "mlp.up": take(layers, hidden, dim),
    }
    for name, stack in parts.items():
        for i in range(layers):
            value = stack[i]
            if name in ("attention.q", "attention.k"):
                value = half_split(value, heads if name.endswith("q") else kv_heads)
            state[f"layers.{i}.{name}.weight"] = value
    state["norm.weight"] = take(dim)
    state["lm_head.weight"] = state["embed.weight"]
    model = Llama(config).eval()
    model.load_state_dict(state)
    return model


def test_a_trained_model_writes_the_published_story():
    data = os.environ.get("MODELWRIGHT_DATA")
    folder = Path(data or "") / "weights" / "stories260K"
    if not data or not folder.is_dir():
        pytest.skip("MODELWRIGHT_DATA is not set")
    model = read_llama2c(folder / "stories260K.bin")
    raw, pieces, place = (folder / "tok512.bin").read_bytes(), [], 4
    while place < len(raw):
        size = int.from_bytes(raw[place + 4 : place + 8], "little")
        pieces.append(raw[place + 8 : place + 8 + size])
        place += 8 + size
    state = model.new_state(1)
    token, text = torch.tensor([[1]]), b""
    with torch.no_grad():
        for _ in range(200):
            previous = int(token)
            token = model(token, positions=state.positions(1), state=state).logits[:, -1:].argmax(-1)
            if int(token) == 1:
                break
            piece = pieces[int(token)]
            text += piece.removeprefix(b" ") if previous == 1 else piece

    text = re.sub(rb"<0x([0-9A-F]{2})>", lambda m: bytes([int(m[1], 16)]), text)
    expected = (folder / "expected_greedy_200.txt").read_bytes()
    assert text.strip() == expected.strip()
