"""Palettes: the 2^bits values that stand for all weights of a group of output channels with least squared error.

One-dimensional k-means (Lloyd 1957) on sorted values: a cluster is a run of them, so that a step is a few
binary searches and two prefix sums for each centre, whatever the number of weights, and all groups step together.
MedSigLIP's image tower takes 1 CPU minute, coremltools' k-means 19.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medge.errors import UnsupportedError
from medge.spec import FloatArray

_STEPS = 100
"""Most steps of Lloyd's; it ends before when no boundary moves."""

Ranks = NDArray[np.int64]
"""(groups, levels - 1) places in sorted order where one cluster ends and the next begins."""


@dataclass(frozen=True)
class Palette:
    """`centres` of each weight's group, at its index, approximates the weight."""

    indices: NDArray[np.uint8]
    """(out, in)"""
    centres: FloatArray
    """(groups, levels), ascending, each exact in float16."""

    def dequantize(self) -> FloatArray:
        """(out, in) float32."""
        groups = self.indices.reshape(len(self.centres), -1)
        return np.take_along_axis(self.centres, groups.astype(np.int64), 1).reshape(self.indices.shape)


def palettize(weight: FloatArray, bits: int, group: int | None = None) -> Palette:
    """A palette for every `group` output channels (rows), or one for the whole tensor; `weight` fits float16.

    A group that holds a channel of zeros alone (padding) has zero itself in its palette, so that padding stays exact.

    Raises:
        UnsupportedError: the group does not divide the rows.
    """
    out, inp = weight.shape
    rows = group or out
    if out % rows:
        raise UnsupportedError(f"Groups of {rows} do not divide {out} output channels", "Choose another group")
    values = weight.reshape(out // rows, rows * inp)
    centres = _centres(np.sort(values, axis=1), 2**bits)
    _pin_zero(centres, weight)
    centres = np.sort(centres.astype(np.float16).astype(np.float32), axis=1)
    indices = [np.searchsorted(b, v).astype(np.uint8) for b, v in zip(_middles(centres), values, strict=True)]
    return Palette(np.stack(indices).reshape(out, inp), centres)


def _centres(ordered: FloatArray, levels: int) -> FloatArray:
    """(groups, levels) of the sorted values (groups, n)."""
    groups, count = ordered.shape
    sums = np.zeros((groups, count + 1))
    np.cumsum(ordered, axis=1, dtype=np.float64, out=sums[:, 1:])
    ranks = _first(ordered, levels)
    for _ in range(_STEPS):
        centres = _means(ordered, sums, ranks)
        moved = _search(ordered, _middles(centres))
        if np.array_equal(moved, ranks):
            break
        ranks = moved
    return centres


def _middles(centres: FloatArray) -> FloatArray:
    """Where the nearest centre changes."""
    return (centres[:, 1:] + centres[:, :-1]) * np.float32(0.5)


def _first(ordered: FloatArray, levels: int) -> Ranks:
    """Boundaries at equal steps of the integral of density^(1/3): optimal for many levels (Panter and Dite 1951)."""
    steps = np.cbrt(np.square(np.diff(ordered, axis=1)))  # a gap is 1 / (count * density), one value in each
    reached = np.cumsum(steps, axis=1, dtype=np.float64)
    wanted = np.arange(1, levels) / levels
    return np.stack([np.searchsorted(row, wanted * row[-1]) + 1 for row in reached])


def _means(ordered: FloatArray, sums: NDArray[np.float64], ranks: Ranks) -> FloatArray:
    """Mean of each cluster; an empty one takes the value at its place."""
    groups, count = ordered.shape
    ends = np.concatenate([np.zeros((groups, 1), np.int64), ranks, np.full((groups, 1), count)], axis=1)
    totals = np.diff(np.take_along_axis(sums, ends, 1), axis=1)
    sizes = np.diff(ends, axis=1)
    at = np.take_along_axis(ordered, np.minimum(ends[:, :-1], count - 1), 1)
    return np.where(sizes > 0, totals / np.maximum(sizes, 1), at).astype(np.float32)


def _search(ordered: FloatArray, wanted: FloatArray) -> Ranks:
    """np.searchsorted of each row's values, all rows at once."""
    low = np.zeros(wanted.shape, np.int64)
    high = np.full(wanted.shape, ordered.shape[1])
    while (low < high).any():
        middle = (low + high) // 2
        below = np.take_along_axis(ordered, np.minimum(middle, ordered.shape[1] - 1), 1) < wanted
        low, high = np.where(below & (low < high), middle + 1, low), np.where(below, high, middle)
    return low


def _pin_zero(centres: FloatArray, weight: FloatArray) -> None:
    """Set the centre nearest to zero to zero, in groups that hold a channel of zeros alone."""
    padded = (~weight.any(1)).reshape(len(centres), -1).any(1)
    nearest = np.abs(centres).argmin(1)
    centres[padded, nearest[padded]] = 0
