"""What a training step holds in memory, part by part, found by doing the step with tensors that have no numbers.

The loop's own step (`modelwright.train.loop.Run.do_step`: model, adapter, objective, recomputation, clipping,
optimizer, average, layout) runs on fake tensors: shapes without storage. Every tensor that is made or freed moves a
count of bytes that live; the largest count is the peak, and what lives at that moment is told apart: weights,
gradients, optimizer state, logits, and activations with what is passing. So a plan knows what recomputation, an
adapter or a smaller batch does without a formula for any of them. What lives is counted exactly. The C library holds
more, because a hole serves no block of its own size (it looks for 112 bytes more when a block must be aligned), unless
it joins with what lies beside it (`modelwright.base.heap`); what is left is a measured share. Matrix products are
counted on the way.

Later steps begin with optimizer state in place, so the last of several is taken. Not seen: what libraries take for
themselves while they multiply, what a compiler would fuse away, and paged optimizer state, which stands outside of the
device by design.

Source: the idea is that of torch.distributed._tools.mem_tracker; this one is smaller and needs no module hooks.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from modelwright.nn import nf4
from modelwright.nn.nf4 import NF4Linear
from modelwright.optim import dynamic8
from modelwright.train.checkpoint import CheckpointConfig
from modelwright.train.layout import Layout
from modelwright.train.loop import LoopConfig, Run
from modelwright.train.objective import Objective

NUM_STEPS = 2
# Of activations and logits: what glibc holds beyond them in holes, in a process that began as `modelwright.base.heap`
# has it. Least squares (of the logarithm of planned / measured) over four runs of 8 layers of 512: all weights in
# bfloat16 (alone 0.14), LoRA in float32 (0.36), QLoRA (0.62), DDP (0.28); docs/log.md says what others want.
HELD_SHARE = 0.29
MAX_MICRO = 2  # micro-batches of an update that are traced; the others only wait in memory
_aten = torch.ops.aten
# Operations that take what a tensor of truth values chooses: of how many places, no fake tensor can know.
_CHOOSING = (
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index_put.default,
)
_FLASH = (
    (_aten._scaled_dot_product_flash_attention_for_cpu.default, 4),
    (_aten._scaled_dot_product_flash_attention_for_cpu_backward.default, 10),
)


@dataclass(frozen=True)
class Facts:
    """What the trace saw of the model and of the work, beside bytes."""

    parameters: int = 0  # frozen 4-bit weights counted as the numbers that they stand for
    matmul_parameters: int = 0  # those that take part in a matrix product for every token
    gradient_bytes: int = 0  # when all of them exist
    kept_bytes: int = 0  # what a checkpoint copies
    has_blocks: bool = False  # that can forget their activations
    flops: float = 0.0  # of the matrix products of a step


@dataclass(frozen=True)
class Footprint:
    """Bytes that live at the peak of a step, by part, and what the process holds beyond them."""

    weights: int
    gradients: int
    optimizer: int
    logits: int
    activations: int  # with temporary tensors and copies of weights in the compute type
    batch: int
    allocator: int = 0  # holes between blocks, and what was freed and not given back
    loading: int = 0  # what making the model takes beyond all that
    facts: Facts = field(default_factory=Facts)

    @property
    def total(self) -> int:
        """All parts together."""
        return self.live + self.allocator + self.loading

    @property
    def live(self) -> int:
        """What lives."""
        return self.weights + self.gradients + self.optimizer + self.logits + self.activations + self.batch


class _Ledger(TorchDispatchMode):
    """Counts the bytes of living storages, and remembers which lived when the count was largest."""

    def __init__(self, vocab_size: int, share: float) -> None:
        super().__init__()
        self.vocab_size, self.share = vocab_size, share
        self.serials: dict[int, int] = {}  # addresses are used again; a serial number is not
        self.sizes: dict[int, int] = {}
        self.is_logits: set[int] = set()
        self.now = self.peak = self.num_seen = 0
        self.at_peak: dict[int, int] = {}
        self.logits_at_peak: set[int] = set()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return (
                NotImplemented  # parts of a matrix are computed with first; what this rank does of it comes back here
            )
        if func is _aten._local_scalar_dense.default:
            return 1 if not args[0].dtype.is_floating_point else 1.0  # "are all trained?": yes
        if func is _aten.from_file.default:  # paged state: a file mapped into memory, not the device's
            paged = _aten.empty.memory_format([args[2]], dtype=(kwargs or {}).get("dtype"))
            self.serials[paged.untyped_storage()._cdata] = 0
            return paged
        if func in _CHOOSING:
            args = (args[0], self._places(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        self.flops += _flops_of(func, args, kwargs or {}, out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return out

    def _places(self, indices: Any) -> list[Tensor | None]:
        """Return choices by truth values as choices by numbers, of as many as are expected to be true."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                found.append(index)
            else:
                num = max(1, round(self.share * index.numel()))
                found += [torch.zeros(num, dtype=torch.int64) for _ in range(index.ndim)]
        return found

    def count(self, tensor: Tensor) -> None:
        """Add the storage of a tensor, if it is new; one on the meta device takes nothing."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self.serials:
            return
        self.num_seen += 1
        key = self.serials[storage._cdata] = self.num_seen
        size = self.sizes[key] = storage.nbytes()
        if tensor.ndim >= 2 and tensor.shape[-1] == self.vocab_size and tensor.shape[-2] != self.vocab_size:
            self.is_logits.add(key)
        self.now += size
        self._look()
        weakref.finalize(storage, self._forget, storage._cdata, key)

    def resize(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        """Follow a storage that is emptied and filled again: sharded weights are gathered that way."""
        key = self.serials.get(storage._cdata)
        if key is None:
            return
        before = self.sizes[key]
        self.now += num_bytes - before
        self.sizes[key] = num_bytes
        self._look()

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """See what is resized inside of the ``with``; no operation is dispatched for it."""
        plain = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, num_bytes: int) -> Any:
            self.resize(storage, num_bytes)
            return plain(storage, num_bytes)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]

    def _look(self) -> None:
        if self.now > self.peak:
            self.peak, self.at_peak, self.logits_at_peak = self.now, dict(self.sizes), set(self.is_logits)

    def keys(self, tensors: Any) -> set[int]:
        """Return the serial numbers of the storages of tensors."""
        found = {self.serials.get(_local(tensor).untyped_storage()._cdata) for tensor in tensors}
        return {key for key in found if key is not None}

    def _forget(self, address: int, key: int) -> None:
        self.serials.pop(address, None)
        self.now -= self.sizes.pop(key, 0)
        self.is_logits.discard(key)


class _Again:
    """A loader that gives the same kind of micro-batch for ever."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.next_batch = make


@contextlib.contextmanager
def _without_numbers() -> Iterator[None]:
    """Let tensors have shapes alone; tables that are made meanwhile and kept are made anew afterwards."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        nf4.forget_tables()
        dynamic8.forget_tables()


def trace_step(
    make_model: Callable[[], nn.Module],
    objective: Objective,
    make_micro_batch: Callable[[], Any],
    loop: LoopConfig,
    *,
    vocab_size: int,
    precision: str,
    trained_share: float = 1.0,
    layout: Layout | None = None,
) -> Footprint:
    """Return what a step of the loop holds at its peak.

    Args:
        make_model: Builds the model with its adapter; no weight is made, whatever it does to them.
        objective: Says what the loss is.
        make_micro_batch: Builds one micro-batch; its numbers do not matter.
        loop: Batch, accumulation, recomputation, optimizer and layout.
        vocab_size: The last size of logits.
        precision: bf16, fp16 or fp32.
        trained_share: Of the positions, those that an objective chooses to take a loss of.
        layout: Of several processes, with this one as one of them (`modelwright.train.plan_ranks`).
    """
    ledger = _Ledger(vocab_size, trained_share)
    settings = _settings(loop, precision)
    batches: dict[str, set[int]] = {"batch": set()}

    def next_batch() -> Any:
        batch = make_micro_batch()
        batches["batch"] |= ledger.keys(_tensors(batch))
        return batch

    with _without_numbers(), ledger, ledger.following():
        model = make_model()
        loading = ledger.peak
        vars(model)["to"] = lambda *_: model  # it is there already, and fake tensors cannot be moved in place
        run = Run(model, objective, _Again(next_batch), settings, layout)  # type: ignore[arg-type]
        known = {**_do_steps(run, ledger), **batches}
        known["gradients"] |= ledger.keys(run.layout.buckets)
        found = _by_part(ledger, known)
        kept = known["optimizer"] | ledger.keys(p for p in run.model.parameters() if p.requires_grad)
        times = loop.grad_accum_steps / settings.grad_accum_steps
        facts = _facts(run.model)
        facts = replace(
            facts,
            gradient_bytes=facts.gradient_bytes + sum(t.numel() * t.element_size() for t in run.layout.buckets),
            kept_bytes=sum(ledger.sizes.get(key, 0) for key in kept),
            flops=ledger.flops * times,
        )
        a_batch = sum(t.numel() * t.element_size() for t in _tensors(make_micro_batch()))
    waiting = (loop.grad_accum_steps - settings.grad_accum_steps) * a_batch
    held = round(HELD_SHARE * (found.activations + found.logits))
    found = replace(found, batch=found.batch + waiting, allocator=held)
    return replace(found, loading=max(0, loading - found.total), facts=facts)


def _settings(loop: LoopConfig, precision: str) -> LoopConfig:
    """Return the loop as it is traced; ranks divide an update's micro-batches, so all of them count."""
    is_shared_out = loop.parallel.inner * (loop.parallel.data or 1) > 1
    return replace(
        loop,
        num_steps=NUM_STEPS,
        grad_accum_steps=loop.grad_accum_steps if is_shared_out else min(loop.grad_accum_steps, MAX_MICRO),
        device="cpu",
        precision="bf16" if precision == "fp8" else precision,
        compile=False,
        checkpoint=CheckpointConfig(),
        lengths=None,
    )


def _do_steps(run: Run, ledger: _Ledger) -> dict[str, set[int]]:
    """Do the steps; return which storages are weights, gradients and optimizer state."""
    gradients: set[int] = set()
    plain = run.optimizer.step

    def step() -> None:
        gradients.update(ledger.keys(p.grad for p in run.optimizer.parameters() if p.grad is not None))
        plain()

    run.optimizer.step = step  # type: ignore[method-assign]
    for _ in range(NUM_STEPS):
        ledger.peak, ledger.flops = 0, 0.0
        run.do_step()
    states = ledger.keys(
        value
        for rule in run.optimizer.optimizers.values()
        for state in rule.state.values()
        for value in tree_leaves(state)
        if isinstance(value, Tensor)
    )
    if run.ema is not None:
        states |= ledger.keys(run.ema.averages.values())
    weights = ledger.keys(run.model.parameters()) | ledger.keys(run.model.buffers())
    return {"weights": weights, "gradients": gradients, "optimizer": states}


def _tensors(batch: Any) -> list[Tensor]:
    return [value for value in vars(batch).values() if isinstance(value, Tensor)]


def _by_part(ledger: _Ledger, known: dict[str, set[int]]) -> Footprint:
    sums = dict.fromkeys(("weights", "gradients", "optimizer", "logits", "activations", "batch"), 0)
    for key, size in ledger.at_peak.items():
        part = next((name for name, keys in known.items() if key in keys), "activations")
        if part == "activations" and key in ledger.logits_at_peak:
            part = "logits"
        sums[part] += size
    return Footprint(**sums)  # type: ignore[arg-type]


def _facts(model: nn.Module) -> Facts:
    packed = [m for m in model.modules() if isinstance(m, NF4Linear)]
    dense = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    in_4bit = sum(m.in_features * m.out_features for m in packed)
    trained = [_local(p) for p in model.parameters() if p.requires_grad]
    return Facts(
        parameters=sum(p.numel() for p in model.parameters()) + in_4bit,
        matmul_parameters=sum(p.numel() for p in dense.values()) + in_4bit,
        gradient_bytes=sum(p.numel() * p.element_size() for p in trained),
        has_blocks=any(name.rpartition(".")[2] == "layers" for name, _ in model.named_modules()),
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Return the FLOPs of an operation that is a matrix product or attention; 0 for the rest."""
    for attention, factor in _FLASH:
        if func is attention:
            q, k = (args[0], args[1]) if factor == 4 else (args[1], args[2])
            return float(factor * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3])
    packet = getattr(func, "_overloadpacket", None)
    return float(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0.0
