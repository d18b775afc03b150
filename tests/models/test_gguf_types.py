import numpy as np
import pytest
import torch

from modelwright.base.errors import CheckpointError
from modelwright.base.gguf_file import BLOCK_TYPES, TYPE_NUMBERS
from modelwright.models.gguf_types import READABLE, WRITABLE, pack, unpack

BLOCKED = [name for name in READABLE if name not in ("F32", "F16", "BF16", "F64")]


def random_blocks(name: str, count: int, seed: int = 0) -> np.ndarray:
    """Blocks of random bytes, every bit pattern of the scales included: infinities and NaN too."""
    size = BLOCK_TYPES[TYPE_NUMBERS[name]].block_bytes
    return np.random.default_rng(seed).integers(0, 256, count * size, dtype=np.uint8)


@pytest.mark.peer
@pytest.mark.parametrize("name", BLOCKED)
def test_random_blocks_unpack_bit_for_bit_as_in_the_reference(name: str):
    gguf = pytest.importorskip("gguf")
    length = BLOCK_TYPES[TYPE_NUMBERS[name]].block_len
    count = (1 << 14) + 37  # more than one piece
    data = random_blocks(name, count)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    ours = unpack(data, name, (count, length)).numpy()
    assert np.array_equal(ours.reshape(-1).view(np.uint32), expected.reshape(-1).view(np.uint32)) or np.array_equal(
        ours.reshape(-1), expected.reshape(-1), equal_nan=True
    )


def error(name: str, values: torch.Tensor) -> float:
    """Root mean square error over standard deviation, after packing and unpacking."""
    again = unpack(pack(values, name), name, values.shape, torch.float32)
    return float((again - values).pow(2).mean().sqrt() / values.std())


@pytest.mark.parametrize("kind", ["normal", "heavy", "positive"])
def test_k_formats_lose_less_than_plain_ones_of_as_many_bits(kind: str):
    values = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    values = {"normal": values, "heavy": values**3 * 2500, "positive": values.abs()}[kind]
    assert error("Q8_0", values) < error("Q6_K", values) < error("Q5_K", values) < error("Q4_K", values)
    assert error("Q4_K", values) < min(error("Q4_0", values), error("Q4_1", values))
    assert error("Q5_K", values) < 0.6 * error("Q4_K", values)
    if kind == "normal":  # near what the reference reaches: 4.5 bits at 0.072, 6.6 bits at 0.018
        assert error("Q4_K", values) < 0.075 and error("Q6_K", values) < 0.019


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_formats_keep_zeros_constants_and_their_own_values(name: str):
    zeros = torch.zeros(3, 256)
    assert torch.equal(unpack(pack(zeros, name), name, (3, 256)), zeros)
    constant = torch.full((1, 256), -0.75)
    assert (unpack(pack(constant, name), name, (1, 256)) - constant).abs().max() < 0.02
    values = torch.zeros(1, 256)
    values[0, 100] = 3.0  # one stretch alone is not zero
    again = unpack(pack(values, name), name, (1, 256))
    assert abs(float(again[0, 100]) - 3) < 0.05 and (again[0, :96] == 0).all()


@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name in WRITABLE if not name.endswith("_K")])
def test_packing_gives_the_bytes_of_the_reference(name: str):
    gguf = pytest.importorskip("gguf")
    values = torch.randn(300, 96, generator=torch.Generator().manual_seed(1)) * 3
    values[5] = 0  # blocks whose scale is zero
    values[6] = torch.arange(96.0) / 2  # halves, which round away from zero
    values[7] = -4.0
    expected = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[name])
    assert pack(values, name).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("name", "error"), [("F32", 0), ("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 8e-3), ("Q4_1", 0.08)])
def test_unpacking_what_was_packed_is_near(name: str, error: float):
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    again = unpack(pack(values, name), name, (4, 64), torch.float32)
    assert (again - values).abs().max() <= error * values.abs().max()


def test_plain_types_keep_their_dtype_and_can_be_asked_for_another():
    values = torch.randn(2, 32).to(torch.bfloat16)
    assert torch.equal(unpack(pack(values, "BF16"), "BF16", (2, 32)), values)
    assert unpack(pack(values, "BF16"), "BF16", (2, 32), torch.float16).dtype == torch.float16
    assert unpack(pack(values, "Q8_0"), "Q8_0", (2, 32)).dtype == torch.float32
    assert unpack(pack(values, "Q8_0"), "Q8_0", (2, 32), torch.bfloat16).dtype == torch.bfloat16


def test_a_block_worked_out_by_hand():
    """Q4_K: one scale of 0.5, one minimum of 0.25; stretch 0 has scale 3 and minimum 2, its first number is 5."""
    block = np.zeros(144, np.uint8)
    block[0:2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    block[2:4] = np.frombuffer(np.float16(0.25).tobytes(), np.uint8)
    block[4], block[8], block[16] = 3, 2, 5
    values = unpack(block, "Q4_K", (1, 256))[0]
    assert values[0] == 0.5 * 3 * 5 - 0.25 * 2
    assert values[1] == -0.5 and values[32] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_numbers_that_blocks_cannot_say_are_refused_by_name(name: str, bad: float):
    values = torch.ones(1, 32)
    values[0, 3] = bad
    with pytest.raises(CheckpointError, match=f"blk.0.w holds .*{name}"):
        pack(values, name, "blk.0.w")


def test_half_precision_refuses_what_it_would_turn_into_infinity():
    with pytest.raises(CheckpointError, match="w holds 100000, beyond"):
        pack(torch.tensor([1e5]), "F16", "w")


def test_formats_that_are_not_read_are_refused_by_name():
    with pytest.raises(CheckpointError, match="stored as IQ2_XS.*Q6_K"):
        unpack(np.zeros(74, np.uint8), "IQ2_XS", (1, 256))
