"""Attention over a ring of processes is attention over the whole row: values, gradients, windows, documents, caps."""

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.nn.attention import AttentionRule, attend, attend_plain, use_backend
from modelwright.nn.ring import use_ring, zigzag
from modelwright.train.ranks import POOL

ROW_LEN = 24
CASES = {
    "causal": {},
    "documents": {"has_mask": True},
    "window": {"window": 5},
    "capped": {"softcap": 2.0, "has_mask": True},
    "both sides": {"is_causal": False, "window": 7},
}


def inputs():
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, ROW_LEN, 4, 8), (2, ROW_LEN, 2, 8), (2, ROW_LEN, 2, 6), (2, ROW_LEN, 4, 6))
    q, k, v, up = (torch.randn(shape, generator=generator) for shape in shapes)
    documents = torch.tensor([0] * 5 + [1] * 11 + [2] * 8)
    return q, k, v, up, (documents[:, None] == documents)[None, None]


def arguments(case):
    rule = AttentionRule(window=case.get("window"), softcap=case.get("softcap"))
    return {"scale": 0.3, "is_causal": case.get("is_causal", True), "rule": rule}


def on_a_rank(name):
    """Return this rank's part of the output and of the gradients."""
    case, (q, k, v, up, mask) = CASES[name], inputs()
    at = zigzag(ROW_LEN, torch.distributed.get_rank(), torch.distributed.get_world_size())
    q, k, v = (x[:, at].clone().requires_grad_() for x in (q, k, v))
    with use_ring(torch.distributed.group.WORLD, ROW_LEN):
        out = attend(q, k, v, mask=mask[:, :, at] if case.get("has_mask") else None, **arguments(case))
    (out * up[:, at]).sum().backward()
    return [out.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_a_ring_is_the_whole_row(name, num_ranks):
    case, (q, k, v, up, mask) = CASES[name], inputs()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attend_plain(q, k, v, mask=mask if case.get("has_mask") else None, **arguments(case))
    (out * up).sum().backward()
    found = POOL.call(num_ranks, on_a_rank, name)
    for rank, parts in enumerate(found):
        at = zigzag(ROW_LEN, rank, num_ranks)
        for part, whole in zip(parts, (out.detach(), q.grad, k.grad, v.grad), strict=True):
            torch.testing.assert_close(part, whole[:, at], rtol=1e-4, atol=1e-5)


def test_rows_that_cannot_be_cut_and_calls_without_a_ring_are_refused():
    with pytest.raises(ConfigError, match="multiple of 8"):
        zigzag(20, 0, 4)
    q, k, v, _, _ = inputs()
    with use_backend("ring"), pytest.raises(ConfigError, match="outside of use_ring"):
        attend(q, k, v, scale=1.0, is_causal=True)
