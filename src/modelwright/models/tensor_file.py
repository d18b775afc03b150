"""Safetensors files: read them mapped into memory, one shard at a time; write them whole or not at all.

A file is 8 bytes of header length (little-endian), a JSON header of names, dtypes, shapes and byte ranges, and the
raw numbers. Every figure in a header is held against the bytes that are there before a number is touched. Tensors are
views of the mapped file: pages come in when they are needed, or sooner (`modelwright.models.prefetch`). The writer
streams tensor by tensor, so saving needs no second copy of the weights, and pads the header so that the numbers start
on a 64-byte boundary. Which files a folder has, pickled ones included, is said here; those are read by
`modelwright.models.pickled`.
Source: https://github.com/huggingface/safetensors (format).
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelwright.base.errors import CheckpointError, DataError
from modelwright.base.files import atomic_file, read_json, write_json
from modelwright.models import pickled
from modelwright.models.layout import Stacked
from modelwright.models.prefetch import Prefetch

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ALIGNMENT = 64
MAX_HEADER_BYTES = 100_000_000  # the reference reader's bound
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor stands in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return self.stop - self.start


def read_folder(folder: Path, *, is_kept: bool = False) -> Iterator[tuple[Path, str, Tensor]]:
    """Yield (file, published name, tensor) for everything in a model folder; tensors are views of the mapped file.

    Args:
        folder: With safetensors, or with pickled weights that can be read without running code.
        is_kept: The caller keeps the tensors as they are, so the files may be brought into memory ahead of their use.

    Raises:
        CheckpointError: No weights, or a shard that is missing, damaged, outside the folder or without a tensor that
            the index promises.
    """
    with Prefetch() as prefetch:
        for file, promised in find_shards(folder).items():
            read = pickled.read_pickle if file.suffix == pickled.SUFFIX else _read_file
            names: set[str] = set()
            for name, tensor in read(file):
                if is_kept and not names and file.suffix != pickled.SUFFIX:
                    prefetch.add(tensor.untyped_storage())
                names.add(name)
                yield file, name, tensor
            lacking = promised - names
            if lacking:
                raise CheckpointError(
                    f"{file} lacks the tensor {min(lacking)}, which the index says is there. Fetch or save both again."
                )


def folder_names(folder: Path) -> list[str]:
    """Return the published names of everything in a model folder, without reading a number."""
    shards = [file for file in find_shards(folder) if file.suffix != pickled.SUFFIX]
    return [name for file in shards for name in read_header(file)]


def read_header(file: Path) -> dict[str, Entry]:
    """Return where each tensor of a safetensors file stands, without reading a number.

    Raises:
        CheckpointError: The file is cut short, or its header contradicts itself or the file's size.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(file, size, f"the header is said to take {length:,} bytes")
            text = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Check its permissions.") from error
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, size, f"its header is no JSON ({error})") from error
    except _TwiceError as error:
        raise CheckpointError(f"{file} holds the tensor {error} twice. Fetch or save it again.") from None
    if not isinstance(header, dict):
        raise _damaged(file, size, "its header is no JSON object")
    header.pop("__metadata__", None)
    entries = {name: _read_entry(file, name, fields, 8 + length, size) for name, fields in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise _damaged(file, size, f"tensor {name} starts at byte {entry.start:,}, the one before ends at {end:,}")
        end = entry.stop
    if end != size:
        raise _damaged(file, size, f"its tensors end at byte {end:,}")
    return entries


class _TwiceError(Exception):
    """A key stands twice in a JSON object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _TwiceError(next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i])))
    return values


def _damaged(file: Path, size: int, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file} ({size:,} bytes) is not a whole safetensors file: {why}. It may be cut short or damaged; fetch or "
        "save it again."
    )


def _read_entry(file: Path, name: str, fields: Any, base: int, size: int) -> Entry:
    try:
        dtype, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        is_sound = all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        is_sound = False
    if not is_sound:
        raise _damaged(file, size, f"tensor {name} is described as {str(fields)[:80]}")
    if dtype not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name} has the dtype {dtype}; known: {', '.join(DTYPES)}.")
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise _damaged(file, size, f"tensor {name}, {dtype} of shape {shape}, has {stop - start:,} bytes")
    if base + stop > size:
        raise _damaged(file, size, f"tensor {name} should end at byte {base + stop:,}")
    return Entry(DTYPES[dtype], shape, base + start, base + stop)


def _read_file(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one file in the order they stand, as views of a private mapping of it."""
    entries = read_header(file)
    # Private: where a weight is written to, the file does not change.
    storage: Any = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        size = entry.dtype.itemsize
        if entry.start % size:  # a header that is not padded
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            yield name, whole[entry.start : entry.stop].clone().view(entry.dtype).view(entry.shape)
        else:
            empty = torch.empty(0, dtype=entry.dtype)
            yield name, empty.set_(storage, entry.start // size, entry.shape, _strides(entry.shape))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def find_shards(folder: Path) -> dict[Path, set[str]]:
    """Return the weight files of a folder, each with the tensors that the index promises in it.

    Raises:
        CheckpointError: There is none, the index is damaged or names a file outside the folder, or a shard is missing.
    """
    for whole, index in ((WEIGHTS, INDEX), (pickled.WEIGHTS, pickled.INDEX)):
        if (folder / whole).is_file():
            return {folder / whole: set()}
        if (folder / index).is_file():
            return _read_index(folder / index)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf"))
    hint = f"It has {others[0]}, which is no such file." if others else "Give the folder of a whole model."
    raise CheckpointError(f"{folder} holds neither {WEIGHTS} nor {INDEX} nor {pickled.WEIGHTS}. {hint}")


def _read_index(index: Path) -> dict[Path, set[str]]:
    try:
        weight_map = read_json(index)["weight_map"].items()
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of weights ({error}); expected JSON with weight_map. Fetch it again."
        ) from error
    kind = pickled.SUFFIX if index.name == pickled.INDEX else ".safetensors"
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map:
        # A link out of the folder is the owner's own doing (the hub's cache is made of them); a name is not.
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise CheckpointError(
                f"{index} places {name} in {file!r}; expected the name of a file in the same folder. "
                "Nothing outside the model's folder is read."
            )
        if not file.endswith(kind):
            raise CheckpointError(f"{index} places {name} in {file!r}; expected a file that ends with {kind}.")
        shards.setdefault(index.parent / file, set()).add(name)
    for file, names in shards.items():
        if not file.is_file():
            raise CheckpointError(
                f"The shard {file} is missing; {index.name} places {len(names)} tensors in it, for instance "
                f"{min(names)}. Fetch the whole model."
            )
    return shards


def write_folder(folder: Path, tensors: Mapping[str, Tensor | Stacked], max_shard_bytes: int) -> None:
    """Write the weights of a folder, in several files beyond ``max_shard_bytes``, and remove those of before."""
    shards: list[dict[str, Tensor | Stacked]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        files = [WEIGHTS]
    else:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_tensors(folder / file, shard)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(t.nbytes for t in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        files.append(INDEX)
    for stale in (*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS, folder / INDEX):
        if stale.name not in files:
            stale.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Stacked]) -> None:
    """Write one safetensors file, atomically.

    Raises:
        CheckpointError: A tensor has no storage or a dtype that the format does not have here.
        DeviceError: The disk is full.
    """
    assert sys.byteorder == "little", "safetensors are little-endian"
    # Wide dtypes first, as the reference writer does: then every tensor starts on a multiple of its item size. Among
    # these the model's own order: the first forward pass can then run behind the reading of a cold file.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        if tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
            what = "has no storage (meta device)" if tensor.is_meta else f"has dtype {tensor.dtype}"
            raise CheckpointError(f"Tensor {name} {what}; it cannot be saved. Load or cast the model first.")
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with atomic_file(path, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little"))
        handle.write(text)
        for _, tensor in ordered:
            whole = tensor.make() if isinstance(tensor, Stacked) else tensor.detach().to("cpu").contiguous()
            flat = whole.reshape(-1)
            handle.write(flat.view(torch.uint8).numpy().data)
