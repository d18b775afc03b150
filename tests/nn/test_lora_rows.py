"""Each row gets the change of its own adapter, to the bit that it gets alone, and the model is left as it was."""

import pytest
import torch
from torch import nn

from modelwright.nn.lora import LoraLinear
from modelwright.nn.lora_rows import LoraRows, LowRank, RowGroup


def make_change(seed: int, rank: int, dtype: torch.dtype = torch.float32) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 48, generator=generator), torch.randn(32, rank, generator=generator)
    return LowRank(a.to(dtype), b.to(dtype), 0.5)


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 32), nn.SiLU(), nn.Linear(32, 8)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_get_their_own_change(dtype):
    model, x = make_model(dtype), torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    changes = {0: make_change(1, 4, dtype), 1: make_change(2, 16, dtype)}
    rows = {0: torch.tensor([0, 3, 4]), 1: torch.tensor([6])}  # rows 1, 2 and 5 have none
    with torch.inference_mode(), LoraRows(model).over([RowGroup({"0": changes[i]}, rows[i]) for i in rows]):
        mixed = model(x)[0]
    for index, change in changes.items():
        single = make_model(dtype)
        layer = LoraLinear(single[0], change.a.shape[0], 0.5 * change.a.shape[0])
        layer.lora_a.data, layer.lora_b.data = change.a, change.b
        single[0] = layer
        near = 1e-5 if dtype == torch.float32 else 0.1
        assert (single(x)[0, rows[index]] - mixed[rows[index]]).abs().max() < near
    assert torch.equal(model(x)[0, [1, 2, 5]], mixed[[1, 2, 5]])
    assert not torch.equal(model(x)[0, 0], mixed[0])


def test_hooks_go_even_when_a_step_fails():
    model = make_model()
    with pytest.raises(RuntimeError, match="on purpose"):
        with LoraRows(model).over([RowGroup({"0": make_change(1, 4)}, torch.tensor([0]))]):
            raise RuntimeError("on purpose")
    assert not any(module._forward_hooks for module in model.modules())


def test_small_products_are_filled_up():
    group = RowGroup({"0": make_change(1, 4)}, torch.tensor([5, 6]))
    assert len(group.padded) * 4 * 32 > 16**3
    assert group.padded[:2].tolist() == [5, 6] and set(group.padded.tolist()) == {5, 6}
