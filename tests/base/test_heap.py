"""A process begins anew once, with its arguments, and its holes then join; the user's own choice stays."""

import json
import os
import subprocess
import sys

import pytest

from modelwright.base import heap

glibc = pytest.mark.skipif(not heap.has_glibc(), reason="this is about glibc's heap")
ANEW = """
import os, sys
print("before", os.getpid(), flush=True)
from modelwright.base import heap
heap.let_holes_join()
print("after", os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), "torch" in sys.modules)
"""
# Blocks as PyTorch asks for them; then what was freed is asked for again.
HOLES = """
import ctypes
libc = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used free keep".split()]
libc.mallinfo2.restype = Info
libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def large():
    found = ctypes.c_void_p()
    libc.posix_memalign(ctypes.byref(found), 64, 100_000)
    return found
def used(num):
    before = libc.mallinfo2().arena
    blocks = [large() for _ in range(num)]
    [libc.free(block) for block in blocks]
    return libc.mallinfo2().arena - before
libc.mallopt(-1, 1 << 30)  # nothing goes back to the system
used(5)
print(used(5))
"""


def said(code: str, *arguments: str, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != heap.VARIABLE} | environment
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout


@glibc
def test_a_process_begins_anew_once_with_its_number_and_arguments():
    lines = [line.split(maxsplit=2) for line in said(ANEW, "--a.b=c d").splitlines()]
    assert [line[0] for line in lines] == ["before", "before", "after"]
    assert len({line[1] for line in lines}) == 1
    assert lines[-1][2] == f"['--a.b=c d'] {heap.KEEP_NOTHING} False"


@glibc
def test_the_users_choice_stays():
    mine = "glibc.malloc.tcache_count=7"
    lines = said(ANEW, GLIBC_TUNABLES=mine).splitlines()
    assert len(lines) == 2 and mine in lines[1]
    other = said(ANEW, GLIBC_TUNABLES="glibc.malloc.mxfast=0").splitlines()
    assert f"glibc.malloc.mxfast=0:{heap.KEEP_NOTHING}" in other[-1]


def test_without_glibc_nothing_changes(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not heap.has_glibc() and heap.joining_environment({"A": "b"}) == {"A": "b"}
    heap.let_holes_join()  # comes back


@glibc
def test_holes_join_where_nothing_is_kept_aside():
    kept = int(said(HOLES))
    joined = int(said(HOLES, **{heap.VARIABLE: heap.KEEP_NOTHING}))
    print(json.dumps({"kept": kept, "joined": joined}))
    assert joined == 0 < kept
