"""Compiling the CPU kernels: once, in the background, kept for the next start.

The C++ files beside this one include nothing but the standard library, so a compiler takes three seconds, and Python
calls them through ctypes with the addresses of tensors.
The result is kept under a name that hashes the sources, the flags, the compiler and the CPU; it is written to a
temporary name first, so that several processes may build at once. Nothing is downloaded.

Where the library is missing (no compiler, another CPU, still compiling) callers use the plain PyTorch path.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from modelwright.base import env
from modelwright.base.device import cpu_flags
from modelwright.base.logs import get_logger

log = get_logger(__name__)
SOURCES = ("cpu_math.h", "cpu_team.h", "cpu_linear.h", "cpu_attention.h", "cpu_round.h", "cpu_step.cpp")
NEEDED_FLAGS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"})
# No contraction: a multiplication and an addition that the source keeps apart stay apart in every copy of a loop.
FLAGS = ("-O3", "-march=native", "-std=c++20", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w")
SECONDS = 120  # a compiler that takes longer is given up


@functools.cache
def missing() -> str | None:
    """Return why the kernels cannot be compiled for this machine; None when they can."""
    if env.read("MODELWRIGHT_COMPILE") == "0":
        return "MODELWRIGHT_COMPILE is 0"
    lacking = NEEDED_FLAGS - cpu_flags()
    if lacking:
        return f"the CPU has no {', '.join(sorted(lacking))}"
    return None if _compiler() else "no C++ compiler is found (g++, clang++ or c++)"


def _compiler() -> str | None:
    return next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


class _Build:
    """The one compilation of this process."""

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.failure: str | None = missing()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        with self._lock:
            if self._thread is None and self.library is None and self.failure is None:
                self._thread = threading.Thread(target=self._work, name="kernel-build", daemon=True)
                self._thread.start()

    def wait(self, timeout: float | None) -> ctypes.CDLL | None:
        self.start()
        if self._thread is not None:
            self._thread.join(timeout)
        return self.library

    def _work(self) -> None:
        try:
            self.library = load(compiled())
        except (OSError, subprocess.SubprocessError) as error:
            self.failure = f"the CPU kernels could not be built: {error}"
            log.warning("%s; the PyTorch path serves", self.failure)


@functools.cache
def _build() -> _Build:
    return _Build()


def start() -> None:
    """Begin to compile in the background, or load what was compiled before."""
    _build().start()


def ready() -> ctypes.CDLL | None:
    """Return the library if it is there by now; begin to build it if not."""
    start()
    return _build().library


def wait(timeout: float | None = None) -> ctypes.CDLL | None:
    """Return the library when it is built, within ``timeout`` seconds; None when it is not, for which see `failure`."""
    return _build().wait(timeout)


def failure() -> str | None:
    """Return why there will be no library; None while there is hope."""
    return _build().failure


def compiled(*more_flags: str) -> Path:
    """Return the compiled library's file, compiling it if it is not there; ``more_flags`` make another library.

    Raises:
        OSError: No compiler, or the folder cannot be written.
        subprocess.SubprocessError: The compiler failed or took too long.
    """
    compiler = _compiler()
    if compiler is None:
        raise OSError("no C++ compiler is found")
    here = Path(__file__).parent
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    flags = (*FLAGS, *more_flags)
    digest = hashlib.blake2b(digest_size=10)
    for part in (*(here.joinpath(name).read_text(encoding="utf-8") for name in SOURCES), *flags, version):
        digest.update(part.encode() + b"\0")
    digest.update(" ".join(sorted(cpu_flags())).encode())
    target = folder() / f"cpu-{digest.hexdigest()}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, suffix=".so.part")
    os.close(descriptor)
    try:
        command = [compiler, *flags, str(here / SOURCES[-1]), "-o", name]
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def folder() -> Path:
    """Return where compiled kernels are kept."""
    named = env.read("MODELWRIGHT_KERNELS")
    return Path(named) if named else Path.home() / ".cache" / "modelwright" / "kernels"


def load(path: Path) -> ctypes.CDLL:
    """Return a compiled library with the types of its functions declared."""
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.mw_block_bytes.argtypes, library.mw_block_bytes.restype = [number, number], number
    library.mw_pack.argtypes = [pointer, pointer, *[number] * 6, pointer, number]
    library.mw_pack_halves.argtypes = [pointer, number, number, number, pointer, number]
    library.mw_round.argtypes = [pointer, *[number] * 5, pointer, pointer, number]
    library.mw_linear.argtypes = [pointer, pointer, number, pointer, number]
    library.mw_step.argtypes = [pointer, pointer]
    for name in ("mw_pack", "mw_pack_halves", "mw_round", "mw_linear", "mw_step"):
        getattr(library, name).restype = None
    return library
