"""Cross-entropy in pieces is the plain one: loss and gradients, capped or tied, compiled; its peak does not know V."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modelwright.models.decoder import SoftcapLinear
from modelwright.nn.cross_entropy import _loss_and_slope, head_loss
from modelwright.nn.lora import LoraLinear


def make_head(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "capped":
        return SoftcapLinear(12, 50, 3.0)
    if kind == "biased":
        return nn.Linear(12, 50)
    plain = nn.Linear(12, 50, bias=False)
    if kind != "adapted":
        return plain
    adapted = LoraLinear(plain, 2, 4.0)
    nn.init.normal_(adapted.lora_b)
    return adapted


def plain_loss(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def example():
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 12, requires_grad=True)
    labels = torch.randint(0, 50, (3, 7))
    labels[0, :4] = -100
    labels[2] = -100
    return hidden, labels


@pytest.mark.parametrize("kind", ["plain", "capped", "biased", "adapted"])
@pytest.mark.parametrize("max_logits", [1, 4 * 50, 10**6])
def test_pieces_give_the_plain_loss_and_gradients(kind, max_logits):
    hidden, labels = example()
    head = make_head(kind)
    trained = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    expected = plain_loss(head, hidden, labels)
    by_plain = torch.autograd.grad(3.0 * expected, trained)
    found = head_loss(head, hidden, labels, max_logits=max_logits)
    by_pieces = torch.autograd.grad(3.0 * found, trained)
    torch.testing.assert_close(found, expected)
    for a, b in zip(by_pieces, by_plain, strict=True):
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_a_row_without_labels_none_either():
    hidden, labels = example()
    head = make_head("plain").requires_grad_(False)
    head_loss(head, hidden, labels, max_logits=100).backward()
    assert head.weight.grad is None
    assert float(hidden.grad[2].abs().max()) == 0 < float(hidden.grad[0, 5].abs().max())
    nothing = head_loss(head, hidden, torch.full_like(labels, -100))
    assert float(nothing.detach()) == 0


def test_a_tied_matrix_gets_both_gradients():
    table = nn.Embedding(50, 12)
    head = nn.Linear(12, 50, bias=False)
    head.weight = table.weight
    ids, labels = torch.randint(0, 50, (2, 5)), torch.randint(0, 50, (2, 5))
    expected = torch.autograd.grad(plain_loss(head, table(ids).tanh(), labels), table.weight)[0]
    found = torch.autograd.grad(head_loss(head, table(ids).tanh(), labels, max_logits=150), table.weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_as_near_to_float32_as_the_plain_one(dtype):
    hidden, labels = example()
    head = make_head("plain")
    exact = torch.autograd.grad(plain_loss(head, hidden, labels), head.weight)[0]
    errors = []
    for loss in (plain_loss, lambda *given: head_loss(*given, max_logits=4 * 50)):
        with torch.autocast("cpu", dtype=dtype):
            value = loss(head, hidden, labels)
        gradient = torch.autograd.grad(value, head.weight)[0]
        assert gradient.dtype == torch.float32
        errors.append(float((gradient - exact).norm() / exact.norm()))
    assert errors[1] < 1.2 * errors[0] < 0.02


@pytest.mark.slow
def test_compiled_it_is_the_same():
    hidden, labels = example()
    for kind in ("plain", "capped"):
        head = make_head(kind)
        compiled = torch.compile(lambda h, y, head=head: head_loss(head, h, y, max_logits=4 * 50), dynamic=False)
        expected = torch.autograd.grad(plain_loss(head, hidden, labels), [hidden, head.weight])
        found = torch.autograd.grad(compiled(hidden, labels), [hidden, head.weight])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that one operation inside the ``with`` has made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numel = max(getattr(self, "numel", 0), *(t.numel() for t in tree_leaves(made) if torch.is_tensor(t)), 0)
        return made


@pytest.mark.parametrize("vocab_size", [1_000, 8_000, 64_000])
def test_what_stands_in_memory_does_not_grow_with_the_vocabulary(vocab_size):
    head = nn.Linear(2, vocab_size, bias=False)
    hidden, labels = torch.randn(512, 2, requires_grad=True), torch.randint(0, vocab_size, (512,))
    with LargestTensor() as largest:
        head_loss(head, hidden, labels, max_logits=2**18).backward()
    assert largest.numel <= 2**18 < 512 * vocab_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_buffer_gives_what_the_plain_form_gives(dtype):
    """The in-place form that runs eagerly, with places that have no loss, against autograd in float32."""
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 50).mul_(8).to(dtype), torch.randint(0, 50, (6,))
    labels[2] = -100
    plain = logits.float().requires_grad_()
    wanted = F.cross_entropy(plain, labels, ignore_index=-100, reduction="sum")
    wanted.backward()
    loss, slope = _loss_and_slope(logits.clone(), labels, -100, None, True)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6) and slope is not None and slope.dtype == dtype
    torch.testing.assert_close(slope, plain.grad.to(dtype), atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)
    assert not slope[2].any()
