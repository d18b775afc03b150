"""Give a model its first weights: one explicit call, one seed, every parameter, no surprise left over.

Matrices and embeddings are drawn from a normal distribution of standard deviation 0.02; a layer that writes into the
residual stream carries ``init_scale`` = 1 / sqrt(2 L), so that the stream's variance does not grow with depth.
Norm weights are one, biases zero. A module with first values of its own (the decay rates of a state-space layer, say)
has a method ``reset_own_parameters(generator)`` that fills every parameter it holds directly, drawing on the CPU from
the generator it is given. A parameter that none of these covers is an error, never left as it was.

Source: Radford et al. 2019 (GPT-2), section 2.3.
"""

import math

import torch
from torch import nn

from modelwright.base.errors import ConfigError
from modelwright.nn.norm import RMSNorm

STD = 0.02


def mark_residual_output(linear: nn.Linear, num_layers: int) -> None:
    """Note on a layer that it writes into a residual stream of ``num_layers`` blocks with two writers each."""
    linear.init_scale = 1.0 / math.sqrt(2 * num_layers)  # type: ignore[assignment]


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, *, std: float = STD) -> nn.Module:
    """Fill every parameter of ``model`` in place and return it.

    The numbers are drawn on the CPU in the order of the modules, so a seed gives the same weights on every device.

    Raises:
        ConfigError: A parameter has no storage yet (meta device) or belongs to a kind of layer that has no rule here.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    done: set[int] = set()
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{name}" if prefix else name: p for name, p in module.named_parameters(recurse=False)}
        for where, parameter in own.items():
            if parameter.is_meta:
                raise ConfigError(f"{where} has no storage yet; call model.to_empty(device=...) before init_weights.")
        fresh = {where: p for where, p in own.items() if id(p) not in done}  # a tied weight is drawn once
        done |= {id(p) for p in fresh.values()}
        if fresh and hasattr(module, "reset_own_parameters"):
            _reset_own(module, fresh, generator)
            continue
        for where, parameter in fresh.items():
            name = where.rpartition(".")[2]
            if isinstance(module, (RMSNorm, nn.LayerNorm)):
                parameter.fill_(0.0 if name == "bias" else 1.0)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                if name == "bias":
                    parameter.zero_()
                else:
                    scale = std * float(getattr(module, "init_scale", 1.0))
                    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, scale, generator=generator))
            else:
                raise ConfigError(
                    f"{where} belongs to a {type(module).__name__}, for which init_weights has no rule; add one."
                )
    return model


def _reset_own(module: nn.Module, own: dict[str, nn.Parameter], generator: torch.Generator) -> None:
    """Let the module fill its own parameters, and see that it forgot none."""
    for parameter in own.values():
        parameter.fill_(float("nan"))
    module.reset_own_parameters(generator)  # type: ignore[operator]
    for where, parameter in own.items():
        if not torch.isfinite(parameter).all():
            raise ConfigError(
                f"{where} was not filled by {type(module).__name__}.reset_own_parameters; it must fill every "
                "parameter that the module holds directly with finite numbers. Add this one there."
            )
