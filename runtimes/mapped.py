"""Giving back the pages of a mapped file that have been read and are not needed any more.

llama.cpp maps the file, then copies the blocks that its fast kernels want in another order (Q4_0, Q4_K): the mapped
original stays resident, a second copy of the weights. Its pages are clean, so they can go; what is still read from
the map comes back from the page cache.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

_DONT_NEED = 4
"""Linux's MADV_DONTNEED."""


def release(path: Path) -> None:
    """Drop the resident pages of this process's maps of a file. Only Linux says where they are; elsewhere nothing."""
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _maps(path.resolve()):
        advise(start, end - start, _DONT_NEED)


def _maps(path: Path) -> Iterator[tuple[int, int]]:
    """Addresses of a file's read-only maps: a written page of a private map would be lost."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == str(path) and "w" not in fields[1]:
            start, end = fields[0].split("-")
            yield int(start, 16), int(end, 16)
