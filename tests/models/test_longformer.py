"""Longformer: pieces equal the dense twin, which equals transformers; memory grows with the length alone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modelwright.base.errors import ConfigError, RequestError
from modelwright.models import longformer
from modelwright.models.longformer import LongformerAttention, LongformerConfig, Seen
from modelwright.models.weights import load_model
from modelwright.nn.init import init_weights

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "sep_token_id": 2}


def make_attention(window: int) -> LongformerAttention:
    config = LongformerConfig(**SMALL, num_layers=1, attention_window=(window,))
    return init_weights(LongformerAttention(config, 0), 0, std=0.3)


@pytest.mark.parametrize("seed", range(12))
def test_pieces_equal_the_dense_twin(seed):
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 70, (), generator=generator))
    window = 2 * int(torch.randint(1, 12, (), generator=generator))
    is_token = torch.rand(3, length, generator=generator) < (1.0 if seed % 3 == 0 else 0.7)
    is_global = (torch.rand(3, length, generator=generator) < (0.0, 0.1, 0.5)[seed % 3]) & is_token
    attention, x = make_attention(window), torch.randn(3, length, 32, generator=generator)
    seen = Seen(is_token, is_global)
    dense, pieces = attention.attend_dense(x, seen), attention.attend_pieces(x, seen)
    assert torch.isfinite(pieces).all()
    assert (dense - pieces)[is_token].abs().max() < 1e-5 if is_token.any() else True
    grads = [
        torch.autograd.grad((out * is_token[..., None, None]).square().sum(), attention.k.weight)
        for out in (dense, pieces)
    ]
    assert torch.allclose(grads[0][0], grads[1][0], rtol=1e-3, atol=1e-4)


@pytest.mark.peer
def test_global_tokens_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=258,
        attention_window=[8, 16],
        pad_token_id=1,
        initializer_range=0.3,
    )
    theirs = transformers.LongformerModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, ids = load_model(tmp_path), torch.randint(5, 40, (2, 150))
    is_global = (torch.rand(2, 150) < 0.06).long()
    mask = torch.ones_like(ids)
    mask[0, 120:] = 0
    ids = ids.masked_fill(mask == 0, 1)
    inputs = {"attention_mask": mask, "global_attention_mask": is_global}
    mine, other = ours(ids, **inputs), theirs(ids, **inputs)
    assert (mine.last_hidden_state - other.last_hidden_state)[mask.bool()].abs().max() < 1e-4
    with torch.no_grad():
        local = ours(ids, attention_mask=mask).last_hidden_state
    assert (local - other.last_hidden_state)[mask.bool()].abs().max() > 1e-2  # negative control
    for out in (mine, other):
        states = out.last_hidden_state[mask.bool()]
        (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum().backward()
    for name in ("query_global", "key_global", "value_global", "value"):
        wanted = getattr(theirs.encoder.layer[0].attention.self, name).weight.grad
        found = getattr(ours.layers[0].attention, {"value": "v"}.get(name, f"global_{name[0]}")).weight.grad
        assert (found - wanted).norm() <= 1e-3 * wanted.norm(), name


class LargestTensor(TorchDispatchMode):
    """Watch the numbers in the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_the_largest_tensor_grows_with_the_length_and_not_its_square():
    attention, sizes = make_attention(16), {}
    for name, compute in (("pieces", attention.attend_pieces), ("dense", attention.attend_dense)):
        for length in (256, 1024):
            is_global = torch.zeros(1, length, dtype=torch.bool)
            is_global[0, 0] = True
            with torch.no_grad(), LargestTensor() as watch:
                compute(torch.randn(1, length, 32), Seen(torch.ones_like(is_global), is_global))
            sizes[name, length] = watch.largest
    assert sizes["pieces", 1024] <= 4.1 * sizes["pieces", 256]
    assert sizes["dense", 1024] > 10 * sizes["dense", 256]


def test_tasks_make_global_what_they_need():
    config = LongformerConfig(**SMALL, num_layers=1, attention_window=(8,))
    classifier = longformer.ARCHITECTURES["LongformerForSequenceClassification"](config)
    answers = longformer.ARCHITECTURES["LongformerForQuestionAnswering"](config)
    ids = torch.tensor([[0, 7, 8, 2, 9, 9, 2]])
    assert classifier.complete(ids, {})["global_attention_mask"].int().tolist() == [[1, 0, 0, 0, 0, 0, 0]]
    assert answers.complete(ids, {})["global_attention_mask"].int().tolist() == [[1, 1, 1, 0, 0, 0, 0]]
    given = {"global_attention_mask": torch.zeros(1, 7)}
    assert answers.complete(ids, given) is given
    with pytest.raises(RequestError, match=r"no separator \(id 2\)"):
        answers(torch.tensor([[0, 7, 8]]))


def test_odd_windows_are_refused():
    with pytest.raises(ConfigError, match="expected an even number"):
        LongformerConfig.from_hf({"attention_window": 7})
    with pytest.raises(ConfigError, match="one for each of 12"):
        LongformerConfig.from_hf({"attention_window": [8, 8]})
