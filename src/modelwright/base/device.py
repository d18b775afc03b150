"""What this machine is and how fast: devices, number formats, memory, and its measured matrix rate."""

import ctypes
import functools
import os
import platform
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelwright.base import env
from modelwright.base.errors import DeviceError

if TYPE_CHECKING:
    import torch

MADV_PAGEOUT = 21  # Linux 5.4: give pages back; those of a file are dropped, others go to swap where there is one


@dataclass(frozen=True)
class Machine:
    """The facts that results are quoted with."""

    cpu: str
    num_cores: int
    memory_bytes: int
    device: str
    torch_version: str


def pick_device(name: str | None = None) -> "torch.device":
    """Return the named device, or a CUDA one where there is one, or the CPU.

    Raises:
        DeviceError: The named device is not on this machine.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"The device is {name!r}, but this machine has no usable CUDA GPU. Use cpu, or leave it out.")
    return device


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the feature flags of the CPU, as Linux names them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            for line in handle:
                if line.startswith(("flags", "Features")):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def has_fast_bf16(device: "torch.device") -> bool:
    """Tell whether bfloat16 matrix products are computed by the hardware and not emulated."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def can_compile() -> bool:
    """Tell whether torch.compile can work here: not switched off, and a C++ compiler is found."""
    if env.read("MODELWRIGHT_COMPILE") == "0":
        return False
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def peak_memory_bytes() -> int:
    """Return the largest resident size this process has had.

    Linux keeps it in /proc. What getrusage tells there also holds the size of the process that this one was forked
    from: a child of a program of 2 GB would never be smaller.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def let_pages_go(address: int, num_bytes: int) -> None:
    """Ask the system to take back the memory of numbers that will hardly be read again, such as a mapped weight's.

    Nothing is lost whatever the memory is: pages of a file are read again when they are wanted. Whole pages alone are
    given back; systems without this call keep them.
    """
    if sys.platform != "linux":
        return
    page = resource.getpagesize()
    start, end = -(-address // page) * page, (address + num_bytes) // page * page
    if end > start:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(start, end - start, MADV_PAGEOUT)


def measure_matmul_flops(device: "torch.device", dtype: "torch.dtype", seconds: float = 1.0) -> float:
    """Measure the best sustained rate of a square matrix product, in FLOP/s (a multiply-add counts as two)."""
    import torch

    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = a @ b
    best, stop = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > stop:
            return 2 * size**3 / best


def describe_machine() -> Machine:
    """Return the facts of this machine."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            name = next((line.partition(":")[2].strip() for line in handle if line.startswith("model name")), name)
    except OSError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(name, cores, memory, device, torch.__version__)
