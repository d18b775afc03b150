"""Length warm-up: short rows first. A batch keeps its tokens; each row is cut into pieces that become rows.

Early in training a model learns what stands near; short rows cost less attention and make the first steps calmer. The
row length grows in powers of two from ``first_len`` to the whole row over ``num_steps`` steps, so that a compiled loss
meets few shapes. Attention stays within a piece. Positions begin anew, or stay those of the document where the batch
has them (only their differences matter to a rotary model).

Source: Press et al. 2021, arXiv:2012.15832, section 4 (staged training); Li et al. 2022, arXiv:2108.06084 (stability).
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modelwright.base.errors import ConfigError
from modelwright.data.load import Batch


@dataclass(frozen=True)
class LengthConfig:
    """How fast rows grow."""

    first_len: int = 64  # tokens a row at the first step; it must divide the row length by a power of two
    num_steps: int = 100  # steps until rows are whole

    def __post_init__(self) -> None:
        if self.first_len < 1 or self.num_steps < 1:
            raise ConfigError(
                f"loop.lengths has first_len {self.first_len} and num_steps {self.num_steps}; both must be at least 1."
            )


def length_at(step: int, row_len: int, config: LengthConfig) -> int:
    """Return the length of the rows at a step, counted from 0.

    >>> [length_at(step, 256, LengthConfig(64, 30)) for step in (0, 9, 10, 19, 20, 29, 30)]
    [64, 64, 128, 128, 256, 256, 256]

    Raises:
        ConfigError: The row length is not the first length times a power of two.
    """
    times, rest = divmod(row_len, config.first_len)
    if rest or times & (times - 1):
        raise ConfigError(
            f"loop.lengths.first_len is {config.first_len} and rows have {row_len} tokens; the row length must be it "
            "times a power of two."
        )
    num_stages = times.bit_length()  # 64, 128, 256 are three
    stage = min(step * num_stages // config.num_steps, num_stages - 1)
    return config.first_len << stage


def cut_rows(batch: Any, length: int) -> Any:
    """Cut each row of a batch of token ids into rows of ``length``."""
    if not isinstance(batch, Batch) or batch.input_ids.shape[1] == length:
        return batch
    positions = None if batch.positions is None else _cut(batch.positions, length)
    return Batch(_cut(batch.input_ids, length), _cut(batch.labels, length), positions, _cut_mask(batch.mask, length))


def _cut(rows: Tensor, length: int) -> Tensor:
    return rows.reshape(-1, length)


def _cut_mask(mask: Tensor | None, length: int) -> Tensor | None:
    """Take the blocks along the diagonal of (B, 1, T, T)."""
    if mask is None:
        return None
    batch, one, size, _ = mask.shape
    blocks = mask.reshape(batch, one, size // length, length, size // length, length)
    return blocks.diagonal(dim1=2, dim2=4).permute(0, 4, 1, 2, 3).reshape(-1, one, length, length)
