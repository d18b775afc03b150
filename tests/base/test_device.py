"""Devices: what is asked of the machine, and what it says of itself."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modelwright.base import device
from modelwright.base.errors import DeviceError


def test_the_cpu_is_taken_where_there_is_no_gpu():
    assert device.pick_device("cpu") == torch.device("cpu")
    assert device.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(DeviceError, match=r"'cuda:0'.*no usable CUDA GPU.*Use cpu"):
        device.pick_device("cuda:0")


def test_the_matrix_rate_is_plausible():
    rate = device.measure_matmul_flops(torch.device("cpu"), torch.float32, 0.05)
    assert 1e9 < rate < 1e15


def test_compilation_can_be_turned_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MODELWRIGHT_COMPILE", "0")
    assert not device.can_compile()


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MODELWRIGHT_COMPILE", raising=False)
    monkeypatch.setenv("PATH", "")
    assert not device.can_compile()


def test_the_machine_describes_itself():
    machine = device.describe_machine()
    assert machine.num_cores >= 1
    assert machine.memory_bytes > 2**28
    assert machine.torch_version == torch.__version__
    assert 2**20 < device.peak_memory_bytes() <= machine.memory_bytes


def test_bf16_is_called_fast_only_where_the_cpu_lists_it(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    for flags, expected in ((frozenset({"avx512_bf16"}), True), (frozenset({"avx2"}), False)):
        monkeypatch.setattr(device, "cpu_flags", lambda flags=flags: flags)
        assert device.has_fast_bf16(cpu) is expected


def test_a_child_does_not_inherit_the_peak_of_its_parent():
    held = np.ones(2**27, dtype=np.uint8)  # 128 MB
    code = "from modelwright.base.device import peak_memory_bytes; print(peak_memory_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < device.peak_memory_bytes() and held.any()
    assert int(child.stdout) < 100 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the pages")
def test_pages_that_are_let_go_leave_memory_and_come_back_as_they_were(tmp_path):
    def mapped_bytes() -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("RssFile:")[2].split()[0]) * 1024

    size = 32 << 20
    (tmp_path / "numbers").write_bytes(np.arange(size, dtype=np.uint8).tobytes())
    storage = torch.UntypedStorage.from_file(str(tmp_path / "numbers"), False, size)
    numbers = torch.empty(0, dtype=torch.uint8).set_(storage)
    total = int(numbers.sum(dtype=torch.int64))
    before = mapped_bytes()
    device.let_pages_go(numbers.data_ptr(), size)
    assert mapped_bytes() < before - size // 2
    assert int(numbers.sum(dtype=torch.int64)) == total
    own = torch.arange(1 << 20)  # no file behind it: it must not change
    device.let_pages_go(own.data_ptr(), 8 << 20)
    assert torch.equal(own, torch.arange(1 << 20))
