"""The compiled products equal their PyTorch twin, and no row knows who stands beside it."""

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.nn.kernels.packed import (
    PackedMatrix,
    allocate,
    bits_of,
    commit,
    multiply_plain,
    quantize_rows,
    round_linear,
)
from modelwright.nn.lowbit import LAYERS, Int2Linear, Int4Linear, Int8Linear


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(bits: int, num_ins: int, num_outs: int, group_size: int | None = 32, bias: bool = False) -> nn.Module:
    torch.manual_seed(bits + num_outs)
    dense = nn.Linear(num_ins, num_outs, bias=bias).bfloat16()
    return dense if bits == 16 else LAYERS[bits].from_linear(dense, group_size)


CASES = [
    (4, 64, 96, 32),
    (4, 256, 40, 64),  # outputs padded, groups of 64
    (8, 96, 32, None),  # one scale a row
    (8, 64, 64, 32),
    (16, 64, 70, None),
]


@pytest.mark.parametrize(("bits", "num_ins", "num_outs", "group_size"), CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_equals_its_twin(
    library: ctypes.CDLL, bits: int, num_ins: int, num_outs: int, group_size: int | None, bias: bool
):
    layer = make(bits, num_ins, num_outs, group_size, bias)
    x = torch.randn(7, num_ins)
    found = PackedMatrix(library, [layer]).multiply(x)[:, :num_outs]
    expected = multiply_plain(layer, x)
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    # and both are near the product with whole activations: 8 bits of the largest of 32
    whole = x @ (layer.weight.float() if bits == 16 else layer.dequantize(torch.float32)).t()
    whole = whole if layer.bias is None else whole + layer.bias.float()
    assert (found - whole).norm() < 0.01 * whole.norm()
    if bits < 16:
        assert (found - whole).norm() > 1e-4 * whole.norm()  # the rounding is really there


@pytest.mark.parametrize(("bits", "num_ins", "num_outs", "group_size"), CASES)
def test_a_row_does_not_depend_on_its_neighbours_or_the_threads(
    library: ctypes.CDLL, bits: int, num_ins: int, num_outs: int, group_size: int | None
):
    matrix = PackedMatrix(library, [make(bits, num_ins, num_outs, group_size)])
    x = torch.randn(23, num_ins)
    whole = matrix.multiply(x)
    for count in range(1, 14):
        assert torch.equal(matrix.multiply(x[3 : 3 + count]), whole[3 : 3 + count])
    torch.set_num_threads(2)
    assert torch.equal(matrix.multiply(x), whole)


def test_layers_are_joined_one_under_the_other_or_by_turns(library: ctypes.CDLL):
    first, second = make(4, 64, 64), make(4, 64, 32)
    x = torch.randn(3, 64)
    both = PackedMatrix(library, [first, second]).multiply(x)
    assert torch.equal(both[:, :64], PackedMatrix(library, [first]).multiply(x))
    assert torch.equal(both[:, 64:], PackedMatrix(library, [second]).multiply(x))
    gate, up = make(4, 64, 64, bias=True), make(4, 64, 64)
    turns = PackedMatrix(library, [gate, up], is_alternating=True).multiply(x).view(3, 2, 2, 32)
    assert torch.equal(turns[:, :, 0].flatten(1), PackedMatrix(library, [gate]).multiply(x))
    assert torch.equal(turns[:, :, 1].flatten(1), PackedMatrix(library, [up]).multiply(x))


def test_extreme_activations(library: ctypes.CDLL):
    layer = make(4, 64, 32)
    matrix = PackedMatrix(library, [layer])
    x = torch.zeros(4, 64)
    x[1] = 1e-30
    x[2, 5] = 1e6
    assert torch.allclose(matrix.multiply(x), multiply_plain(layer, x), rtol=1e-5)
    assert matrix.multiply(x)[0].abs().max() == 0
    x[3, 7] = float("nan")
    found = matrix.multiply(x)
    assert found[3].isnan().all() and found[:3].isfinite().all()
    x[3, 7] = float("inf")
    assert not matrix.multiply(x)[3].isfinite().any()


def test_activations_are_rounded_to_127_steps_of_the_largest():
    q, scale = quantize_rows(torch.tensor([[2.54, -1.0, 0.013, *[0.0] * 29]]))
    assert q[0, 0, :4].tolist() == [127, -50, 1, 0] and scale.item() == pytest.approx(0.02)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, None), (4, 64)])
def test_rounding_equals_the_search_in_pytorch(library: ctypes.CDLL, bits: int, group_size: int | None):
    torch.manual_seed(1)
    dense = nn.Linear(128, 48, bias=True).bfloat16()
    dense.weight.data[3] = 0
    dense.weight.data[4, 9] = 30.0
    slow, fast = LAYERS[bits].from_linear(dense, group_size), round_linear(library, dense, bits, group_size)
    error = [(x.dequantize(torch.float32) - dense.weight.float()).pow(2).sum().item() for x in (slow, fast)]
    assert error[1] == pytest.approx(error[0], rel=1e-4)
    assert (slow.weight_scale == fast.weight_scale).float().mean() > 0.98
    assert torch.equal(slow.bias, fast.bias)
    dense.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        round_linear(library, dense, bits, group_size)


def test_layers_without_a_kernel_are_named(library: ctypes.CDLL):
    dense = nn.Linear(64, 64, bias=False)
    for layer, words in (
        (dense, "float32"),
        (Int2Linear.from_linear(dense), "Int2Linear"),
        (Int4Linear.from_linear(dense, 16), "Groups of 16"),
        (Int8Linear.from_linear(dense), "float32 scales"),
        (nn.LayerNorm(3), "LayerNorm"),
    ):
        with pytest.raises(ConfigError, match=words):
            bits_of(layer)
    with pytest.raises(ConfigError, match="do not join"):
        PackedMatrix(library, [make(4, 64, 32), make(8, 64, 32)])


def test_committing_memory_changes_nothing_that_is_there():
    memory = allocate((6 << 20) + 1000)
    memory[::4096] = 7
    before = memory.clone()
    commit([memory, memory[:100], torch.zeros(10)], chunk_bytes=1 << 20)
    assert torch.equal(memory, before)
