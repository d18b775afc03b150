"""Round-to-nearest: quantize every linear layer of a model, with searched scales and no calibration data.

Embeddings, norms and the output head stay in 16 bits: they are a small part of a large model, and in a small one with
a tied head they are the layer that every prediction goes through. The folder is the ecosystem's own, compressed-tensors
"pack-quantized", read by `modelwright.models.weights.load_model` and by transformers.
Source: Dettmers et al. 2022, section 2 (one scale a row at 8 bits); Frantar et al. 2022, section 2 (RTN, groups).
Not done: calibration (GPTQ, AWQ), activations, embeddings.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from modelwright.base.errors import ConfigError
from modelwright.models.weights import save_model, to_published
from modelwright.nn.linear import linears, shared_parameters
from modelwright.nn.lora import lora_layers
from modelwright.nn.lowbit import LAYERS, LowBitLinear, quantization_config

DEFAULT_GROUP_SIZES = {2: 32, 4: 32, 8: None}


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    bits: int,
    group_size: int | None = None,
    *,
    ignore: Sequence[str] = ("lm_head",),
    dtype: torch.dtype | None = torch.bfloat16,
) -> nn.Module:
    """Return a copy of ``model`` whose linear layers hold ``bits`` bits a weight; the model itself is not changed.

    Args:
        bits: 8, 4 or 2.
        group_size: Inputs that share a scale. None: one scale a row at 8 bits, 32 below.
        ignore: Layers to leave as they are, by dotted name. A layer tied to the embedding is always left.
        dtype: Of everything else, scales included. None: as it is.

    Raises:
        ConfigError: Unknown bits, a group size that does not divide a layer, a model with adapters or quantized before.
        CheckpointError: A weight holds NaN or infinity.
    """
    model = getattr(model, "_orig_mod", model)
    if bits not in LAYERS:
        raise ConfigError(f"bits is {bits}; models are quantized to {', '.join(map(str, sorted(LAYERS)))} bits.")
    if lora_layers(model):
        raise ConfigError("The model has adapters. Merge them with merge_lora, then quantize.")
    if any(isinstance(module, LowBitLinear) for module in model.modules()):
        raise ConfigError(
            "The model is quantized already, and rounding twice only loses more. Start from the original."
        )
    group_size = DEFAULT_GROUP_SIZES[bits] if group_size is None else group_size
    tied = shared_parameters(model)
    kept, replaced = [], {}
    for name, layer in linears(model):
        if name in ignore or type(layer) is not nn.Linear or any(id(p) in tied for p in layer.parameters()):
            kept.append(name)
            continue
        try:
            replaced[id(layer)] = LAYERS[bits].from_linear(layer, group_size, dtype=dtype)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    # deepcopy takes whatever its memo holds for an object as that object's copy: the dense weights are never doubled.
    quantized: nn.Module = copy.deepcopy(model, dict(replaced))
    if dtype is not None:
        for parameter in quantized.parameters():
            parameter.data = parameter.data.to(dtype)
    names = [to_published(model, f"{name}.weight").removesuffix(".weight") for name in kept]
    quantized.quantization_config = quantization_config(bits, group_size, names)  # type: ignore[assignment]
    return quantized.eval()


def save_quantized(model: nn.Module, folder: str | Path) -> None:
    """Write a quantized model as a Hugging Face folder; its config.json says how the weights are stored.

    Raises:
        ConfigError: The model was not quantized.
    """
    if not hasattr(model, "quantization_config"):
        raise ConfigError("The model is not quantized. Quantize it with quantize_model, or save it with save_model.")
    save_model(model, folder)
