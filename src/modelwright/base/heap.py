"""The C library's heap: what a training process wants of it, and can only ask for before it starts.

glibc keeps small blocks that were freed aside, seven of a size, and does not join them with what lies beside them. Two
come into being around every tensor, because PyTorch wants blocks at multiples of 64 bytes: what is cut off before and
behind. Kept aside, and handed to small objects that live long, they stand between large holes, and a hole of a
tensor's own size is 112 bytes too small for the next one. With nothing kept aside, holes join again.

Source: glibc manual, "Memory Allocation Tunables"; malloc/malloc.c of 2.36 (_int_memalign, _int_free).
Not here: musl and macOS, whose allocators work otherwise; processes that did not begin as ``mw``.
"""

import contextlib
import os
import sys
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
KEEP_NOTHING = "glibc.malloc.tcache_count=0"


def has_glibc() -> bool:
    """Tell whether this process runs on glibc of 2.26 or later, the first with such a cache."""
    if sys.platform != "linux":
        return False
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= (2, 26)
    except ValueError:
        return False


def joining_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which a process's holes join; who has chosen the cache's size keeps it.

    >>> joining_environment({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"})["GLIBC_TUNABLES"]
    'glibc.malloc.tcache_count=3'
    """
    made = dict(environment)
    given = made.get(VARIABLE, "")
    if has_glibc() and "glibc.malloc.tcache_count" not in given:
        made[VARIABLE] = ":".join(part for part in (given, KEEP_NOTHING) if part)
    return made


def let_holes_join() -> None:
    """Begin this process anew, once, so that the holes of its heap join; do it before anything large is imported.

    Arguments, process number and open files stay. Nothing happens where the C library is another one, or where the
    user has chosen.
    """
    made = joining_environment(os.environ)
    if made.get(VARIABLE) == os.environ.get(VARIABLE) or not sys.executable or getattr(sys, "frozen", False):
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with contextlib.suppress(OSError):  # a training that takes more memory is better than none
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], made)
