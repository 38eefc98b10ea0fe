"""The compiled half of ggml_blocks.py (ggml_blocks.c)."""

from typing import Any

from numpy.typing import NDArray

def quantize(
    type: int,
    bfloat16: bool,
    least_squares: bool,
    rows: NDArray[Any],
    n: int,
    k: int,
    importance: NDArray[Any] | None,
    out: NDArray[Any],
    instruction_set: int,
    /,
) -> int:
    """Fill `out`; 0, or 1: a value is not finite, 2: beyond float16. ValueError: sizes contradict the type."""

def blocks() -> tuple[tuple[int, int], ...]:
    """(values, bytes) of a block of each type, in the order of `type`."""

def instruction_sets() -> tuple[str, ...]:
    """What this processor can run, the fastest first."""
