"""From what a caller gives to what the engine runs: load, round the weights, choose how steps are computed.

`quantize` rounds the linear layers while loading, for folders whose weights are still 16 bits: the blocks' layers to
the named bits, the output matrix, through which every token goes, to 8. A folder quantized before (``mw quantize``)
starts faster and may have been rounded with more care. NF4 (blocks of 64, the head as it is) saves memory alone: it has
no product in 4 bits, so each step makes a layer's matrix dense and forgets it.

Steps go through compiled kernels (`modelwright.engine.native`) for low-bit models of the Llama family, else through
PyTorch. The first time on a machine the kernels are compiled, in seconds. Where that takes long, PyTorch serves, and
the engine changes over at a moment when no request is under way, so that each request is computed by one of the two
from its first to its last token. 16-bit models stay with PyTorch, whose log-probabilities are those of training;
``kernels="native"`` asks for the compiled step. On a GPU "native" means `modelwright.engine.gpu`, which is what any
model gets there that it can compute, and "plain" means PyTorch's operations.
"""

import copy
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelwright.base.device import has_fast_bf16, pick_device
from modelwright.base.errors import ConfigError
from modelwright.base.logs import get_logger
from modelwright.engine import gpu
from modelwright.engine.native import NativeRunner, is_low_bit, refusal
from modelwright.engine.recurrent import RecurrentRunner, is_recurrent, refuse_recurrent
from modelwright.engine.sight import split_model
from modelwright.engine.tensor_parallel import Ranks, TensorRunner
from modelwright.models.decoder import Decoder
from modelwright.models.gguf import read_gguf
from modelwright.models.llava import Llava
from modelwright.models.weights import load_model
from modelwright.nn.kernels import build
from modelwright.nn.kernels.packed import pack_low_bit, round_linear
from modelwright.nn.linear import linears, replace_module
from modelwright.nn.lowbit import LAYERS, LowBitLinear
from modelwright.nn.nf4 import NF4Linear, to_nf4

log = get_logger(__name__)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KERNELS = ("native", "plain")
GROUP_SIZES = {"int8": None, "int4": 32}  # what `quantize` can be; int8 has one scale a row
BITS = {"int8": 8, "int4": 4, "nf4": 4}
HEAD_BITS = 8
# A library compiled before is there at once; a first compilation takes 3 s. PyTorch's own packing of a 0.5B model's
# 4-bit weights, on its first step, took 14 s of CPU time: it is worth waiting for a slow compiler, up to a point.
LOAD_SECONDS = 20.0


def prepare_model(
    model: str | Path | nn.Module, dtype_name: str | None, device_name: str | None, quantize: str | None
) -> tuple[Any, Llava | None]:
    """Return a causal model in evaluation mode; a given module is moved if asked to, and never rounded itself.

    Of a model that sees, the language model comes first, and then the whole; rounding is for the first alone.

    Raises:
        ConfigError: The model does not write text.
    """
    dtype = DTYPES[dtype_name] if dtype_name else None
    read: Any = model
    if isinstance(model, nn.Module):
        if dtype is not None or device_name is not None:
            read = model.to(device=pick_device(device_name) if device_name else None, dtype=dtype)
        if _has_low_bit(read):
            read = _with_shared_tensors(read)  # its layers will compute by the engine's kernels
    else:
        device = pick_device(device_name)
        if dtype is None:
            dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
        if Path(model).suffix == ".gguf":  # Q4_0 and Q8_0 stay in their bits
            read = read_gguf(Path(model), dtype=dtype, device=device, is_packed=True)
        else:
            read = load_model(Path(model), dtype=dtype, device=device)
    model, whole = split_model(read)
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"The model is a {type(model).__name__}, which does not write text; "
            "the engine runs causal language models such as LlamaForCausalLM."
        )
    made = (model if quantize is None else rounded(model, quantize)).eval()
    return made, None if whole is None else whole.eval()


def load_whole(source: str | Path | nn.Module, dtype_name: str | None, device_name: str) -> Any:
    """Return what `prepare_model` returns, on a device; for the other processes of `Ranks`."""
    return prepare_model(source, dtype_name, device_name, None)[0]


@torch.no_grad()
def rounded(model: nn.Module, quantize: str) -> nn.Module:
    """Return the model with its linear layers rounded; all other tensors are shared with the given one.

    Raises:
        ConfigError: It is rounded already, or ``quantize`` is no known form.
    """
    if quantize not in BITS:
        raise ConfigError(f"quantize is {quantize!r}; known: {', '.join(BITS)}. Leave it out to keep the weights.")
    if any(isinstance(module, (LowBitLinear, NF4Linear)) for module in model.modules()):
        raise ConfigError(
            f"The model's weights are rounded already; quantize={quantize!r} would lose more. Leave it out."
        )
    made = _with_shared_tensors(model)
    if quantize == "nf4":
        to_nf4(made, skipped=tuple(name for name, _ in linears(made) if name == "lm_head"))
        return made
    for name, layer in list(linears(made)):
        if type(layer) is nn.Linear:
            bits = HEAD_BITS if name == "lm_head" else BITS[quantize]
            replace_module(made, name, _round(layer, bits, GROUP_SIZES["int4" if bits == 4 else "int8"]))
    return made


def _has_low_bit(model: nn.Module) -> bool:
    return any(isinstance(module, LowBitLinear) for module in model.modules())


def _with_shared_tensors(model: nn.Module) -> Any:
    """Return a copy whose modules are its own and whose tensors are the given one's."""
    kept: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def _round(layer: nn.Linear, bits: int, group_size: int | None) -> LowBitLinear:
    library = build.wait() if layer.weight.device.type == "cpu" else None
    unit = group_size or layer.in_features
    if library is None or layer.weight.dtype != torch.bfloat16 or unit % 16 or layer.in_features % unit:
        return LAYERS[bits].from_linear(layer, group_size)
    return round_linear(library, layer, bits, group_size)


class Steps:
    """The runner that computes the steps, and the better one that is still being made.

    Args:
        model: From `prepare_model`.
        num_blocks: Of the cache.
        block_size: Positions in a block.
        kernels: "native", "plain", or None to decide.
        why_not: Why the compiled step cannot be, beside what the model says; None: it can.
        kv_dtype: "int8" or "int4" for a rounded cache, which the compiled step does not have.
        ranks: The processes that compute the model together, if it is cut.
        max_rows: Requests in one step at most.

    Raises:
        ConfigError: "native" was asked for and cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_blocks: int,
        block_size: int,
        kernels: str | None,
        why_not: str | None = None,
        kv_dtype: str | None = None,
        ranks: Ranks | None = None,
        max_rows: int = 32,
    ):
        self._sizes: dict[str, Any] = {"num_blocks": num_blocks, "block_size": block_size}
        self._model = model
        self._coming: NativeRunner | None = None
        if ranks is not None:
            self.runner: Any = TensorRunner(model, ranks, **self._sizes, kv_dtype=kv_dtype)
            return
        if next(model.parameters()).is_cuda:
            why_gpu = gpu.refusal(model, kv_dtype)
            if kernels == "native" and why_gpu is not None:
                raise ConfigError(f"kernels='native' cannot be: {why_gpu}. Leave it out to let the engine decide.")
            if kernels != "plain" and why_gpu is None:
                self.runner = gpu.make_runner(model, **self._sizes, max_rows=max_rows)
                return
        why_not = why_not or refusal(model, block_size)
        if kv_dtype is not None:
            why_not = why_not or f"its cache is not rounded, and kv_dtype is {kv_dtype!r}"
        if kernels == "native":
            why_not = why_not or (None if build.wait() is not None else build.failure())
            if why_not is not None:
                raise ConfigError(f"kernels='native' cannot be: {why_not}. Leave it out to let the engine decide.")
        has_low_bit = kernels != "plain" and _has_low_bit(model)
        library = build.wait(LOAD_SECONDS) if kernels == "native" or has_low_bit else None
        if is_recurrent(model.cache_layout()):  # type: ignore[operator]
            has_attention = any(cache.num_kv_heads for cache in model.cache_layout())  # type: ignore[operator]
            refuse_recurrent(model, {"kv_dtype": (kv_dtype and not has_attention, "there are no keys and values")})
            pack_low_bit(model, library)
            self.runner = RecurrentRunner(model, **self._sizes, kv_dtype=kv_dtype)
            return
        is_wanted = kernels == "native" or (kernels is None and why_not is None and is_low_bit(model))
        if is_wanted and library is not None:
            self.runner = NativeRunner(model, library, **self._sizes)
            return
        pack_low_bit(model, library)
        self.runner = gpu.make_runner(model, **self._sizes, kv_dtype=kv_dtype, kernels=kernels)
        if is_wanted and library is None and build.failure() is None:
            threading.Thread(target=self._make, name="native-step", daemon=True).start()

    def _make(self) -> None:
        library = build.wait()
        if library is not None:
            self._coming = NativeRunner(self._model, library, **self._sizes)

    def take_over(self) -> bool:
        """Change to the better runner if it has come; the caller knows that no request is under way."""
        if self._coming is None:
            return False
        self.runner, self._coming = self._coming, None
        log.info("steps are computed by the compiled kernels from now on")
        return True
