"""Checkpoints that several ranks write together, each its own parts, and that any other layout can read.

A checkpoint is a folder ``step-N`` as ever, with the tensors below ``shards/`` in the format of
torch.distributed.checkpoint and the rest in ``state.json``. Names are those of the whole model, so a reader takes the
parts that it needs, whatever ranks wrote them: one process, two shards, a pipeline. Parameters that stand on several
ranks are written once. A copy is taken between two steps and written by a thread of each rank over a group of its own;
the folder gets its name from the first rank when all ranks have written.

Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html (format).
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from modelwright.base import distributed
from modelwright.base.errors import CheckpointError, DeviceError
from modelwright.base.files import write_json
from modelwright.models.assemble import build_empty
from modelwright.models.weights import read_config, save_model
from modelwright.optim.parts import local_part
from modelwright.train.objective import unwrap

if TYPE_CHECKING:
    from modelwright.train.loop import Run

SHARDS, STATE = "shards", "state.json"


def changing(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes: trainable parameters, and running statistics where there are some."""
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    seen: set[int] = set()
    found = {}
    for name, tensor in unwrap(model).state_dict(keep_vars=True).items():
        if id(tensor) not in frozen and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


@dataclass(frozen=True)
class ShardedSnapshot:
    """This rank's part of a copy of a run in memory."""

    step: int
    tensors: dict[str, Tensor]  # on the CPU, by their names in the checkpoint
    state: dict[str, Any]
    config: dict[str, Any] | None  # the published config.json of a model that has one
    group: Any  # gloo, for the thread that writes

    def write(self, folder: Path, num_kept: int) -> Path:
        """Write ``folder/step-N`` together with the other ranks, and remove all but the newest few.

        Raises:
            DeviceError: A rank could not write; earlier checkpoints stay.
        """
        path, is_first = Path(folder) / f"step-{self.step:08d}", dist.get_rank(self.group) == 0
        work = Path(folder) / f".step-{self.step:08d}.work"
        try:
            writer = FileSystemWriter(work / SHARDS, sync_files=True)
            dcp.save(self.tensors, storage_writer=writer, process_group=self.group)
            if is_first:
                if self.config is not None:
                    write_json(work / "config.json", self.config)
                write_json(work / STATE, self.state)
                _sync(work)
                if path.exists():  # written before a roll back
                    shutil.rmtree(path)
                os.replace(work, path)
                _sync(path.parent)
                for old in sorted(p for p in Path(folder).glob("step-*") if (p / STATE).is_file())[:-num_kept]:
                    shutil.rmtree(old)
        except Exception as error:
            if is_first:
                shutil.rmtree(work, ignore_errors=True)
            raise DeviceError(
                f"The checkpoint {path} was not written by all ranks: {error}. Earlier ones stay; look at the disk and "
                "at the other ranks."
            ) from error
        dist.barrier(self.group)  # nobody looks for checkpoints before this one has its name
        return path


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_writing: list[tuple[Any, Any]] = []  # the group of all ranks, and that of their threads


def _writing_group() -> Any:
    """Return the group of the threads that write, made once a launch; all ranks must call the first time together."""
    if not _writing or _writing[0][0] is not dist.group.WORLD:
        _writing[:] = [(dist.group.WORLD, dist.new_group(backend="gloo"))]
    return _writing[0][1]


def stored_name(run: "Run", name: str) -> str:
    """Return under which name a parameter is stored: that of the first of two tied ones."""
    pipeline = getattr(run.layout, "pipeline", None)
    return "embed.weight" if pipeline is not None and pipeline.is_second_copy(name) else name


def _is_stored(run: "Run", name: str) -> bool:
    return stored_name(run, name) == name


def take_shards(run: "Run", state: dict[str, Any], config: dict[str, Any] | None) -> ShardedSnapshot:
    """Copy this rank's part of everything that decides how the run goes on; ``state`` is what JSON can hold."""
    names = {id(p): n for n, p in unwrap(run.model).named_parameters()}
    found = {f"model/{n}": t for n, t in changing(run.model).items() if _is_stored(run, n)}
    scalars: dict[str, Any] = {}
    for kind, optimizer in run.optimizer.optimizers.items():
        for parameter, values in optimizer.state.items():
            name = names[id(parameter)]
            for key, value in values.items() if _is_stored(run, name) else ():
                if isinstance(value, Tensor):
                    found[f"optimizer/{kind}/{name}/{key}"] = value
                else:
                    scalars[f"{kind}/{name}/{key}"] = value
    if run.ema is not None:
        found |= {f"ema/{_bare(n)}": t for n, t in run.ema.averages.items() if _is_stored(run, _bare(n))}
    found[f"random/{distributed.rank()}"] = torch.get_rng_state()
    if run.device.type == "cuda":
        found[f"cuda_random/{distributed.rank()}"] = torch.cuda.get_rng_state(run.device)
    everyones: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(everyones, scalars, group=_writing_group())
    state = {**state, "optimizer": {key: value for some in everyones for key, value in some.items()}}
    copies = {name: _copy_to_cpu(tensor) for name, tensor in found.items()}
    return ShardedSnapshot(run.step, copies, state, config, _writing_group())


def _bare(name: str) -> str:
    return name.removeprefix("module.")


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    local = local_part(tensor.detach()).to("cpu", copy=True).contiguous()
    if not isinstance(tensor, DTensor):
        return local
    return DTensor(local, tensor._spec, requires_grad=False)


def is_sharded(path: Path) -> bool:
    """Tell whether a checkpoint was written by several ranks."""
    return (Path(path) / SHARDS / ".metadata").is_file()


class StoredTensors:
    """The tensors of a checkpoint of several ranks by name: their shapes, and their numbers cut for this run."""

    def __init__(self, path: Path):
        self.path = path / SHARDS
        try:
            self.known = FileSystemReader(self.path).read_metadata().state_dict_metadata
        except Exception as error:  # a pickle: anything can be wrong with it
            raise CheckpointError(
                f"The checkpoint {path} is damaged: {error}. Remove it to take the one before."
            ) from error

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a stored tensor, None where there is none of this name."""
        found = self.known.get(name)
        return None if found is None else tuple(found.size)  # type: ignore[union-attr]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a stored tensor."""
        return self.known[name].properties.dtype  # type: ignore[union-attr,no-any-return]

    def load(self, targets: dict[str, Tensor]) -> None:
        """Fill tensors, plain or in parts, by name."""
        try:
            dcp.load(targets, storage_reader=FileSystemReader(self.path), no_dist=not distributed.is_distributed())
        except Exception as error:
            raise CheckpointError(f"{self.path} is damaged: {error}. Remove it to take the one before.") from error


class WholeTensors:
    """The tensors of a checkpoint of one process, by the same names."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.known = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a stored tensor, None where there is none of this name."""
        return tuple(self.known[name].shape) if name in self.known else None

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a stored tensor."""
        return self.known[name].dtype

    def load(self, targets: dict[str, Tensor]) -> None:
        """Fill tensors, plain or in parts, by name."""
        for name, target in targets.items():
            whole = self.known[name]
            if isinstance(target, DTensor):
                shape, start = compute_local_shape_and_global_offset(
                    target.shape, target.device_mesh, target.placements
                )
                whole = whole[tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))]
            local_part(target).copy_(whole)


@torch.no_grad()
def load_tensors(run: "Run", stored: StoredTensors | WholeTensors, scalars: dict[str, Any]) -> None:
    """Bring weights, optimizer state and averages of a run to those of a checkpoint, however either is cut.

    Raises:
        CheckpointError: The checkpoint is of another model.
    """
    targets: dict[str, Tensor] = {}
    for name, tensor in changing(run.model).items():
        key = f"model/{stored_name(run, name)}"
        if stored.shape(key) != tuple(tensor.shape):
            raise CheckpointError(
                f"The checkpoint holds {stored.shape(key) or 'nothing'} for {name}, the model wants "
                f"{tuple(tensor.shape)}. It belongs to another model; give another run folder."
            )
        targets[key] = tensor.detach()
    if run.ema is not None:
        averages = {f"ema/{stored_name(run, _bare(n))}": t for n, t in run.ema.averages.items()}
        targets |= {key: tensor for key, tensor in averages.items() if stored.shape(key) is not None}
    targets |= dict(_optimizer_targets(run, stored, scalars))
    own = f"random/{distributed.rank()}"
    if stored.shape(own) is not None:
        targets[own] = torch.get_rng_state()
    stored.load(targets)
    if own in targets:
        torch.set_rng_state(targets[own])


def _optimizer_targets(
    run: "Run", stored: StoredTensors | WholeTensors, scalars: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Make room in the optimizers for every stored part of their state, and yield it."""
    for kind, optimizer in run.optimizer.optimizers.items():
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        is_fused = optimizer.param_groups[0].get("fused", False)
        for name, parameter in unwrap(run.model).named_parameters():
            prefix = f"{kind}/{stored_name(run, name)}/"
            for place in stored.known if id(parameter) in mine else ():
                if place.startswith(f"optimizer/{prefix}"):
                    shape, dtype = stored.shape(place), stored.dtype(place)
                    assert shape is not None
                    if shape == tuple(parameter.shape):
                        value = torch.zeros_like(parameter.detach(), dtype=dtype)
                    else:
                        device = parameter.device if shape or is_fused else torch.device("cpu")
                        value = torch.zeros(shape, dtype=dtype, device=device)
                    optimizer.state[parameter][place.rpartition("/")[2]] = value
                    yield place, value
            for place, scalar in scalars.items() if id(parameter) in mine else ():
                if place.startswith(prefix):
                    optimizer.state[parameter][place.rpartition("/")[2]] = scalar


def checkpoint_to_hf(checkpoint: Path, out: Path) -> Path:
    """Join the weights of a checkpoint of several ranks into one model folder that transformers reads.

    Args:
        checkpoint: A ``step-N`` folder in which every weight of the model was trained.
        out: Folder to write; the tokenizer is not in a checkpoint, copy it there.

    Raises:
        CheckpointError: It is no such checkpoint.
    """
    if not is_sharded(checkpoint) or not (checkpoint / "config.json").is_file():
        raise CheckpointError(
            f"{checkpoint} holds no {SHARDS}/ and config.json; expected a step-N folder of a run of several ranks "
            "whose weights were all trained. Other checkpoints are model folders already, or need their base model."
        )
    model = build_empty(checkpoint, read_config(checkpoint))
    stored = StoredTensors(checkpoint)
    model.to_empty(device="cpu")
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    targets = {f"model/{name}": tensor.detach() for name, tensor in changing(model).items()}
    missing = [name for name in targets if stored.shape(name) is None]
    if missing:
        raise CheckpointError(f"{checkpoint} holds nothing for {missing[0]}; it belongs to another model.")
    stored.load(targets)
    save_model(model, out)
    return out
