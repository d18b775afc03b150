"""Eight-bit numbers for optimizer state: a code of 256 values spread over seven orders of magnitude, a scale a block.

    x ~ code[q] * absmax(block),   q nearest;   blocks of 256 neighbours

The code is dynamic: the larger the exponent, the more of the bits say the fraction, so that both the largest numbers
of a block and those a million times smaller keep some precision. Values and block size are those of bitsandbytes.

Source: Dettmers et al. 2022, arXiv:2110.02861, sections 1.3 and 2.1; `create_dynamic_map` of bitsandbytes.
"""

import functools

import torch
from torch import Tensor

BLOCK = 256
NUM_EXPONENTS = 7


@functools.cache
def dynamic_code(is_signed: bool) -> Tensor:
    """Return the 256 values of the code, ascending, from -1 (or 0) to 1.

    >>> code = dynamic_code(True); len(code), code[0].item() > -1, code[-1].item()
    (256, True, 1.0)
    """
    values = [0.0, 1.0]
    for i in range(NUM_EXPONENTS):
        edges = torch.linspace(0.1, 1.0, 2 ** (i if is_signed else i + 1) + 1)
        means = 10.0 ** (i + 1 - NUM_EXPONENTS) * (edges[:-1] + edges[1:]) / 2
        values += means.tolist()
        if is_signed:
            values += (-means).tolist()
    return torch.tensor(sorted(values))


@functools.cache
def _tables(is_signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    code = dynamic_code(is_signed).to(device)
    return code, (code[1:] + code[:-1]) / 2


def forget_tables() -> None:
    """Make the tables anew when they are next wanted: those made while a step is traced without numbers hold none."""
    dynamic_code.cache_clear()
    _tables.cache_clear()


def quantize(values: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a flat float32 tensor.

    Args:
        values: (n,), n a multiple of 256.
        is_signed: False for numbers that are never negative; they get a bit more.

    Returns:
        uint8 (n,) and float32 (n / 256,).
    """
    _, middles = _tables(is_signed, values.device)
    blocks = values.view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    relative = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return torch.bucketize(relative, middles).to(torch.uint8).view(-1), scales


def dequantize(codes: Tensor, scales: Tensor, is_signed: bool) -> Tensor:
    """Return the numbers that codes and scales stand for, float32 (n,)."""
    code, _ = _tables(is_signed, codes.device)
    return (code[codes.int()].view(-1, BLOCK) * scales[:, None]).view(-1)
