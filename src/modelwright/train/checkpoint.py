"""Checkpoints: everything that decides how a run goes on, written whole or not at all.

A checkpoint is a folder ``step-00000100`` with the trainable weights and the optimizer state as safetensors and the
rest as JSON. When every parameter is trained the weights are a model folder that `load_model` and transformers read;
otherwise (an adapter, a model without a published form) they are the trained tensors alone.

Writing happens in a thread, from a copy in memory taken between two steps: training goes on meanwhile. A folder gets
its name once every file in it is on the disk, so that a full disk or SIGKILL at any moment leaves the last good one.
"""

import copy
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from modelwright.base import distributed
from modelwright.base.config import to_dict
from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.base.files import atomic_folder, read_json, write_json
from modelwright.base.logs import get_logger
from modelwright.models.tensor_file import write_tensors
from modelwright.models.weights import load_model, save_model
from modelwright.train.objective import unwrap
from modelwright.train.sharded import (
    ShardedSnapshot,
    StoredTensors,
    WholeTensors,
    changing,
    is_sharded,
    load_tensors,
    take_shards,
)

if TYPE_CHECKING:
    from modelwright.train.loop import LoopConfig, Run

logger = get_logger(__name__)
_WEIGHTS, _OPTIMIZER, _EMA, _STATE = "trainable.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"
MAX_FAILED = 3  # saves that may fail one after the other before the run stops
# Settings of the loop that may differ between a run and the one it continues: they do not change its course.
FREE_SETTINGS = ("checkpoint", "device", "compile", "parallel")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int | None = None  # steps; None: never
    num_kept: int = 2  # newest ones kept
    is_asynchronous: bool = True  # written in a thread while training goes on
    allow_changes: bool = False  # go on from a checkpoint that was made with other settings

    def __post_init__(self) -> None:
        for name in ("every", "num_kept"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"loop.checkpoint.{name} is {value}; it must be at least 1.")


@dataclass(frozen=True)
class Snapshot:
    """A copy of a run in memory that no later step changes."""

    step: int
    model: nn.Module | None  # on the CPU; None: only the trained tensors are kept
    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]
    state: dict[str, Any]

    def write(self, folder: Path, num_kept: int) -> Path:
        """Write ``folder/step-N`` and remove all but the newest few.

        Raises:
            DeviceError: The disk is full; earlier checkpoints stay.
        """
        path = Path(folder) / f"step-{self.step:08d}"
        with atomic_folder(path) as work:
            if self.model is not None:
                save_model(self.model, work)
            else:
                write_tensors(work / _WEIGHTS, self.trained)
            write_tensors(work / _OPTIMIZER, self.optimizer)
            if self.ema:
                write_tensors(work / _EMA, self.ema)
            write_json(work / _STATE, self.state)
        for old in checkpoints(folder)[:-num_kept]:
            shutil.rmtree(old)
        return path


def take_snapshot(run: "Run") -> Snapshot | ShardedSnapshot:
    """Copy everything that decides how the run goes on; of several ranks each copies its part."""
    if run.layout.is_parallel:
        model = unwrap(run.model)
        is_trained_whole = hasattr(model, "config") and all(p.requires_grad for p in model.parameters())
        config = model.config.to_hf() if is_trained_whole and hasattr(model.config, "to_hf") else None  # type: ignore[union-attr,operator]
        return take_shards(run, _state_of(run), config)
    tensors, scalars = _pack_optimizer(run)
    random = {"random_state": torch.get_rng_state()}
    if run.device.type == "cuda":
        random["cuda_random_state"] = torch.cuda.get_rng_state(run.device)
    is_whole = hasattr(run.model, "published_names") and all(p.requires_grad for p in run.model.parameters())
    state = {**_state_of(run), "optimizer": scalars}
    return Snapshot(
        step=run.step,
        model=_copy_to_cpu(run.model) if is_whole else None,
        trained={} if is_whole else {n: _cpu_copy(t) for n, t in changing(run.model).items()},
        optimizer=tensors | random,
        ema={n: _cpu_copy(t) for n, t in run.ema.averages.items()} if run.ema is not None else {},
        state=state,
    )


def _state_of(run: "Run") -> dict[str, Any]:
    """Return all but tensors and the optimizer's numbers."""
    return {
        "step": run.step,
        "loader": run.loader.state(),
        "losses": list(run.losses),
        "precision": run.precision.state(),
        "watchdog": copy.deepcopy(run.watchdog.state()),
        "ema_updates": run.ema.num_updates if run.ema is not None else 0,
        "settings": settings_of(run.config),
    }


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _copy_to_cpu(model: nn.Module) -> nn.Module:
    """Copy a model; its tensors go straight to the CPU, so that a GPU need not hold it twice."""
    memo: dict[int, Any] = {id(p): nn.Parameter(_cpu_copy(p), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): _cpu_copy(b) for b in model.buffers()}
    memo |= {id(p.grad): None for p in model.parameters() if p.grad is not None}
    return copy.deepcopy(model, memo)


class CheckpointWriter:
    """Writes one snapshot at a time, in a thread where the settings say so."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder, self.config = Path(folder), config
        self.num_failed = 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        for leftover in self.folder.glob(".step-*") if distributed.rank() == 0 else ():  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)

    def save(self, run: "Run") -> None:
        """Save the run as it is now; the disk may be written after the call has returned.

        Raises:
            DeviceError: Several saves have failed one after the other, for instance because the disk is full.
        """
        self.wait()
        snapshot = take_snapshot(run)
        if not self.config.is_asynchronous:
            self._write(snapshot)
            self.wait()
            return
        # Not a daemon: a run that ends, for whatever reason but SIGKILL, first finishes what it was writing.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self, *, is_last: bool = False) -> None:
        """Wait until nothing is being written; raise what went wrong if it was the last save or one of several."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return
        self.num_failed += 1
        if is_last or self.num_failed >= MAX_FAILED:
            raise error
        logger.warning("a checkpoint was not written, the one before it stays: %s", error)

    def _write(self, snapshot: Snapshot | ShardedSnapshot) -> None:
        try:
            snapshot.write(self.folder, self.config.num_kept)
            self.num_failed = 0
        except Exception as error:
            self._error = error


def save_checkpoint(run: "Run", folder: Path) -> Path:
    """Write ``folder/step-N`` at once and remove all but the newest few.

    Raises:
        DeviceError: The disk is full; earlier checkpoints stay.
    """
    return take_snapshot(run).write(folder, run.config.checkpoint.num_kept)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints below ``folder``, oldest first."""
    return sorted(p for p in Path(folder).glob("step-*") if (p / _STATE).is_file())


def restore_newest(run: "Run", folder: Path) -> bool:
    """Bring the run to the newest checkpoint, if there is one.

    Raises:
        ConfigError: It was made with other settings; the message lists them.
        CheckpointError: It is damaged or belongs to another model.
    """
    found = distributed.share(checkpoints(folder))
    if not found:
        return False
    restore(run, found[-1])
    return True


def restore(run: "Run", path: Path) -> None:
    """Bring the run to the checkpoint at ``path``."""
    state = read_json(path / _STATE)
    changed = changed_settings(state["settings"], settings_of(run.config))
    if changed and not run.config.checkpoint.allow_changes:
        raise ConfigError(
            f"The checkpoint {path} was made with other settings: {'; '.join(changed)}. Set them back to continue "
            "that run, give another run folder to start a new one, or set loop.checkpoint.allow_changes to go on "
            "with the new ones."
        )
    if changed:
        logger.warning("the run goes on with changed settings: %s", "; ".join(changed))
    if run.layout.is_parallel or is_sharded(path):
        # Tensors are cut otherwise here than they were there.
        stored = StoredTensors(path) if is_sharded(path) else _whole_tensors(path)
        load_tensors(run, stored, state["optimizer"])
        if run.ema is not None:
            run.ema.num_updates = state["ema_updates"]
    else:
        _restore_tensors(run, path, state)
    run.loader.load_state(state["loader"])
    run.step = state["step"]
    run.losses = [(int(step), float(loss)) for step, loss in state["losses"]]
    run.watchdog.load_state(state["watchdog"])
    run.precision.load_state(state["precision"])


def roll_back(run: "Run", folder: Path) -> bool:
    """Bring the run to its newest checkpoint, but let the data go on from where it is; tell whether there was one.

    A second return without a save in between takes the checkpoint before, because the newest one did not help.
    """
    found = distributed.share(checkpoints(folder))
    if run.last_rollback is not None and found and found[-1] == run.last_rollback and len(found) > 1:
        bad = found.pop()
        if distributed.rank() == 0:
            shutil.rmtree(bad)
    if not found:
        return False
    place, dog = run.loader.state(), run.watchdog
    skipped, count = dog.skipped, dog.num_rollbacks + 1
    restore(run, found[-1])
    dog.skipped, dog.num_rollbacks, dog.num_in_row = skipped, count, 0
    run.loader.load_state(place)
    run.last_rollback = found[-1]
    logger.warning("back to step %d, %s; the data goes on from where it was", run.step, found[-1])
    return True


def _restore_tensors(run: "Run", path: Path, state: dict[str, Any]) -> None:
    """Bring weights, averages, optimizer and random state back from a checkpoint of one process to one process."""
    try:
        _restore_weights(run, path)
        tensors = load_file(path / _OPTIMIZER)
        ema = load_file(path / _EMA) if run.ema is not None and (path / _EMA).is_file() else None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"The checkpoint {path} is damaged: {error}. Remove that folder to go on from the one before."
        ) from error
    torch.set_rng_state(tensors.pop("random_state"))
    on_gpu = tensors.pop("cuda_random_state", None)
    if on_gpu is not None and run.device.type == "cuda":
        torch.cuda.set_rng_state(on_gpu, run.device)
    _unpack_optimizer(run, tensors, state["optimizer"])
    if run.ema is not None and ema is not None:
        run.ema.load(ema, state["ema_updates"])


def _weights_of(path: Path) -> dict[str, Tensor]:
    is_model = not (path / _WEIGHTS).is_file()
    return load_model(path).state_dict() if is_model else load_file(path / _WEIGHTS)


def _whole_tensors(path: Path) -> WholeTensors:
    """Return the tensors of a checkpoint of one process, for a run of several."""
    try:
        found = {f"model/{name}": tensor for name, tensor in _weights_of(path).items()}
        optimizer = load_file(path / _OPTIMIZER)
        found |= {f"optimizer/{place}": tensor for place, tensor in optimizer.items() if "/" in place}
        if (path / _EMA).is_file():
            found |= {f"ema/{name}": tensor for name, tensor in load_file(path / _EMA).items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"The checkpoint {path} is damaged: {error}. Remove that folder to go on from the one before."
        ) from error
    return WholeTensors(found)


def _restore_weights(run: "Run", path: Path) -> None:
    source = _weights_of(path)
    with torch.no_grad():
        for name, tensor in changing(run.model).items():
            if name not in source or source[name].shape != tensor.shape:
                seen = tuple(source[name].shape) if name in source else "nothing"
                raise CheckpointError(
                    f"The checkpoint {path} holds {seen} for {name}, the model wants {tuple(tensor.shape)}. "
                    "It belongs to another model; give another run folder."
                )
            tensor.copy_(source[name])


def settings_of(config: "LoopConfig") -> dict[str, Any]:
    """Return the settings that a resumed run must share with the one it continues."""
    return {name: value for name, value in to_dict(config).items() if name not in FREE_SETTINGS}


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Say which settings differ between two trees, as ``name was x, is now y``.

    >>> changed_settings({"seed": 0, "optimizer": {"name": "muon"}}, {"seed": 1, "optimizer": {"name": "muon"}})
    ['seed was 0, is now 1']
    """
    before, now = _flat(old), _flat(new)
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    return [f"{k} was {before.get(k)!r}, is now {now.get(k)!r}" for k in changed]


def continue_plan(plan: dict[str, Any], settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """Return the resolved loop settings of an unfinished run, with what may change taken from the settings of now.

    Args:
        plan: What the run wrote before its first step: its ``settings`` as given, its ``loop`` as resolved.
        settings: Those of the run that goes on, as plain values.
        work: Where the plan was found, for the message.

    Raises:
        ConfigError: Other settings differ, and ``loop.checkpoint.allow_changes`` is not set; the message lists them.
    """
    given = settings["loop"]
    before, now = (
        {**tree, "loop": {k: v for k, v in tree["loop"].items() if k not in FREE_SETTINGS}}
        for tree in (plan["settings"], settings)
    )
    changed = changed_settings(before, now)
    if changed and not given["checkpoint"]["allow_changes"]:
        raise ConfigError(
            f"{work} holds an unfinished run with other settings: {'; '.join(changed)}. Set them back, remove the "
            "folder to start anew, or set loop.checkpoint.allow_changes to go on with the new ones."
        )
    loop = {**plan["loop"], **{name: given[name] for name in ("checkpoint", "device", "parallel")}}
    for name, value in now["loop"].items():
        if value != before["loop"].get(name):
            loop[name] = value
    return loop


def _flat(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return found


def _pack_optimizer(run: "Run") -> tuple[dict[str, Tensor], dict[str, float]]:
    names = {id(p): n for n, p in run.model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, float] = {}
    for kind, optimizer in run.optimizer.optimizers.items():
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                place = f"{kind}/{names[id(parameter)]}/{key}"
                if isinstance(value, Tensor):
                    tensors[place] = _cpu_copy(value)
                else:
                    scalars[place] = value
    return tensors, scalars


def _unpack_optimizer(run: "Run", tensors: dict[str, Tensor], scalars: dict[str, float]) -> None:
    parameters = dict(run.model.named_parameters())
    on_device = {kind: o.param_groups[0].get("fused", False) for kind, o in run.optimizer.optimizers.items()}
    for place, value in (tensors | scalars).items():
        kind, name, key = place.split("/")
        if kind not in run.optimizer.optimizers or name not in parameters:
            continue  # of another optimizer, and the change was allowed
        parameter, optimizer = parameters[name], run.optimizer.optimizers[kind]
        if hasattr(optimizer, "adopt"):  # it decides itself where its state stands
            value = optimizer.adopt(value, parameter)
        elif isinstance(value, Tensor) and (value.ndim or on_device[kind]):
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value
