"""From a settings section to optimizers: which parameter gets which rule.

Weight decay falls on matrices only; norms and biases are left alone. Several optimizers act as one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.base.registry import lookup
from modelwright.optim import OPTIMIZERS
from modelwright.optim.adafactor import Adafactor, AdafactorConfig
from modelwright.optim.adamw8bit import LeanAdamW
from modelwright.optim.bounds import check_betas, check_rates
from modelwright.optim.lion import Lion, LionConfig
from modelwright.optim.muon import Muon, MuonConfig
from modelwright.optim.parts import by_mesh


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    learning_rate: float = 0.002  # peak, before the schedule
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # decoupled, times the learning rate

    def __post_init__(self) -> None:
        check_rates("adamw", self.learning_rate, self.weight_decay)
        check_betas("adamw", self.betas)


# The section that each rule reads.
SECTIONS = {
    "adamw": "adamw",
    "adamw8bit": "adamw",
    "paged_adamw": "adamw",
    "paged_adamw8bit": "adamw",
    "adafactor": "adafactor",
    "lion": "lion",
    "muon": "muon",
}


@dataclass(frozen=True)
class OptimizerConfig:
    """Which update rule, and its settings; a section that the rule does not read is refused."""

    name: str = "muon"  # muon, adamw, adamw8bit, paged_adamw, paged_adamw8bit, adafactor or lion
    muon: MuonConfig = field(default_factory=MuonConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    lion: LionConfig = field(default_factory=LionConfig)
    adafactor: AdafactorConfig = field(default_factory=AdafactorConfig)

    def __post_init__(self) -> None:
        lookup(OPTIMIZERS, self.name, "optimizer.name")
        read = SECTIONS[self.name]
        plain = {"muon": MuonConfig(), "adamw": AdamWConfig(), "lion": LionConfig(), "adafactor": AdafactorConfig()}
        for section, default in plain.items():
            if section != read and getattr(self, section) != default:
                raise ConfigError(
                    f"optimizer.name is {self.name!r}, but optimizer.{section} was set, which has no effect then. "
                    f"Remove that section or choose optimizer.name: {section}."
                )

    def choose(self, name: str) -> "OptimizerConfig":
        """Return the settings under another rule: the section that it reads stays, the others fall back."""
        section = SECTIONS.get(name)
        return OptimizerConfig(name, **({section: getattr(self, section)} if section else {}))


class OptimizerSet:
    """Several optimizers used as one; the schedule's factor scales each group's own peak rate."""

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer]):
        self.optimizers = optimizers
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]

    def set_factor(self, factor: float) -> None:
        """Set every group's rate to ``factor`` times its peak."""
        for group in self.groups():
            group["lr"] = group["peak_lr"] * factor

    def groups(self) -> Iterator[dict[str, Any]]:
        """Yield every parameter group."""
        for optimizer in self.optimizers.values():
            yield from optimizer.param_groups

    def parameters(self) -> list[Tensor]:
        """Return every parameter under these rules."""
        return [p for group in self.groups() for p in group["params"]]

    def step(self) -> None:
        """Apply every rule once."""
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)


def _split(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return (hidden matrices, embedding and output matrices, vectors), each parameter once.

    A layer whose table of scalars has two axes or more (decay rates, a depthwise filter) names it in ``vector_names``.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(m.weight) for name, m in model.named_modules() if name.endswith("lm_head") and hasattr(m, "weight")}
    scalars = {id(getattr(m, name)) for m in model.modules() for name in getattr(m, "vector_names", ())}
    hidden: list[Tensor] = []
    wide: list[Tensor] = []
    vectors: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim < 2 or id(parameter) in scalars
            group = vectors if is_vector else wide if id(parameter) in tables else hidden
            group.append(parameter)
    return hidden, wide, vectors


def _groups(matrices: list[Tensor], vectors: list[Tensor], decay: float) -> list[dict[str, Any]]:
    kinds = ((matrices, decay), (vectors, 0.0))
    return [{"params": part, "weight_decay": own} for tensors, own in kinds for part in by_mesh(tensors)]


def _adamw(matrices: list[Tensor], vectors: list[Tensor], rate: float, betas: Any, decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(_groups(matrices, vectors, decay), lr=rate, betas=tuple(betas), eps=1e-8, fused=True)


def make_adamw(model: nn.Module, config: OptimizerConfig) -> OptimizerSet:
    """Build AdamW for every trainable parameter."""
    hidden, wide, vectors = _split(model)
    settings = config.adamw
    return OptimizerSet(
        {"adamw": _adamw(hidden + wide, vectors, settings.learning_rate, settings.betas, settings.weight_decay)}
    )


def _lean(model: nn.Module, settings: AdamWConfig, *, num_bits: int, is_paged: bool) -> OptimizerSet:
    hidden, wide, vectors = _split(model)
    groups = _groups(hidden + wide, vectors, settings.weight_decay)
    rule = LeanAdamW(groups, settings.learning_rate, settings.betas, num_bits=num_bits, is_paged=is_paged)
    return OptimizerSet({"adamw": rule})


def make_adamw8bit(model: nn.Module, config: OptimizerConfig) -> OptimizerSet:
    """Build AdamW with moments of 8 bits."""
    return _lean(model, config.adamw, num_bits=8, is_paged=False)


def make_paged_adamw(model: nn.Module, config: OptimizerConfig) -> OptimizerSet:
    """Build AdamW whose moments stand outside of the device."""
    return _lean(model, config.adamw, num_bits=32, is_paged=True)


def make_paged_adamw8bit(model: nn.Module, config: OptimizerConfig) -> OptimizerSet:
    """Build AdamW with moments of 8 bits that stand outside of the device."""
    return _lean(model, config.adamw, num_bits=8, is_paged=True)


def make_lion(model: nn.Module, config: OptimizerConfig) -> OptimizerSet:
    """Build Lion for every trainable parameter."""
    hidden, wide, vectors = _split(model)
    settings = config.lion
    groups = _groups(hidden + wide, vectors, settings.weight_decay)
    return OptimizerSet({"lion": Lion(groups, settings.learning_rate, settings.betas)})


def make_adafactor(model: nn.Module, config: OptimizerConfig) -> OptimizerSet:
    """Build Adafactor for every trainable parameter."""
    hidden, wide, vectors = _split(model)
    settings = config.adafactor
    groups = _groups(hidden + wide, vectors, settings.weight_decay)
    rule = Adafactor(groups, settings.learning_rate, decay_power=settings.decay_power, max_update=settings.max_update)
    return OptimizerSet({"adafactor": rule})


def make_muon(model: nn.Module, config: OptimizerConfig) -> OptimizerSet:
    """Build Muon for the hidden matrices and AdamW for the rest."""
    hidden, wide, vectors = _split(model)
    settings = config.muon
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if hidden:
        optimizers["muon"] = Muon(
            hidden,
            settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            num_iterations=settings.num_iterations,
        )
    if wide or vectors:
        optimizers["adamw"] = _adamw(wide, vectors, settings.adamw_learning_rate, settings.adamw_betas, 0.0)
    return OptimizerSet(optimizers)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> OptimizerSet:
    """Build the optimizer that the settings name, over the trainable parameters.

    Raises:
        ConfigError: The name is unknown, or nothing in the model is trainable.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("The model has no trainable parameter. Unfreeze some, or add an adapter before training.")
    made: OptimizerSet = lookup(OPTIMIZERS, config.name, "optimizer.name")(model, config)
    _give_own_rates(made)
    return made


def _give_own_rates(made: OptimizerSet) -> None:
    """Put parameters with a ``rate_factor`` (LoRA+) into groups of their own, at that multiple of the rate."""
    for optimizer in made.optimizers.values():
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if getattr(p, "rate_factor", 1.0) != 1.0]
            for factor in sorted({p.rate_factor for p in own}):
                chosen = [p for p in own if p.rate_factor == factor]
                group["params"] = [p for p in group["params"] if all(p is not q for q in chosen)]
                rates = {"lr": group["lr"] * factor, "peak_lr": group["peak_lr"] * factor}
                optimizer.add_param_group({**group, "params": chosen, **rates})
