"""Give a model its first weights: one explicit call, one seed, every parameter, no surprise left over.

Matrices and embeddings are drawn from a normal distribution of standard deviation 0.02; a layer that writes into the
residual stream carries ``init_scale`` = 1 / sqrt(2 L), so that the stream's variance does not grow with depth.
Norm weights are one, biases zero. A parameter that none of these rules covers is an error, never left as it was.

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
        for name, parameter in module.named_parameters(recurse=False):
            where = f"{prefix}.{name}" if prefix else name
            if parameter.is_meta:
                raise ConfigError(f"{where} has no storage yet; call model.to_empty(device=...) before init_weights.")
            if id(parameter) in done:  # a tied weight is drawn once
                continue
            done.add(id(parameter))
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
