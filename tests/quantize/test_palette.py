"""Palettes: near the least squared error that any palette has, exact where they must be."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medge.errors import UnsupportedError
from medge.quantize.palette import palettize
from medge.runtimes.coreml_backend import quiet_coremltools

MATRICES = st.tuples(st.sampled_from([2, 4]), st.integers(1, 40)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-1000, 1000, width=32))
)


def error(weight: np.ndarray, bits: int, group: int | None) -> float:
    return float(np.square(palettize(weight, bits, group).dequantize() - weight, dtype=np.float64).sum())


def weights(shape: tuple[int, int], *, heavy: bool) -> np.ndarray:
    rng = np.random.default_rng(0)
    drawn = rng.standard_t(3, shape) if heavy else rng.standard_normal(shape)
    return np.asarray(drawn * 0.03, np.float32)


@pytest.mark.parametrize(("heavy", "most"), [(False, 1.02), (True, 1.06)])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_the_error_is_near_the_exact_optimum(bits: int, heavy: bool, most: float) -> None:
    """coremltools ships an exact solver (kmeans1d, dynamic programming); it is what its own palettes come from."""
    quiet_coremltools()
    weight = weights((32, 1152), heavy=heavy)
    clusters, centres = import_module("coremltools._deps.kmeans1d").cluster(weight.reshape(-1), 2**bits)
    best = np.asarray(centres, np.float32)[np.asarray(clusters)].reshape(weight.shape)
    assert error(weight, bits, None) <= most * float(np.square(best - weight, dtype=np.float64).sum())


@given(weight=MATRICES, bits=st.sampled_from([1, 2, 4, 6]), group=st.sampled_from([None, 2]))
def test_each_weight_takes_the_nearest_centre(weight: np.ndarray, bits: int, group: int | None) -> None:
    found = palettize(weight, bits, group)
    rows = weight.reshape(len(found.centres), -1)
    taken = found.dequantize().reshape(rows.shape)
    nearest = np.abs(rows[..., None] - found.centres[:, None]).min(-1)
    assert (np.abs(rows - taken) <= nearest + 1e-3 * np.abs(rows).max(initial=1e-3)).all()
    assert found.indices.max() < 2**bits
    assert (found.centres == found.centres.astype(np.float16)).all()


def test_no_more_values_than_levels_are_exact() -> None:
    weight = np.tile(np.array([-1.5, 0.0, 0.25, 8.0], np.float32), (8, 4))
    np.testing.assert_array_equal(palettize(weight, 4, 4).dequantize(), weight)


def test_a_palette_a_group_serves_small_channels_beside_large_ones() -> None:
    weight = weights((64, 96), heavy=False) * np.repeat(np.array([1, 30], np.float32), 32)[:, None]
    by_group, whole = (np.square(palettize(weight, 4, group).dequantize() - weight)[:32].sum() for group in (32, None))
    assert by_group < 0.05 * whole


def test_padded_channels_stay_zero() -> None:
    weight = np.pad(weights((20, 96), heavy=False) + np.float32(0.02), [(0, 12), (0, 0)])
    assert not palettize(weight, 4, 16).dequantize()[20:].any()


def test_a_group_that_does_not_divide_the_rows_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Groups of 32 do not divide 48"):
        palettize(np.ones((48, 8), np.float32), 4, 32)
