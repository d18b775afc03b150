"""What a training step holds in memory, part by part, found by doing the step with tensors that have no numbers.

The very code of the step (model, adapter, objective, recomputation, optimizer) runs on fake tensors: shapes without
storage. Every tensor that is made or freed moves a count of living bytes; the largest count is the peak, and what lives
at that moment is told apart: weights, gradients, optimizer state, logits, and activations with what is passing. So a
plan knows what recomputation, an adapter or a smaller batch does without a formula for any of them.

Two steps are done: the second one begins with optimizer state in place, as all later ones do. Not seen: what libraries
take for themselves while they multiply (`modelwright.train.budget` adds it), what a compiler would fuse away, and paged
optimizer state, which stands outside of the device by design.

Source: the idea is that of torch.distributed._tools.mem_tracker; this one is smaller and needs no module hooks.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modelwright.optim.build import make_optimizer
from modelwright.train.loop import LoopConfig
from modelwright.train.objective import Objective
from modelwright.train.recompute import apply_recompute


@dataclass(frozen=True)
class Footprint:
    """Bytes that live at the peak of a step, by part."""

    weights: int
    gradients: int
    optimizer: int
    logits: int
    activations: int  # with temporary tensors and copies of weights in the compute type
    batch: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.weights + self.gradients + self.optimizer + self.logits + self.activations + self.batch


class _Ledger(TorchDispatchMode):
    """Counts the bytes of living storages, and remembers which lived when the count was largest."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.serials: dict[int, int] = {}  # addresses are used again; a serial number is not
        self.sizes: dict[int, int] = {}
        self.is_logits: set[int] = set()
        self.now = self.peak = self.num_seen = 0
        self.at_peak: dict[int, int] = {}
        self.logits_at_peak: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1 if not args[0].dtype.is_floating_point else 1.0  # "are all trained?": yes
        if func is torch.ops.aten.from_file.default:  # paged state: a file mapped into memory, not the device's
            paged = torch.ops.aten.empty.memory_format([args[2]], dtype=(kwargs or {}).get("dtype"))
            self.serials[paged.untyped_storage()._cdata] = 0
            return paged
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return out

    def count(self, tensor: Tensor) -> None:
        """Add the storage of a tensor, if it is new."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.serials:
            return
        self.num_seen += 1
        key = self.serials[storage._cdata] = self.num_seen
        size = -(-storage.nbytes() // 64) * 64
        self.sizes[key] = size
        if tensor.ndim >= 2 and tensor.shape[-1] == self.vocab_size and tensor.shape[-2] != self.vocab_size:
            self.is_logits.add(key)
        self.now += size
        if self.now > self.peak:
            self.peak, self.at_peak, self.logits_at_peak = self.now, dict(self.sizes), set(self.is_logits)
        weakref.finalize(storage, self._forget, storage._cdata, key)

    def keys(self, tensors: Any) -> set[int]:
        """Return the serial numbers of the storages of tensors."""
        found = {self.serials.get(tensor.untyped_storage()._cdata) for tensor in tensors}
        return {key for key in found if key is not None}

    def _forget(self, address: int, key: int) -> None:
        self.serials.pop(address, None)
        self.now -= self.sizes.pop(key, 0)
        self.is_logits.discard(key)


def trace_step(
    make_model: Callable[[], nn.Module],
    objective: Objective,
    make_micro_batch: Callable[[], Any],
    loop: LoopConfig,
    *,
    vocab_size: int,
    precision: str,
) -> Footprint:
    """Return what a step of the loop holds at its peak.

    Args:
        make_model: Builds the model with its adapter; no weight is made, whatever it does to them.
        objective: Says what the loss is.
        make_micro_batch: Builds one micro-batch; its numbers do not matter.
        loop: Batch, accumulation, recomputation and optimizer.
        vocab_size: The last size of logits.
        precision: bf16, fp16 or fp32.
    """
    ledger = _Ledger(vocab_size)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        model = make_model().train()
        apply_recompute(model, loop.recompute)
        optimizer = make_optimizer(model, loop.optimizer)
        for _ in range(2):
            ledger.peak = 0
            for _ in range(min(loop.grad_accum_steps, 2)):
                batch = make_micro_batch()
                with _autocast(precision):
                    loss = objective.loss(model, batch)
                loss.backward()
                del loss
            gradients = ledger.keys(p.grad for p in optimizer.parameters() if p.grad is not None)
            optimizer.step()
            if ledger.now > ledger.peak:
                ledger.peak, ledger.at_peak = ledger.now, dict(ledger.sizes)
            states = ledger.keys(
                value
                for rule in optimizer.optimizers.values()
                for state in rule.state.values()
                for value in tree_leaves(state)
                if isinstance(value, Tensor)
            )
            optimizer.zero_grad()
        return _by_part(
            ledger,
            ledger.keys(model.parameters()) | ledger.keys(model.buffers()),
            gradients,
            states,
            _batch(ledger, batch),
        )


def _by_part(ledger: _Ledger, weights: set[int], gradients: set[int], states: set[int], batch: set[int]) -> Footprint:
    sums = dict.fromkeys(("weights", "gradients", "optimizer", "logits", "activations", "batch"), 0)
    for key, size in ledger.at_peak.items():
        part = "activations"
        for name, keys in (("weights", weights), ("gradients", gradients), ("optimizer", states), ("batch", batch)):
            if key in keys:
                part = name
        if part == "activations" and key in ledger.logits_at_peak:
            part = "logits"
        sums[part] += size
    return Footprint(**sums)


def _batch(ledger: _Ledger, batch: Any) -> set[int]:
    return ledger.keys(value for value in vars(batch).values() if isinstance(value, Tensor))


@contextlib.contextmanager
def _autocast(precision: str) -> Iterator[None]:
    if precision == "fp32":
        yield
        return
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast("cpu", dtype=dtype):
        yield
