"""GGUF files as models: Llama (Mistral), Qwen2, Qwen3, Gemma 1 to 3, GPT-2 and BERT, both ways.

A file is read as if it were the published checkpoint: its settings become a ``config.json``, its tensors the published
tensors, one at a time. Three families are stored in another layout and are turned back: the Llama family's queries and
keys (rotary pairs side by side), Gemma's norms (with the 1 added) and GPT-2's matrices (transposed).

Source: llama.cpp, convert_hf_to_gguf.py. Not done: mixtures of experts, files split into several.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.base.gguf_file import BLOCK_TYPES, TYPE_NUMBERS, GgufFile, NewTensor, write_container
from modelwright.base.logs import get_logger
from modelwright.base.progress import bar
from modelwright.models import gguf_packed, gguf_types, layout
from modelwright.models.assemble import assemble
from modelwright.models.gguf_names import (
    KEPT_WIDE,
    LEFT_OUT,
    ROPE_FREQS,
    TENSOR_NAMES,
    read_config,
    read_rope_freqs,
    write_config,
)
from modelwright.nn.rope import half_split_order
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.gguf_vocab import gguf_vocab

# general.file_type by the type that most matrices have
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32}
# Where rows are no whole blocks of a type, the next one is tried; F16 has blocks of one number.
NEXT_TYPES = {"Q4_K": "Q8_0", "Q5_K": "Q8_0", "Q6_K": "Q8_0", "Q8_0": "F16", "Q4_0": "F16", "Q4_1": "F16"}
# What the embedding and the output matrix, which lose most, get instead.
FINER_TYPES = {"Q4_0": "Q8_0", "Q4_1": "Q8_0", "Q4_K": "Q6_K", "Q5_K": "Q6_K"}
DTYPES = tuple(name.lower() for name in FILE_TYPES)

logger = get_logger(__name__)


def read_gguf(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    is_packed: bool = False,
) -> nn.Module:
    """Load a model from a GGUF file, in evaluation mode.

    Args:
        path: The file.
        dtype: Of the weights; None: that of most matrices, float32 where they are stored in blocks.
        device: Where the weights go; None: the CPU.
        is_packed: Keep matrices of Q4_0 or Q8_0 in their bits (the Llama family); otherwise all are multiplied out.

    Raises:
        CheckpointError: The file is damaged, of a family or number format that is not read here, or a tensor or
            setting is missing or does not fit; the message names it.
    """
    file = GgufFile(path)
    name = file.metadata.get("general.architecture")
    if name not in TENSOR_NAMES:
        raise CheckpointError(
            f"{path} holds a model of the architecture {name!r}; read are {', '.join(TENSOR_NAMES)}. "
            "Use the model's own folder."
        )
    if file.metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{path} is one of {file.metadata['split.count']} parts; join them with llama-gguf-split."
        )
    shapes = {tensor.name: tensor.shape for tensor in file.tensors.values()}
    unread = [t for t in file.tensors.values() if t.type not in gguf_types.READABLE]
    if unread:
        raise CheckpointError(
            f"{path}: tensor {unread[0].name} is stored as {unread[0].type}, which is not read here. Read: "
            f"{', '.join(gguf_types.READABLE)}."
        )
    try:
        values = read_config(name, file.metadata, shapes)
        if ROPE_FREQS in file.tensors:
            read_rope_freqs(values, _unpack(file, ROPE_FREQS, torch.float32))
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    wanted = dtype or _usual_dtype(file)
    kept = gguf_packed.kept_type(file, name) if is_packed else None
    if kept is not None:
        dense = [t for t in file.tensors if not gguf_packed.is_kept(file, t, kept)]
        published = [layout.translate(t.rpartition(".")[0], TENSOR_NAMES[name]) or t for t in dense]
        has_head = gguf_packed.is_kept(file, "output.weight", kept) if "output.weight" in file.tensors else False
        values = gguf_packed.packed_config(values, kept, published if has_head else [*published, "lm_head"])
    with bar("gguf", len(file.tensors)) as shown:
        tensors = _published_tensors(file, name, values, wanted, shown.advance, kept)
        return assemble(Path(path), values, tensors, dtype=wanted, device=device)


def _usual_dtype(file: GgufFile) -> torch.dtype:
    """Return the dtype of most numbers that stand in matrices; blocks count as float32."""
    counts: dict[str, int] = {}
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1:
            counts[tensor.type] = counts.get(tensor.type, 0) + tensor.num_bytes
    most = max(counts, key=counts.__getitem__, default="F32")
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(most, torch.float32)


def _unpack(file: GgufFile, name: str, dtype: torch.dtype) -> Tensor:
    entry = file.tensors[name]
    return gguf_types.unpack(file.raw(name), entry.type, entry.shape, dtype)


def _published_tensors(
    file: GgufFile,
    name: str,
    values: Mapping[str, Any],
    dtype: torch.dtype,
    advance: Callable[[], None],
    kept: str | None = None,
) -> Iterator[tuple[str, Tensor]]:
    for tensor in file.tensors:
        advance()
        if tensor == ROPE_FREQS:
            continue
        path, _, leaf = tensor.rpartition(".")
        published = layout.translate(path, TENSOR_NAMES[name])
        if published is None:
            yield tensor, torch.empty(0)  # reported with the others that have no place
            continue
        if kept is not None and gguf_packed.is_kept(file, tensor, kept):
            parts = gguf_packed.split_blocks(file.raw(tensor), kept, tuple(file.tensors[tensor].shape))
            q, scale = (_turn_back(name, path, leaf, part, values) for part in parts)  # rows alone are reordered
            for end, part in gguf_packed.packed_tensors(q, scale, kept, dtype).items():
                yield f"{published}.{end}", part
            continue
        is_norm = path.endswith("norm")
        turned = _turn_back(name, path, leaf, _unpack(file, tensor, torch.float32 if is_norm else dtype), values)
        yield f"{published}.{leaf}", turned


def _turn_back(name: str, path: str, leaf: str, tensor: Tensor, values: Mapping[str, Any]) -> Tensor:
    """Turn a tensor of a GGUF file into the layout of the published checkpoint."""
    order = _rotary_order(name, path, values)
    if order is not None:
        return _reorder(tensor, order)
    if name.startswith("gemma") and path.endswith("norm"):
        return tensor - 1
    return tensor.t() if _is_turned_matrix(name, path, tensor) else tensor


def _turn(name: str, path: str, leaf: str, tensor: Tensor, values: Mapping[str, Any]) -> Tensor:
    """Turn a published tensor into the layout of a GGUF file: the inverse of `_turn_back`."""
    order = _rotary_order(name, path, values)
    if order is not None:
        return _reorder(tensor, order.argsort())
    if name.startswith("gemma") and path.endswith("norm"):
        return tensor.float() + 1
    return tensor.t() if _is_turned_matrix(name, path, tensor) else tensor


def _rotary_order(name: str, path: str, values: Mapping[str, Any]) -> Tensor | None:
    if name != "llama" or not path.endswith((".attn_q", ".attn_k")):
        return None
    return half_split_order(int(values["head_dim"]))


def _reorder(tensor: Tensor, order: Tensor) -> Tensor:
    """Reorder the rows of each head, (N * H, ...)."""
    if tensor.shape[0] % len(order):
        raise CheckpointError(
            f"A query or key tensor has shape {tuple(tensor.shape)}; its rows should be heads of {len(order)}."
        )
    return tensor.reshape(-1, len(order), *tensor.shape[1:])[:, order].reshape(tensor.shape)


def _is_turned_matrix(name: str, path: str, tensor: Tensor) -> bool:
    return name == "gpt2" and path.startswith("blk.") and tensor.dim() == 2


def write_gguf(
    model: nn.Module, tokenizer: Tokenizer | None, path: str | Path, dtype: str = "f16", *, note: str = ""
) -> None:
    """Write a model and its tokenizer as one GGUF file, atomically.

    Vectors and position tables are float32. With 4- and 5-bit types, the embedding and the output matrix are finer, as
    these lose most. A matrix whose rows are no whole blocks gets the next type that fits, which the log names.

    Args:
        model: Of one of the families above.
        tokenizer: Its vocabulary; None writes none, and the ids of the config alone.
        path: The file to write.
        dtype: Of the matrices: f32, f16, bf16, q8_0, q4_0, q4_1, q4_k, q5_k or q6_k.
        note: Where the model came from, kept in the file as ``modelwright.parents``.

    Raises:
        ConfigError: The family, a setting or the dtype cannot be said in GGUF, or the tokenizer has more tokens than
            the model.
        CheckpointError: A tensor has no storage, or holds numbers that the type cannot say; the message names it.
    """
    type_name = dtype.upper()
    if type_name not in FILE_TYPES:
        raise ConfigError(f"dtype is {dtype!r}; GGUF files are written as {', '.join(DTYPES)}. Choose one of these.")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if getattr(model, "quantization_config", None) is not None or not hasattr(model, "published_names"):
        raise ConfigError(
            f"This {type(model).__name__} is quantized already or has no published names; write the original as GGUF."
        )
    values: dict[str, Any] = dict(model.config.to_hf())  # type: ignore[operator, union-attr]
    name, metadata, divisors = write_config(values)
    tensors = _new_tensors(name, model, values, type_name)
    if divisors is not None:
        tensors.insert(
            1, NewTensor(ROPE_FREQS, tuple(divisors.shape), "F32", functools.partial(_packed, divisors, "F32"))
        )
    metadata |= {"general.file_type": FILE_TYPES[type_name], "general.quantization_version": 2}
    metadata |= {"modelwright.parents": note} if note else {}
    metadata |= _vocabulary(tokenizer, values["vocab_size"])
    with bar("gguf", len(tensors)) as shown:
        write_container(Path(path), metadata, [_counted(tensor, shown.advance) for tensor in tensors])


def _counted(tensor: NewTensor, advance: Callable[[], None]) -> NewTensor:
    def make() -> Any:
        advance()
        return tensor.make()

    return NewTensor(tensor.name, tensor.shape, tensor.type, make)


def _packed(tensor: Tensor, type_name: str, name: str = ROPE_FREQS) -> Any:
    return gguf_types.pack(tensor, type_name, name)


def _new_tensors(name: str, model: nn.Module, values: Mapping[str, Any], type_name: str) -> list[NewTensor]:
    """Plan every tensor of a file; the work is done when its turn to be written comes."""
    back = {published: ours for ours, published in TENSOR_NAMES[name].items()}
    made: list[NewTensor] = []
    odd: list[str] = []
    for published, tensor in layout.pack(model, model.state_dict()).items():
        if published in LEFT_OUT.get(name, ()):
            logger.warning("%s has no place in a GGUF file of this family; left out", published)
            continue
        if tensor.is_meta:
            raise CheckpointError(f"Tensor {published} has no storage (meta device). Load the model first.")
        path, _, leaf = published.rpartition(".")
        gguf = layout.translate(path, back)
        if gguf is None:
            raise ConfigError(f"GGUF has no name for {published} in the {name} family. Save the model as a folder.")
        full = f"{gguf}.{leaf}"
        turned = functools.partial(_turned, name, gguf, leaf, tensor, values)
        is_matrix = len(tensor.shape) > 1
        shape = tuple(tensor.shape)[::-1] if is_matrix and name == "gpt2" and gguf.startswith("blk.") else tensor.shape
        kind = _type_of(full, tuple(shape), type_name)
        make = functools.partial(lambda turned, kind, full: gguf_types.pack(turned(), kind, full), turned, kind, full)
        made.append(NewTensor(full, tuple(shape), kind, make))
        if full not in KEPT_WIDE and is_matrix and kind not in (type_name, FINER_TYPES.get(type_name)):
            odd.append(f"{full} (rows of {shape[-1]}, {kind})")
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        logger.warning("%s%s: no whole blocks of %s; written in another type", odd[0], more, type_name)
    return made


def _turned(name: str, path: str, leaf: str, tensor: Any, values: Mapping[str, Any]) -> Tensor:
    whole: Tensor = tensor.make() if isinstance(tensor, layout.Stacked) else tensor.detach().to("cpu")
    return _turn(name, path, leaf, whole, values)


def _type_of(name: str, shape: tuple[int, ...], type_name: str) -> str:
    if len(shape) < 2 or name in KEPT_WIDE:
        return "F32"
    if name in ("token_embd.weight", "output.weight"):
        type_name = FINER_TYPES.get(type_name, type_name)
    while shape[-1] % BLOCK_TYPES[TYPE_NUMBERS[type_name]].block_len:
        type_name = NEXT_TYPES[type_name]
    return type_name


def _vocabulary(tokenizer: Tokenizer | None, num_rows: int) -> dict[str, Any]:
    """Return the vocabulary, filled up to the rows of the embedding, as every reader expects."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    found = gguf_vocab(tokenizer)
    num_missing = num_rows - len(found["tokenizer.ggml.tokens"])
    if num_missing < 0:
        raise ConfigError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model {num_rows} rows in its embedding. "
            "Give the tokenizer that belongs to the model."
        )
    found["tokenizer.ggml.tokens"] += [f"[PAD{num_rows - num_missing + i}]" for i in range(num_missing)]
    found["tokenizer.ggml.token_type"] += [5] * num_missing  # unused
    if "tokenizer.ggml.scores" in found:
        found["tokenizer.ggml.scores"] += [-1e4] * num_missing
    return found
