"""GGUF containers: named values and named tensors in one file, read mapped into memory and written whole or not at all.

A file is a magic word, a version, two counts, typed key-value pairs, one entry a tensor (name, sizes innermost first,
type, offset) and, from the next aligned byte on, the numbers. Every size in a header is checked against the bytes that
are there before anything is allocated or followed. What the numbers mean (block formats) is the business of
`modelwright.models.gguf_types`; vocabularies are read by `modelwright.tokenizer.gguf_vocab`.

Source: ggml, docs/gguf.md, versions 2 and 3. Not done: version 1, big-endian files, files split into several.
"""

import math
import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from modelwright.base.errors import CheckpointError
from modelwright.base.files import atomic_file

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4


class BlockType(NamedTuple):
    """How one tensor type lays out its numbers: ``block_len`` numbers stand in ``block_bytes`` bytes."""

    name: str
    block_len: int
    block_bytes: int


# By the number that stands in the file. Types that nothing here can turn into numbers are listed for their sizes.
BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    9: BlockType("Q8_1", 32, 40),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
}
TYPE_NUMBERS = {entry.name: number for number, entry in BLOCK_TYPES.items()}

# Value types by their number in the file: a struct letter each; then strings and arrays.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT8, _UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64, _INT64 = 0, 4, 5, 6, 7, 8, 9, 10, 11
_MIN_PAIR_BYTES = 8 + 4 + 1  # an empty key, its value's type, one byte of value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8


def tensor_bytes(type_name: str, shape: Sequence[int]) -> int:
    """Return how many bytes a tensor of a type and shape takes.

    >>> tensor_bytes("Q8_0", (2, 64))
    136
    """
    entry = BLOCK_TYPES[TYPE_NUMBERS[type_name]]
    return math.prod(shape) // entry.block_len * entry.block_bytes


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor stands in a file."""

    name: str
    shape: tuple[int, ...]  # outermost first, as torch counts
    type: str  # "F32", "Q8_0", ...
    start: int  # of its bytes in the file
    num_bytes: int


class GgufFile:
    """An opened GGUF file: its metadata, and its tensors as bytes of the mapped file.

    Raises:
        CheckpointError: The file is no GGUF, is cut short, or its header contradicts itself; the message names the
            field or tensor.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as handle:
                is_empty = not handle.seek(0, 2)
                self._bytes = memoryview(b"" if is_empty else mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY))
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}. Check the path.") from error
        cursor = _Cursor(self.path, self._bytes)
        if cursor.take(4, "the magic word") != MAGIC:
            raise CheckpointError(
                f"{self.path} is no GGUF file: it starts with {bytes(self._bytes[:4])!r}, not {MAGIC!r}. Check it."
            )
        self.version = cursor.number("I", "the version")
        if self.version not in (2, 3):
            kind = "a big-endian file" if self.version & 0xFFFF == 0 else f"version {self.version}"
            raise CheckpointError(
                f"{self.path} is {kind}; GGUF versions 2 and 3, little-endian, are read. Convert it with llama.cpp."
            )
        num_tensors = cursor.count("Q", _MIN_TENSOR_BYTES, "the number of tensors")
        num_pairs = cursor.count("Q", _MIN_PAIR_BYTES, "the number of metadata pairs")
        self.metadata: dict[str, Any] = {}
        for index in range(num_pairs):
            key = cursor.text(f"metadata key {index}")
            if key in self.metadata:
                raise CheckpointError(f"{self.path} holds the metadata key {key!r} twice. Fetch the file again.")
            self.metadata[key] = cursor.value(cursor.number("I", f"the type of {key}"), key)
        self.tensors = self._read_entries(cursor, num_tensors)

    def _read_entries(self, cursor: "_Cursor", num_tensors: int) -> dict[str, TensorEntry]:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment is {alignment!r}; expected a power of two. Fetch the file again."
            )
        entries = [self._read_entry(cursor, index, alignment) for index in range(num_tensors)]
        start = -(-cursor.position // alignment) * alignment
        found: dict[str, TensorEntry] = {}
        for name, shape, type_name, offset in entries:
            if name in found:
                raise CheckpointError(f"{self.path} holds the tensor {name} twice. Fetch the file again.")
            size = tensor_bytes(type_name, shape)
            if start + offset + size > len(self._bytes):
                raise CheckpointError(
                    f"{self.path} is cut short: tensor {name} ({type_name}, shape {shape}) ends at byte "
                    f"{start + offset + size:,}, the file has {len(self._bytes):,}. Fetch the file again."
                )
            found[name] = TensorEntry(name, shape, type_name, start + offset, size)
        return found

    def _read_entry(self, cursor: "_Cursor", index: int, alignment: int) -> tuple[str, tuple[int, ...], str, int]:
        name = cursor.text(f"the name of tensor {index}")
        num_dimensions = cursor.number("I", f"the number of dimensions of tensor {name}")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(
                f"{self.path}: tensor {name} has {num_dimensions} dimensions; expected 1 to {MAX_DIMENSIONS}."
            )
        shape = tuple(cursor.number("Q", f"the shape of tensor {name}") for _ in range(num_dimensions))[::-1]
        number = cursor.number("I", f"the type of tensor {name}")
        offset = cursor.number("Q", f"the offset of tensor {name}")
        if number not in BLOCK_TYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name} has the type number {number}, which is not known here. Known: "
                f"{', '.join(entry.name for entry in BLOCK_TYPES.values())}."
            )
        if 0 in shape or shape[-1] % BLOCK_TYPES[number].block_len or offset % alignment:
            raise CheckpointError(
                f"{self.path}: tensor {name} has shape {shape}, type {BLOCK_TYPES[number].name} and offset {offset}; "
                f"expected rows of whole blocks ({BLOCK_TYPES[number].block_len} numbers) at a multiple of "
                f"{alignment}. Fetch the file again."
            )
        return name, shape, BLOCK_TYPES[number].name, offset

    def raw(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor, a uint8 view of the mapped file; writing to it leaves the file alone."""
        entry = self.tensors[name]
        return np.frombuffer(self._bytes, np.uint8, entry.num_bytes, entry.start)


class _Cursor:
    """Walks through a header; every step is checked against the end of the file."""

    def __init__(self, path: Path, data: memoryview):
        self._path, self._data, self.position = path, data, 0

    def take(self, size: int, what: str) -> bytes:
        if size > len(self._data) - self.position:
            raise CheckpointError(
                f"{self._path} is cut short or damaged: {what} needs {size:,} bytes at byte {self.position:,}, "
                f"the file has {len(self._data):,}. Fetch the file again."
            )
        self.position += size
        return bytes(self._data[self.position - size : self.position])

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize(letter), what))[0]

    def count(self, letter: str, item_bytes: int, what: str) -> int:
        """Read how many items follow, and refuse more than there is room for."""
        value: int = self.number(letter, what)
        room = (len(self._data) - self.position) // item_bytes
        if value > room:
            raise CheckpointError(
                f"{self._path} is damaged: {what} is {value:,}, but the bytes that follow have room for {room:,} at "
                "most. Fetch the file again."
            )
        return value

    def text(self, what: str) -> str:
        data = self.take(self.count("Q", 1, f"the length of {what}"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            # Some vocabularies hold pieces that are no UTF-8; the bytes survive as surrogates.
            return data.decode("utf-8", errors="surrogateescape")

    def value(self, number: int, key: str) -> Any:
        if number == _STRING:
            return self.text(key)
        if number in _SCALARS:
            return self.number(_SCALARS[number], key)
        if number != _ARRAY:
            raise CheckpointError(f"{self._path}: {key} has the value type {number}; known: 0 to 12. Fetch it again.")
        item = self.number("I", f"the item type of {key}")
        if item == _STRING:
            return [self.text(f"{key}[{i}]") for i in range(self.count("Q", 8, f"the length of {key}"))]
        if item not in _SCALARS:
            raise CheckpointError(f"{self._path}: {key} is an array of value type {item}; expected numbers or strings.")
        letter = _SCALARS[item]
        size = struct.calcsize(letter)
        length = self.count("Q", size, f"the length of {key}")
        data = self.take(length * size, key)
        return data if item == _UINT8 else list(struct.unpack(f"<{length}{letter}", data))


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; its bytes are asked for when its turn comes, so that one at a time is in memory."""

    name: str
    shape: tuple[int, ...]  # outermost first
    type: str
    make: Callable[[], np.ndarray]  # the bytes, uint8


def write_container(path: Path, metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> None:
    """Write a GGUF file, atomically.

    Whole numbers become uint32 (int32 when negative, uint64 when large), lists of them int32, floats float32, bytes an
    array of uint8.

    Raises:
        CheckpointError: A value has a type that GGUF cannot hold.
        DeviceError: The disk is full.
    """
    head = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_pack_text(key), _pack_value(key, value)]
    offset = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        head += [_pack_text(tensor.name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        head.append(struct.pack("<IQ", TYPE_NUMBERS[tensor.type], offset))
        offset += _aligned(tensor_bytes(tensor.type, tensor.shape))
    with atomic_file(path, "wb") as handle:
        _write_padded(handle, b"".join(head))
        for tensor in tensors:
            data = np.ascontiguousarray(tensor.make()).view(np.uint8).reshape(-1)
            assert data.nbytes == tensor_bytes(tensor.type, tensor.shape), tensor.name
            _write_padded(handle, data.data)


def _aligned(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _write_padded(handle: IO[bytes], data: bytes | memoryview) -> None:
    handle.write(data)
    handle.write(b"\0" * (_aligned(len(data)) - len(data)))


def _pack_text(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _pack_value(key: str, value: Any) -> bytes:
    """Return a value's type and bytes."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _pack_text(value)
    if isinstance(value, bytes):
        return struct.pack("<IIQ", _ARRAY, _UINT8, len(value)) + value
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(item, str) for item in value):
            packed = b"".join(map(_pack_text, value))
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + packed
        kinds = {_scalar_type(key, item) for item in value}
        kind = kinds.pop() if len(kinds) == 1 else _FLOAT32 if _FLOAT32 in kinds else _INT32
        kind = _INT32 if kind == _UINT32 else kind  # what readers expect of token types and the like
        return struct.pack(f"<IIQ{len(value)}{_SCALARS[kind]}", _ARRAY, kind, len(value), *value)
    kind = _scalar_type(key, value)
    return struct.pack(f"<I{_SCALARS[kind]}", kind, value)


def _scalar_type(key: str, value: Any) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        if value < 0:
            return _INT32 if value >= -(1 << 31) else _INT64
        return _UINT32 if value < 1 << 32 else _UINT64
    if isinstance(value, float):
        return _FLOAT32
    raise CheckpointError(f"The metadata value {key} is a {type(value).__name__}; GGUF holds numbers, text and lists.")
