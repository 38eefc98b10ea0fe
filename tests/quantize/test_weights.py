"""The kernels' promises, for any weights."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medge.errors import UnsupportedError
from medge.quantize.weights import quantize

LARGEST = 2.0**18  # float16 holds the scale of a 4-bit block up to 2.0**19
FLOOR = {None: 128 * float(np.finfo(np.float32).tiny), 4: 128 * 2.0**-25, 16: 128 * 2.0**-25}
"""What remains below the least scale: float32's for channels, float16's for blocks."""
BLOCKS = st.sampled_from([None, 4, 16])
BITS = st.sampled_from([4, 8])
METHODS = st.sampled_from(["absmax", "mse"])


def matrices(largest: float = LARGEST) -> st.SearchStrategy[np.ndarray]:
    elements = st.floats(-largest, largest, width=32)
    return st.tuples(st.integers(1, 4), st.sampled_from([16, 48])).flatmap(
        lambda shape: arrays(np.float32, shape, elements=elements)
    )


def each_scale(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.repeat(np.abs(scales), weight.shape[1] // scales.shape[1], axis=1)


@given(weight=matrices(), block=BLOCKS)
def test_8_bits_round_to_half_a_step(weight: np.ndarray, block: int | None) -> None:
    found = quantize(weight, 8, block)
    step = each_scale(weight, found.scales)
    error = np.abs(found.dequantize().astype(np.float64) - weight)
    assert (error <= step * 0.5001 + FLOOR[block]).all()
    assert found.values.min() >= -127  # symmetric: what x86's kernels take


@given(weight=matrices(), block=BLOCKS)
def test_4_bits_round_to_half_a_step_but_at_the_short_end(weight: np.ndarray, block: int | None) -> None:
    found = quantize(weight, 4, block)
    assert found.values.min() >= -8
    assert found.values.max() <= 7
    step = each_scale(weight, found.scales)
    error = np.abs(found.dequantize().astype(np.float64) - weight)
    clipped = found.values == 7
    assert (error <= np.where(clipped, 1.01, 0.5001) * step + FLOOR[block]).all()


@given(weight=matrices(), block=BLOCKS)
def test_the_largest_weight_of_a_4_bit_block_is_as_exact_as_its_scale(weight: np.ndarray, block: int | None) -> None:
    groups = weight.reshape(len(weight), -1, block or weight.shape[1])
    found = quantize(weight, 4, block).dequantize().reshape(groups.shape)
    at = np.abs(groups).argmax(-1)[..., None]
    largest, ours = np.take_along_axis(groups, at, -1), np.take_along_axis(found, at, -1)
    opposite = np.isclose(groups.max(-1), -groups.min(-1))[..., None]  # then one of the two is clipped
    assert (np.isclose(largest, ours, rtol=2**-11 if block else 1e-6, atol=FLOOR[block]) | opposite).all()


@given(weight=matrices(), bits=BITS, block=BLOCKS)
def test_searching_is_never_worse_than_not(weight: np.ndarray, bits: int, block: int | None) -> None:
    def error(method: Literal["absmax", "mse"]) -> np.ndarray:
        difference = quantize(weight, bits, block, method).dequantize().astype(np.float64) - weight
        return np.asarray(np.square(difference).reshape(len(weight), -1, block or weight.shape[1]).sum(-1))

    plain, searched = error("absmax"), error("mse")
    assert (searched <= plain * 1.0001 + 1e-30).all()


def test_searching_helps_where_one_outlier_spoils_a_block() -> None:
    weight = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    plain = quantize(weight, 4, 32, "absmax").dequantize() - weight
    searched = quantize(weight, 4, 32, "mse").dequantize() - weight
    assert np.square(searched).mean() < 0.97 * np.square(plain).mean()


@given(bits=BITS, block=BLOCKS, method=METHODS)
def test_zero_rows_stay_zero(bits: int, block: int | None, method: Any) -> None:
    weight = np.zeros((3, 16), np.float32)
    weight[1] = np.linspace(-1, 1, 16)
    found = quantize(weight, bits, block, method)
    assert np.isfinite(found.scales).all()
    assert not found.values[[0, 2]].any()
    assert not found.dequantize()[[0, 2]].any()
    assert found.values[1].any()


@pytest.mark.parametrize("value", [1e-45, -1e-45, 1e-40, 1e-38])
@pytest.mark.parametrize("bits", [4, 8])
def test_subnormal_weights_overflow_nothing(bits: int, value: float) -> None:
    weight = np.full((2, 16), value, np.float32)
    weight[0, 0] = 0
    found = quantize(weight, bits).dequantize()
    assert np.abs(found - weight).max() <= FLOOR[None]


@given(weight=matrices(), bits=BITS, block=BLOCKS, method=METHODS)
def test_shapes_are_the_contract(weight: np.ndarray, bits: int, block: int | None, method: Any) -> None:
    before = weight.copy()
    found = quantize(weight, bits, block, method)
    assert found.values.dtype == np.int8
    assert found.values.shape == found.dequantize().shape == weight.shape
    assert found.scales.shape == (len(weight), weight.shape[1] // (block or weight.shape[1]))
    assert found.scales.dtype == found.dequantize().dtype == np.float32
    np.testing.assert_array_equal(weight, before)


def test_a_channel_may_be_as_large_as_float32() -> None:
    weight = np.array([[1e38, -3e38, 0, 1e30]], np.float32)
    np.testing.assert_allclose(quantize(weight, 8).dequantize(), weight, atol=3e38 / 127)


def test_a_block_beyond_float16_is_refused() -> None:
    weight = np.zeros((2, 32), np.float32)
    weight[1, 3] = 1e6
    with pytest.raises(UnsupportedError, match=r"Weights of 1e\+06 need block scales beyond float16"):
        quantize(weight, 4, 16)


@pytest.mark.parametrize("block", [17, 32, 240])
def test_a_block_that_does_not_divide_is_refused(block: int) -> None:
    with pytest.raises(UnsupportedError, match=f"Blocks of {block} do not divide rows of 120"):
        quantize(np.zeros((2, 120), np.float32), 4, block)
