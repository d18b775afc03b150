import struct
from pathlib import Path

import numpy as np
import pytest

from modelwright.base.errors import CheckpointError
from modelwright.base.gguf_file import BLOCK_TYPES, GgufFile, NewTensor, tensor_bytes, write_container

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.5,
    "a.flag": True,
    "a.negative": -3,
    "a.large": 1 << 40,
    "a.words": ["a", "Ġé", ""],
    "a.numbers": [1, -1, 6],
    "a.floats": [0.5, -1.0, 0.0],
    "a.bytes": b"\x00\xff",
    "a.nothing": [],
    "a.broken": b"\xe2\x96".decode("utf-8", errors="surrogateescape"),
}


def plain(name: str, values: np.ndarray) -> NewTensor:
    return NewTensor(name, values.shape, "F32", lambda: values.astype(np.float32).view(np.uint8))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_container(path, METADATA, [plain("one", np.arange(6.0).reshape(2, 3)), plain("two", np.arange(5.0))])
    return path


def test_what_is_written_is_read_back(file: Path):
    read = GgufFile(file)
    assert read.version == 3
    assert read.metadata == METADATA
    assert list(read.tensors) == ["one", "two"]
    assert read.tensors["one"].shape == (2, 3)
    assert np.array_equal(read.raw("one").view(np.float32).reshape(2, 3), np.arange(6.0).reshape(2, 3))
    assert np.array_equal(read.raw("two").view(np.float32), np.arange(5.0))
    assert all(entry.start % 32 == 0 for entry in read.tensors.values())
    before = file.read_bytes()
    read.raw("one")[:] = 255
    assert file.read_bytes() == before


def test_another_alignment_is_followed(tmp_path: Path):
    path = tmp_path / "x.gguf"
    write_container(path, {"general.alignment": 32, "a": 1}, [plain("t", np.arange(3.0))])
    data = path.read_bytes()
    at = data.index(b"general.alignment") + len("general.alignment") + 4
    start = GgufFile(path).tensors["t"].start
    assert start == 128
    path.write_bytes(data[:at] + struct.pack("<I", 8) + data[at + 4 :])
    assert start - 32 < GgufFile(path).tensors["t"].start <= start
    path.write_bytes(data[:at] + struct.pack("<I", 12) + data[at + 4 :])
    with pytest.raises(CheckpointError, match=r"general.alignment is 12"):
        GgufFile(path)


@pytest.mark.peer
def test_the_reference_package_reads_what_is_written_and_agrees_on_sizes(file: Path):
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(file).fields
    for key in ("general.architecture", "llama.block_count", "a.words", "a.numbers", "a.flag", "a.negative", "a.large"):
        assert fields[key].contents() == METADATA[key]
    tensors = {t.name: t.data for t in gguf.GGUFReader(file).tensors}
    assert np.array_equal(tensors["one"], np.arange(6.0).reshape(2, 3))
    for number, (length, size) in gguf.GGML_QUANT_SIZES.items():
        if int(number) in BLOCK_TYPES:
            assert BLOCK_TYPES[int(number)] == (number.name, length, size)


@pytest.mark.peer
def test_a_file_of_the_reference_package_is_read(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    writer.add_token_scores([0.5, 1.5])
    writer.add_tensor("t", np.arange(64, dtype=np.float16).reshape(2, 32))
    writer.add_tensor("u", np.arange(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GgufFile(tmp_path / "x.gguf")
    assert read.metadata["llama.block_count"] == 3
    assert read.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert read.metadata["tokenizer.ggml.scores"] == [0.5, 1.5]
    assert np.array_equal(read.raw("t").view(np.float16), np.arange(64))
    assert np.array_equal(read.raw("u").view(np.float32), np.arange(7))


def test_every_way_of_cutting_a_file_short_is_an_error_of_ours(file: Path):
    data = file.read_bytes()
    end = GgufFile(file).tensors["two"].start + 5 * 4
    for length in [*range(0, 300), *range(300, end, 7)]:
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut short|no GGUF|damaged"):
            GgufFile(file)


def test_the_tensor_that_is_cut_short_is_named(file: Path):
    file.write_bytes(file.read_bytes()[: GgufFile(file).tensors["two"].start + 19])
    with pytest.raises(CheckpointError, match="tensor two .* ends at byte"):
        GgufFile(file)


def test_garbage_never_escapes_as_another_error(file: Path):
    data, random = file.read_bytes(), np.random.default_rng(0)
    for _ in range(400):
        broken = bytearray(data)
        for at in random.integers(4, len(data), 4):
            broken[at] = random.integers(256)
        file.write_bytes(broken)
        try:
            GgufFile(file)
        except CheckpointError:
            pass
    file.write_bytes(random.bytes(1000))
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        GgufFile(file)


def head(num_tensors: int = 0, num_pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(name: str, shape: tuple[int, ...], number: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + sizes + struct.pack("<IQ", number, offset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "needs 4 bytes"),
        (head(num_pairs=1 << 60) + bytes(100), "number of metadata pairs is 1,152,921,504,606,846,976"),
        (head(num_tensors=1 << 40) + bytes(100), "number of tensors is"),
        (head(num_pairs=1) + struct.pack("<Q", 1 << 62) + bytes(50), "length of metadata key 0 is"),
        (head(num_pairs=1) + text("k") + struct.pack("<IIQ", 9, 6, 1 << 61) + bytes(9), "length of k is"),
        (head(num_pairs=1) + text("k") + struct.pack("<IIQ", 9, 8, 1 << 61) + bytes(9), "length of k is"),
        (head(num_pairs=1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "k is an array of value type 9"),
        (head(num_pairs=1) + text("k") + struct.pack("<IQ", 77, 1), "k has the value type 77"),
        (head(version=1), "version 1"),
        (head(version=3 << 24), "big-endian"),
        (head(1) + entry("w", (2, 33), 8) + bytes(200), "tensor w has shape .2, 33., type Q8_0"),
        (head(1) + entry("w", (2, 0)) + bytes(200), "tensor w has shape"),
        (head(1) + entry("w", (2,), offset=3) + bytes(200), "tensor w .* offset 3"),
        (head(1) + entry("w", (2,), number=99) + bytes(200), "tensor w has the type number 99"),
        (head(1) + entry("w", (1 << 40, 1 << 40)) + bytes(200), "tensor w .* ends at byte"),
        (head(1) + entry("w", (1, 1, 1, 1, 1)) + bytes(200), "tensor w has 5 dimensions"),
        (head(2) + entry("w", (2,)) * 2 + bytes(200), "holds the tensor w twice"),
    ],
)
def test_headers_that_lie_are_refused_by_name_before_anything_is_allocated(tmp_path: Path, data: bytes, message: str):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        GgufFile(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path):
    for path in (tmp_path / "nowhere.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path.name}.* cannot be read"):
            GgufFile(path)


def test_a_failed_write_leaves_the_old_file(file: Path):
    before = file.read_bytes()

    def fail() -> np.ndarray:
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        write_container(file, {}, [plain("one", np.zeros(3)), NewTensor("two", (3,), "F32", fail)])
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    with pytest.raises(CheckpointError, match="value k is a dict"):
        write_container(file, {"k": {}}, [])


def test_sizes_count_whole_blocks():
    assert tensor_bytes("Q4_K", (3, 512)) == 3 * 2 * 144
