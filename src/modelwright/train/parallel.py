"""Many processes, one training run: how a model and its batches are laid over them, from outside of the model.

Five degrees, any product of them: ``data`` copies, each on other rows; ``shard`` ranks that also see other rows and
keep a part of weights, gradients and optimizer state each (FSDP2); ``context`` ranks that see other positions of the
same rows (`modelwright.nn.ring`); ``tensor`` ranks that compute a part of each layer (`train.tensor_parallel`);
``pipeline`` ranks that hold some of the layers (`train.pipeline`). Ranks of one tensor group stand beside each other,
those of a pipeline farthest apart.

The layout does not change what is trained: an update is still ``micro_batch_size x grad_accum_steps`` rows, which the
data and shard ranks divide among themselves, and its gradient is that of one process.

Source: Li et al. 2020, arXiv:2006.15704 (DDP); Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO); Zhao et al. 2023,
arXiv:2304.11277 (FSDP); Shoeybi et al. 2019, arXiv:1909.08053 (tensor); Narayanan et al. 2021, arXiv:2104.04473
(products, interleaved schedule). Not here: experts on different ranks, a sequence split between the tensor ranks.
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from modelwright.base import distributed
from modelwright.base.errors import ConfigError
from modelwright.base.pulse import Pulse
from modelwright.nn.ring import use_ring
from modelwright.optim.parts import local_part
from modelwright.train.layout import Layout
from modelwright.train.memory import is_out_of_memory
from modelwright.train.objective import Objective, unwrap
from modelwright.train.pipeline import Pipeline
from modelwright.train.sequence_parallel import check_context, cut_positions
from modelwright.train.tensor_parallel import apply_tensor

if TYPE_CHECKING:
    from modelwright.train.loop import LoopConfig, Run

SCHEDULES = ("1f1b", "interleaved")
GATHERED = ("fp32", "bf16")
# Rules that look at more of a matrix than one number at a time, or keep their state in an order of its own.
UNSHARDED_RULES = ("adamw8bit", "paged_adamw", "paged_adamw8bit", "adafactor")


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes of a launch share the work; their number is the product of the degrees."""

    data: int | None = None  # copies of the model on different rows; None: as many as the other degrees leave
    shard: int = 1  # ranks with different rows that keep a part of every weight each
    zero: int = 3  # what they share: 1 optimizer state, 2 gradients too, 3 weights too
    gather: str = (
        "fp32"  # in which weights travel to the ranks that compute with them: fp32, or bf16 beside bf16 products
    )
    tensor: int = 1  # ranks that compute a part of each layer
    context: int = 1  # ranks that see a part of each row
    pipeline: int = 1  # ranks that hold a part of the layers
    schedule: str = "1f1b"  # of the pipeline: 1f1b, or interleaved (several stages a rank, less waiting)
    stages_per_rank: int = 2  # of the interleaved schedule
    dead_after_seconds: float = 30.0  # a rank that gives no sign of life for so long ends the run

    def __post_init__(self) -> None:
        for name in ("data", "shard", "tensor", "context", "pipeline"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"loop.parallel.{name} is {value}; it must be at least 1.")
        for name, known in (("schedule", SCHEDULES), ("gather", GATHERED), ("zero", (1, 2, 3))):
            if getattr(self, name) not in known:
                found = ", ".join(map(str, known))
                raise ConfigError(f"loop.parallel.{name} is {getattr(self, name)!r}; known: {found}. Use one of these.")
        idle = [
            (self.zero != 3 and self.shard == 1, "zero", "shard is 1: nothing is shared out"),
            (self.gather != "fp32" and self.shard * self.context == 1, "gather", "shard is 1: nothing is gathered"),
            (self.schedule != "1f1b" and self.pipeline == 1, "schedule", "pipeline is 1: there are no stages"),
            (self.stages_per_rank != 2 and self.schedule != "interleaved", "stages_per_rank", "schedule is 1f1b"),
        ]
        for is_idle, name, why in idle:
            if is_idle:
                raise ConfigError(f"loop.parallel.{name} is {getattr(self, name)!r}, but {why}. Remove it.")
        if self.stages_per_rank < 2:
            raise ConfigError(
                f"loop.parallel.stages_per_rank is {self.stages_per_rank}; interleaving needs at least 2."
            )
        if not self.dead_after_seconds > 0:
            raise ConfigError(f"loop.parallel.dead_after_seconds is {self.dead_after_seconds}; it must be above 0.")

    @property
    def inner(self) -> int:
        """Ranks that one copy of the model lies on."""
        return self.shard * self.tensor * self.context * self.pipeline


def make_layout(config: ParallelConfig, device: torch.device, precision: str) -> Layout:
    """Return the layout of this launch: the settings' one, or one process alone.

    Raises:
        ConfigError: The degrees do not fit the number of processes.
    """
    num_ranks = distributed.world_size()
    if not distributed.is_distributed():
        wanted = config.inner * (config.data or 1)
        if wanted > 1:
            raise ConfigError(
                f"loop.parallel asks for {wanted} processes, and this is one alone. Start them with: torchrun "
                f"--nproc-per-node {wanted} -m modelwright train RECIPE"
            )
        return Layout()
    data = config.data or max(1, num_ranks // config.inner)
    if data * config.inner != num_ranks:
        degrees = ", ".join(f"{name} {getattr(config, name) or data}" for name in MESH)
        raise ConfigError(
            f"loop.parallel has {degrees}, which is {data * config.inner} processes, and {num_ranks} were started. "
            "Change a degree or the number of processes."
        )
    return ParallelLayout(replace(config, data=data), device, precision)


MESH = ("pipeline", "data", "shard", "context", "tensor")


class ParallelLayout(Layout):
    """Several processes, as `ParallelConfig` says."""

    is_parallel = True
    pipeline_class = Pipeline

    def __init__(self, config: ParallelConfig, device: torch.device, precision: str):
        self.config, self.device, self.precision = config, device, precision
        sizes = {name: int(getattr(config, name) or 1) for name in MESH}
        self.mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=MESH)
        self.sizes = sizes
        self.num_parts = sizes["data"] * sizes["shard"] * sizes["context"]
        seeing = [name for name in ("data", "shard", "context") if sizes[name] > 1]
        self.group = self._joined(seeing).get_group() if seeing else self.mesh["data"].get_group()
        self.row_ranks = sizes["data"] * sizes["shard"]
        place = {name: self.mesh.get_local_rank(name) for name in MESH}
        self.row_rank = place["data"] * sizes["shard"] + place["shard"]
        self.context_rank, self.tensor_rank = place["context"], place["tensor"]
        self.pipeline: Pipeline | None = None
        self.is_ddp = self.num_parts == sizes["data"] > 1 and sizes["tensor"] == sizes["pipeline"] == 1
        self.gradient_factor = float(sizes["data"]) if self.is_ddp else 1.0
        self._synced: list[nn.Module] = []  # what reduces gradients by itself
        self._skeleton: nn.Module | None = None

    def _joined(self, names: Sequence[str]) -> DeviceMesh:
        """Return the mesh of one or several of the degrees as one axis."""
        if len(names) == 1:
            return self.mesh[names[0]]
        return self.mesh[tuple(names)]._flatten("_".join(names))

    def check(self, config: "LoopConfig") -> None:
        """Refuse settings of the loop that would not train the same here as in one process.

        Raises:
            ConfigError: One of them is set.
        """
        is_cut = self.sizes["shard"] * self.sizes["tensor"] > 1 or (self.num_parts > 1 and not self.is_ddp)
        if is_cut and config.optimizer.name in UNSHARDED_RULES:
            raise ConfigError(
                f"loop.optimizer.name is {config.optimizer.name!r}, and loop.parallel cuts matrices into parts: its "
                "state is kept by blocks or by whole rows. Use adamw, lion or muon, or data or pipeline alone."
            )
        if config.compile:
            raise ConfigError("loop.compile is set, and loop.parallel too; the two are not combined. Leave one out.")
        if self.sizes["tensor"] > 1 and config.precision == "fp8":
            raise ConfigError("loop.precision is 'fp8' and loop.parallel.tensor above 1; use bf16, or shard instead.")
        if self.sizes["pipeline"] > 1 and config.recompute.name == "selective":
            raise ConfigError("loop.recompute.name is 'selective' in a pipeline; use layers.")
        if self.sizes["pipeline"] > 1 and config.lengths is not None:
            raise ConfigError("loop.lengths is set in a pipeline, whose stages pass on rows of one length. Remove it.")

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Cut the model for the degrees, tensor first, then pipeline, then data and shard."""
        self._skeleton = _without_numbers(model)
        if self.sizes["context"] > 1:
            check_context(model)
        if self.sizes["tensor"] > 1:
            apply_tensor(model, self.mesh["tensor"])
        if self.sizes["pipeline"] > 1:
            self.pipeline = self.pipeline_class(model, self.mesh["pipeline"], self.config, device)
            units: list[nn.Module] = list(self.pipeline.segments)
            whole: nn.Module = self.pipeline.model
        else:
            units, whole = [model], model
        if self.is_ddp:
            wrapped = DistributedDataParallel(model.to(device), process_group=self.group)
            self._synced = [wrapped]
            return wrapped
        if self.num_parts > 1:
            mesh = self._shard_mesh()
            for unit in units:
                self._shard(unit, mesh)
            self._synced = units
        else:
            self.move(whole, device)
        return whole

    def move(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Move what is not cut by `_shard`, which moves what it cuts."""
        return module.to(device)

    def _shard_mesh(self) -> DeviceMesh:
        """Return the mesh of FSDP2: copies by parts, where there are copies. Context ranks share the parts too."""
        parts = [name for name in ("shard", "context") if self.sizes[name] > 1] or ["shard"]
        if self.sizes["data"] == 1:
            return self._joined(parts)
        if len(parts) == 1:
            return self.mesh[("data", parts[0])]
        raise ConfigError(
            "loop.parallel has data, shard and context above 1 together; put the copies into shard (data 1)."
        )

    def _shard(self, unit: nn.Module, mesh: DeviceMesh) -> None:
        policy = MixedPrecisionPolicy()
        if self.config.gather == "bf16":
            # Inputs are not cast: the stream and the tables of rotation stay float32, as under autocast alone.
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": policy,
            "reshard_after_forward": None if self.config.zero == 3 else False,
        }
        for name, layers in list(unit.named_modules()):
            if name.rpartition(".")[2] == "layers" and isinstance(layers, (nn.ModuleList, nn.ModuleDict)):
                for block in layers.values() if isinstance(layers, nn.ModuleDict) else layers:
                    fully_shard(block, **options)
        # The empty logits of a model that leaves its output matrix to the loss are a view that nobody writes to.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        fully_shard(unit, **options)
        assert isinstance(unit, FSDPModule)
        for module in unit.modules():
            if isinstance(module, FSDPModule):
                # Losses are divided by the tokens of the whole batch already: gradients are added, not averaged.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def next_batches(self, loader: Any, num: int) -> list[Any]:
        """Take an update's micro-batches; this rank keeps whole ones where they divide, else rows of some.

        Raises:
            ConfigError: The rows cannot be divided among the ranks.
        """
        shared = math.gcd(num, self.row_ranks)
        per_group, ranks_per_batch = num // shared, self.row_ranks // shared
        first = self.row_rank // ranks_per_batch * per_group
        kept = []
        for index in range(num):
            if first <= index < first + per_group:
                kept.append(_rows_of(loader.next_batch(), self.row_rank % ranks_per_batch, ranks_per_batch))
            elif hasattr(loader, "skip_batch"):
                loader.skip_batch()
            else:
                loader.next_batch()
        return kept

    def part_of(self, batch: Any) -> Any:
        """Return the positions of this rank."""
        if self.sizes["context"] == 1:
            return batch
        return cut_positions(batch, self.context_rank, self.sizes["context"])

    @contextlib.contextmanager
    def micro_step(self, *, is_last: bool) -> Iterator[None]:
        """Let gradients meet when they must: in the last micro-batch, or in each where they are kept in parts."""
        with contextlib.ExitStack() as stack:
            for module in self._synced:
                if isinstance(module, DistributedDataParallel):
                    if not is_last:
                        stack.enter_context(module.no_sync())
                elif isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(is_last or self.config.zero > 1)
                    module.set_is_last_backward(is_last)
            yield

    def accumulate(self, run: "Run", objective: Objective, batches: Sequence[Any], num_trained: float) -> Tensor:
        """Add the gradients of an update: micro-batch by micro-batch, or through the pipeline."""
        with contextlib.ExitStack() as stack:
            if self.sizes["context"] > 1:
                row_len = batches[0].input_ids.shape[1] * self.sizes["context"]
                stack.enter_context(use_ring(self.mesh["context"].get_group(), row_len))
            if self.pipeline is None:
                return super().accumulate(run, objective, batches, num_trained)
            return self.pipeline.accumulate(run, objective, batches, num_trained)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the other ranks for the time of the ``with``; an exchange that broke is explained by who died.

        Raises:
            DeviceError: Another rank has died or failed; the message names it.
        """
        pulse, words = Pulse(self.config.dead_after_seconds), None
        try:
            yield
        except BaseException as error:
            found = None
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                found = pulse.explain()
            words = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            if found is not None:
                words = None  # it was the other one: not to be told again as this rank's own failure
                raise found from error
            raise
        finally:
            pulse.close(words)

    @torch.no_grad()
    def clip(self, named: Sequence[tuple[str, Tensor]], max_norm: float | None) -> float:
        """Scale the gradients by the norm of all of them, each part of each matrix counted once."""
        copies = dist.get_world_size() / self.sizes["pipeline"]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        local = []
        for name, gradient in named:
            mine = local_part(gradient)
            local.append(mine)
            if self.pipeline is not None and self.pipeline.is_second_copy(name):
                continue
            total += mine.double().square().sum() * (_num_parts(gradient) / copies)
        dist.all_reduce(total)
        norm = float(total.sqrt())
        if max_norm is not None and local:
            factor = min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0
            torch._foreach_mul_(local, factor)
        return norm

    def whole_model(self, model: nn.Module, given: nn.Module) -> nn.Module:
        """Gather the model: on the first rank with all its weights on the CPU, elsewhere without numbers."""
        assert self._skeleton is not None
        if self.is_ddp:
            return unwrap(model)
        found = self._gather(unwrap(model))
        if distributed.rank() == 0:
            self._skeleton.load_state_dict(found, strict=False, assign=True)
            for module in self._skeleton.modules():
                if hasattr(module, "reset_buffers"):
                    module.reset_buffers(torch.device("cpu"))  # type: ignore[operator]
            if hasattr(self._skeleton, "tie_weights"):
                self._skeleton.tie_weights()  # type: ignore[operator]
        # Whoever handed the model in finds it whole again: hooks and classes of the layout are gone from it.
        given.__class__, given.__dict__ = self._skeleton.__class__, self._skeleton.__dict__
        return given

    def whole_gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a copy of every gradient by name, whole, on the first rank; all ranks must call."""
        mine = {n: whole_tensor(p.grad).clone() for n, p in unwrap(model).named_parameters() if p.grad is not None}
        if self.pipeline is None:
            return mine
        return self.pipeline.gather({n: g.cpu() for n, g in mine.items() if not self.pipeline.is_second_copy(n)})

    @torch.no_grad()
    def _gather(self, model: nn.Module) -> dict[str, Tensor]:
        mine = {}
        for name, value in model.state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if dist.get_rank(self.mesh["data"].get_group()) == 0:
                mine[name] = whole.detach().to("cpu", copy=True)
        return mine if self.pipeline is None else self.pipeline.gather(mine)


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor that may lie on several ranks in one piece, on each of them; all of its ranks must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _num_parts(tensor: Tensor) -> int:
    """Return into how many different parts a tensor is cut."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not isinstance(placement, Replicate))


def _rows_of(batch: Any, index: int, num: int) -> Any:
    """Return one of ``num`` equal parts of a micro-batch's rows."""
    if num == 1:
        return batch
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    num_rows = next(v.shape[0] for v in values.values() if isinstance(v, Tensor))
    if num_rows % num:
        raise ConfigError(
            f"A micro-batch of {num_rows} rows is to be divided among {num} ranks. Make loop.micro_batch_size x "
            "loop.grad_accum_steps a multiple of loop.parallel.data x loop.parallel.shard."
        )
    size = num_rows // num
    part = slice(index * size, (index + 1) * size)
    return replace(batch, **{n: v[part] for n, v in values.items() if isinstance(v, Tensor) and v.shape[0] == num_rows})


def _without_numbers(model: nn.Module) -> nn.Module:
    """Return a copy on the meta device: structure, names and shapes."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): b.to("meta") for b in model.buffers()}
    found = copy.deepcopy(model, memo)
    for module in found.modules():  # recomputation replaces the forward of blocks; the copy is of the plain model
        module.__dict__.pop("forward", None)
        module.__dict__.pop("plain_forward", None)
    return found
