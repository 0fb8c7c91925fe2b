"""The C library's memory, kept between programs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from pathlib import Path

MALLOC_SETTINGS = {-8: 1, -4: 0, -1: -1, -2: 1 << 28}
"""mallopt's M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD: one heap, which grows by 256 MB at a time and is not given back."""


def keep_freed_memory() -> bool:
    """Has the C library keep freed memory for the next allocation; True where it will.

    XLA on the CPU allocates a program's temporary arrays anew at every call. By default glibc asks the kernel for large blocks, gives
    them back at once, and the kernel clears every page again: two of five seconds of an optimiser step of fine-tuning. This has its whole
    effect only before other libraries start threads, so the command line calls it first of all; in Python it is the user's choice, since it
    changes the whole process. Nothing happens where the user has settings of their own (MALLOC_..., GLIBC_TUNABLES), and without glibc.
    """
    if os.name != "posix" or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(name, value) for name, value in MALLOC_SETTINGS.items()])


def host_bytes() -> int:
    """Memory of the machine, or as much of it as a container may take."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else [16 << 30]
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found)


class _HeapUse(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


def return_freed_memory(least: int = 1 << 30) -> bool:
    """Gives the kernel back what glibc holds and no one uses; True where that is at least `least` bytes.

    Between parts of a run, which need memory in blocks of other sizes: those would not fit into the holes that the part before has left.
    The next part pays once for cleared pages.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if library is None or not hasattr(library, "mallinfo2"):
        return False
    use = library.mallinfo2
    use.restype = _HeapUse
    if use().fordblks < least:
        return False
    gc.collect()
    return bool(library.malloc_trim(0))
