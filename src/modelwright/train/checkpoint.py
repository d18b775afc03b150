"""Checkpoints: everything that decides how a run goes on, written whole or not at all.

A checkpoint is a folder ``step-00000100`` with the trainable weights and the optimizer state as safetensors and the
rest as JSON. When every parameter is trained the weights are a model folder that `load_model` and transformers read;
when only an adapter is trained they are its tensors alone.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelwright.base.config import to_dict
from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.base.files import atomic_folder, read_json, write_json
from modelwright.models.weights import load_model, save_model

if TYPE_CHECKING:
    from modelwright.train.loop import LoopConfig, Run

_WEIGHTS, _OPTIMIZER, _STATE = "trainable.safetensors", "optimizer.safetensors", "state.json"


def save_checkpoint(run: "Run", folder: Path) -> Path:
    """Write ``folder/step-N`` and remove all but the newest few.

    Raises:
        DeviceError: The disk is full; earlier checkpoints stay.
    """
    path = Path(folder) / f"step-{run.step:08d}"
    tensors, scalars = _pack_optimizer(run)
    with atomic_folder(path) as work:
        if all(p.requires_grad for p in run.model.parameters()):
            save_model(run.model, work)
        else:
            trained = {n: p.detach().cpu().contiguous() for n, p in run.model.named_parameters() if p.requires_grad}
            save_file(trained, work / _WEIGHTS)
        save_file(tensors | {"random_state": torch.get_rng_state()}, work / _OPTIMIZER)
        state = {
            "step": run.step,
            "loader": run.loader.state(),
            "optimizer": scalars,
            "losses": run.losses,
            "settings": settings_of(run.config),
        }
        write_json(work / _STATE, state)
    for old in checkpoints(folder)[: -run.config.num_checkpoints]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints below ``folder``, oldest first."""
    return sorted(p for p in Path(folder).glob("step-*") if (p / _STATE).is_file())


def restore_newest(run: "Run", folder: Path) -> bool:
    """Bring the run to the newest checkpoint, if there is one.

    Raises:
        ConfigError: It was made with other settings; the message lists them.
        CheckpointError: It is damaged or belongs to another model.
    """
    found = checkpoints(folder)
    if not found:
        return False
    restore(run, found[-1])
    return True


def restore(run: "Run", path: Path) -> None:
    """Bring the run to the checkpoint at ``path``."""
    state = read_json(path / _STATE)
    _refuse_changes(state["settings"], settings_of(run.config), path)
    try:
        _restore_weights(run, path)
        tensors = load_file(path / _OPTIMIZER)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"The checkpoint {path} is damaged: {error}. Remove that folder to go on from the one before."
        ) from error
    torch.set_rng_state(tensors.pop("random_state"))
    _unpack_optimizer(run, tensors, state["optimizer"])
    run.loader.load_state(state["loader"])
    run.step = state["step"]
    run.losses = [(int(step), float(loss)) for step, loss in state["losses"]]


def _restore_weights(run: "Run", path: Path) -> None:
    if not (path / _WEIGHTS).is_file():
        source = load_model(path).state_dict()
    else:
        source = load_file(path / _WEIGHTS)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name not in source or source[name].shape != parameter.shape:
                seen = tuple(source[name].shape) if name in source else "nothing"
                raise CheckpointError(
                    f"The checkpoint {path} holds {seen} for {name}, the model wants {tuple(parameter.shape)}. "
                    "It belongs to another model; give another run folder."
                )
            parameter.copy_(source[name])


def settings_of(config: "LoopConfig") -> dict[str, Any]:
    """Return the settings that a resumed run must share with the one it continues."""
    values = to_dict(config)
    for free in ("checkpoint_every", "num_checkpoints", "device", "compile"):
        values.pop(free)
    return values


def _refuse_changes(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    def flat(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in tree.items():
            found |= flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
        return found

    before, now = flat(old), flat(new)
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if changed:
        listed = "; ".join(f"{k} was {before.get(k)!r}, is now {now.get(k)!r}" for k in changed)
        raise ConfigError(
            f"The checkpoint {path} was made with other settings: {listed}. "
            "Set them back to continue that run, or give another run folder to start a new one."
        )


def _pack_optimizer(run: "Run") -> tuple[dict[str, Tensor], dict[str, float]]:
    names = {id(p): n for n, p in run.model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, float] = {}
    for kind, optimizer in run.optimizer.optimizers.items():
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                place = f"{kind}/{names[id(parameter)]}/{key}"
                if isinstance(value, Tensor):
                    tensors[place] = value.detach().cpu().contiguous()
                else:
                    scalars[place] = value
    return tensors, scalars


def _unpack_optimizer(run: "Run", tensors: dict[str, Tensor], scalars: dict[str, float]) -> None:
    parameters = dict(run.model.named_parameters())
    for place, value in (tensors | scalars).items():
        kind, name, key = place.split("/")
        parameter = parameters[name]
        if isinstance(value, Tensor) and value.ndim:
            value = value.to(parameter.device)
        run.optimizer.optimizers[kind].state[parameter][key] = value
