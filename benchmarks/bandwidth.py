"""How fast this host reads memory: the ceiling of decoding, which reads every weight once a token.

Each thread takes the maximum of its own part of one array that no cache holds. NumPy's float32 maximum is vectorized
on x86 and ARM and lets other threads run meanwhile; with two threads of a Zen 5 it reads faster than NumPy's sums,
dot products and integer kernels, and a slower ceiling would flatter whoever is held against it. Nothing is written,
so this is a read bandwidth: copies, as STREAM does them, give other figures. The best of several passes counts,
since nothing can be too fast.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ARRAY_BYTES = 2**30
"""Larger than any last-level cache of a laptop or a workstation."""
_PASSES = 5
_PARTS = 8
"""Parts a thread, so that one that is interrupted does not keep all others waiting."""


def read_bandwidth(threads: int, *, size: int = ARRAY_BYTES, passes: int = _PASSES) -> float:
    """Bytes a second that so many threads read together."""
    values = np.ones(size // 4, np.float32)  # written first: untouched memory is one shared page of zeros
    parts = np.array_split(values, threads * _PARTS)
    with ThreadPoolExecutor(threads) as pool:
        return max(values.nbytes / _seconds(pool, parts) for _ in range(passes))


def _seconds(pool: ThreadPoolExecutor, parts: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]) -> float:
    start = time.perf_counter()
    for _ in pool.map(np.max, parts):
        pass
    return time.perf_counter() - start
