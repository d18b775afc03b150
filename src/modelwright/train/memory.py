"""When memory runs out: say what was being done and which setting of the run makes it need less."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from modelwright.base.errors import OutOfMemoryError

if TYPE_CHECKING:
    from modelwright.train.loop import LoopConfig

# What the allocator of the CPU says; it raises a plain RuntimeError.
_SIGNS = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that a device or the machine had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextlib.contextmanager
def explain_out_of_memory(config: "LoopConfig") -> Iterator[None]:
    """Turn an allocator's error inside the ``with`` into one that names what to change.

    Raises:
        OutOfMemoryError: The memory was not enough.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutOfMemoryError(
            f"Out of memory in a training step ({first}). What was saved stays. The step has "
            f"{config.micro_batch_size} rows at a time; to need less: {'; '.join(advice(config))}. "
            "`mw plan RECIPE` shows the parts before anything is spent."
        ) from error


def advice(config: "LoopConfig") -> list[str]:
    """Return what would lower a run's memory, the cheapest first; only what is not done already."""
    found = []
    if config.micro_batch_size > 1:
        half = config.micro_batch_size // 2
        found.append(
            f"loop.micro_batch_size={half} with loop.grad_accum_steps={config.grad_accum_steps * 2} (the same update)"
        )
    if config.recompute.name == "none":
        found.append("loop.recompute.name=layers (activations, for a third more time)")
    if config.precision == "fp32":
        found.append("loop.precision=bf16 (activations)")
    if config.optimizer.name not in ("adamw8bit", "adafactor"):
        found.append("loop.optimizer.name=adamw8bit or adafactor (optimizer state)")
    return [*found, "shorter rows (max_seq_len)", "a low-rank adapter instead of all weights"]
