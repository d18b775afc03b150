"""What a model on disk is, from its headers alone: parameters and bytes by part, dtypes, and what its cache will cost.

The model is put together on the meta device with the shapes that stand in the files, so a folder is checked as loading
checks it (names, shapes, ties) and no weight is read; ``check_values`` reads them, to find NaN and infinity, which
loading lets pass. A part is told by the kind of layer and by the name it has here. Cache sizes follow from the
model's ``cache_layout``: windows stop growing, recurrent state is of one size.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.gguf_file import GgufFile
from modelwright.models import gguf_types
from modelwright.models.assemble import assemble, build_empty
from modelwright.models.gguf_names import TENSOR_NAMES
from modelwright.models.gguf_names import read_config as read_gguf_config
from modelwright.models.layout import from_published, tied_names, to_published, translate
from modelwright.models.tensor_file import find_shards, read_folder, read_header
from modelwright.models.weights import load_model, read_config
from modelwright.nn import recurrent as nn_recurrent
from modelwright.nn.moe import SparseMoe
from modelwright.nn.norm import RMSNorm

PARTS = ("embedding", "attention", "mlp", "experts", "router", "recurrent", "convolution", "norm", "head", "other")
CONTEXTS = (1024, 4096, 16384, 65536, 131072)
# What stands in a dotted name here -> the part. The first that matches counts, since a router stands inside of an mlp.
WORDS = {
    "router": "router",
    "experts": "experts",
    "shared_gate": "experts",
    "shared": "experts",
    "lm_head": "head",
    "head": "head",
    "pooler": "head",
    "projection": "head",
    "projector": "head",
    "attention": "attention",
    "cross": "attention",
    "mlp": "mlp",
    "channel_mix": "mlp",
    "mixer": "recurrent",
    "time_mix": "recurrent",
    "conv": "convolution",
    "conv1": "convolution",
    "conv2": "convolution",
    "image_projection": "head",
    "text_projection": "head",
    "hidden_layer": "mlp",
    "output": "head",
}
EMBEDDED = ("embed", "patch", "cls_token", "class_token", "mask_token", "position")  # in a name: an embedding


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    name: str  # as in the file
    part: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    num_bad: int | None = None  # NaN and infinities; None: the values were not read


@dataclass(frozen=True)
class Part:
    """What one part of a model adds up to."""

    name: str
    parameters: int
    active_parameters: int  # those that one token passes through
    nbytes: int  # in the file


@dataclass(frozen=True)
class CacheCost:
    """What one sequence costs in the cache."""

    context_len: int
    nbytes: int
    bytes_per_token: float  # on average
    next_token_bytes: int  # what one more token adds


@dataclass(frozen=True)
class Summary:
    """What a model on disk is."""

    path: str
    family: str
    architecture: str
    parameters: int
    active_parameters: int
    nbytes: int  # of the tensors in the files
    dtypes: dict[str, int]  # dtype -> bytes
    context_len: int | None  # tokens a sequence may have; None: no bound
    cache_dtype: str
    cache: list[CacheCost] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    tensors: list[StoredTensor] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)  # a tensor that is another one -> that one, published names

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the weights in memory: as stored, and in other formats."""
        widths = {"float32": 32, "bfloat16": 16, "8 bits": 8, "4 bits": 4}
        return {"as stored": self.nbytes} | {name: self.parameters * bits // 8 for name, bits in widths.items()}

    @property
    def bad_tensors(self) -> list[StoredTensor]:
        """Those that hold NaN or infinity, where that was looked for."""
        return [tensor for tensor in self.tensors if tensor.num_bad]


def summarize(path: str | Path, *, check_values: bool = False) -> Summary:
    """Say what a model is, from a folder or a file that `load_model` reads.

    Args:
        path: Folder or file.
        check_values: Read every weight, and count NaN and infinities.

    Raises:
        CheckpointError: What loading would raise: something is missing, damaged or does not fit.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        model, tensors = _open_gguf(path)
    elif path.is_file():
        model = load_model(path, device="meta")
        tensors = [_stored(model, n, str(t.dtype), tuple(t.shape), t.nbytes) for n, t in model.named_parameters()]
    else:
        model, tensors = _open_folder(path)
    if check_values:
        bad = dict(_count_bad(path))
        tensors = [replace(tensor, num_bad=bad.get(tensor.name, 0)) for tensor in tensors]
    return _add_up(path, model, tensors)


def _open_folder(folder: Path) -> tuple[nn.Module, list[StoredTensor]]:
    values = read_config(folder)
    found: list[tuple[str, Tensor]] = []
    for file in find_shards(folder):
        if file.suffix == ".safetensors":
            entries = read_header(file).items()
            found += [(n, torch.empty(e.shape, dtype=e.dtype, device="meta")) for n, e in entries]
    if not found:  # pickled: mapped, not read
        found = [(name, tensor.to("meta")) for _, name, tensor in read_folder(folder)]
    model = assemble(folder, values, found, device="meta")
    return model, [_stored(model, n, str(t.dtype), tuple(t.shape), t.nbytes) for n, t in found]


def _open_gguf(path: Path) -> tuple[nn.Module, list[StoredTensor]]:
    file = GgufFile(path)
    name = str(file.metadata.get("general.architecture"))
    if name not in TENSOR_NAMES:
        load_model(path)  # says why not
    shapes = {entry.name: entry.shape for entry in file.tensors.values()}
    model = build_empty(path, read_gguf_config(name, file.metadata, shapes))
    tensors = []
    for entry in file.tensors.values():
        stem, _, leaf = entry.name.rpartition(".")
        published = translate(stem, TENSOR_NAMES[name]) or stem
        stored = _stored(model, f"{published}.{leaf}", entry.type, entry.shape, entry.num_bytes)
        tensors.append(StoredTensor(entry.name, stored.part, entry.type, entry.shape, entry.num_bytes))
    return model, tensors


def _stored(model: nn.Module, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> StoredTensor:
    return StoredTensor(name, _part_of(model, _our_name(model, name)), dtype.removeprefix("torch."), shape, nbytes)


def _our_name(model: nn.Module, published: str) -> str:
    """Return our name of a stored tensor, of a fused one the name of its first part."""
    path, _, leaf = published.removeprefix(getattr(model, "optional_prefix", "")).rpartition(".")
    for whole, parts in getattr(model, "published_fused", {}).items():
        first = translate(path, {whole: parts[0]})
        if first is not None:
            return f"{first}.{leaf}"
    return from_published(model, published) or published


def _part_of(model: nn.Module, name: str) -> str:
    path = name.rpartition(".")[0]
    words = path.split(".")
    try:
        owner: nn.Module | None = model.get_submodule(path)
    except AttributeError:
        owner = None
    if isinstance(owner, (RMSNorm, nn.LayerNorm, nn.GroupNorm)) or words[-1].endswith("norm"):
        return "norm"
    if type(owner).__module__ == nn_recurrent.__name__:
        return "recurrent"
    found = next((part for word, part in WORDS.items() if word in words), None)
    if found is None and (isinstance(owner, nn.Embedding) or any(word in name for word in EMBEDDED)):
        return "embedding"
    return found or "other"


def _add_up(path: Path, model: nn.Module, tensors: list[StoredTensor]) -> Summary:
    total, active = _count_parameters(model)
    nbytes: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        nbytes[tensor.part] += tensor.nbytes
        dtypes[tensor.dtype] += tensor.nbytes
    names = [name for name in PARTS if total[name] or nbytes[name]]
    values: dict[str, Any] = model.config.to_hf()  # type: ignore[operator, union-attr]
    most = next((name for name, _ in dtypes.most_common() if name in ("float32", "float16", "bfloat16")), "bfloat16")
    longest = getattr(model.config, "max_seq_len", None)
    return Summary(
        path=str(path),
        family=values.get("model_type", ""),
        architecture=getattr(model, "architecture", (values.get("architectures") or [type(model).__name__])[0]),
        parameters=sum(total.values()),
        active_parameters=sum(active.values()),
        nbytes=sum(nbytes.values()),
        dtypes=dict(dtypes.most_common()),
        context_len=longest,
        cache_dtype=most,
        cache=_cache_costs(model, longest, getattr(torch, most).itemsize),
        parts=[Part(name, total[name], active[name], nbytes[name]) for name in names],
        tensors=tensors,
        tied={to_published(model, second): to_published(model, first) for second, first in tied_names(model).items()},
    )


def _count_parameters(model: nn.Module) -> tuple[Counter[str], Counter[str]]:
    """Count by part, all and those that a token passes through; a tied parameter once, a low-bit layer by its shape."""
    sparse = {name: m.options for name, m in model.named_modules() if isinstance(m, SparseMoe)}
    total: Counter[str] = Counter()
    active: Counter[str] = Counter()
    for name, count in _sizes(model):
        part = _part_of(model, name)
        total[part] += count
        options = next((o for prefix, o in sparse.items() if name.startswith(f"{prefix}.experts.")), None)
        active[part] += count if options is None else count * options.top_k // options.num_experts
    return total, active


def _sizes(model: nn.Module) -> Iterator[tuple[str, int]]:
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield dot + name, parameter.numel()
        if hasattr(module, "weight_packed"):
            yield f"{dot}weight", module.in_features * module.out_features  # type: ignore[operator, misc]


def _cache_costs(model: nn.Module, longest: int | None, itemsize: int) -> list[CacheCost]:
    if not hasattr(model, "cache_layout"):
        return []
    layers = model.cache_layout()  # type: ignore[operator]
    lengths = [n for n in CONTEXTS if longest is None or n < longest]
    if longest is not None and longest <= 1 << 30:
        lengths.append(longest)
    costs = []
    for length in lengths:
        now, after = (itemsize * sum(layer.size(n) for layer in layers) for n in (length, length + 1))
        costs.append(CacheCost(length, now, now / length, after - now))
    return costs


def _count_bad(path: Path) -> Iterator[tuple[str, int]]:
    """Yield how many NaN and infinities each stored tensor holds."""
    if path.is_dir():
        stored: Iterator[tuple[str, Tensor]] = ((name, tensor) for _, name, tensor in read_folder(path))
    elif path.suffix == ".gguf":
        file = GgufFile(path)
        entries = file.tensors.values()
        stored = ((e.name, gguf_types.unpack(file.raw(e.name), e.type, e.shape, torch.float32)) for e in entries)
    else:
        stored = iter(load_model(path).named_parameters())
    for name, tensor in stored:
        if tensor.is_floating_point():
            yield name, tensor.numel() - int(torch.isfinite(tensor).sum())
