"""Ranges and sensitivity from observed activations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medge.quantize.calibrate import (
    Layer,
    Range,
    Sensitivity,
    activation_range,
    relative_error,
    sensitivity,
    spend,
    static_ranges,
)
from medge.quantize.scheme import Budget, Calibration
from medge.spec import FloatArray, Weight

PLAIN = {4: 4.0, 8: 8.0}
FINITE = st.floats(-1e4, 1e4, width=32)


def layer(name: str, weight: FloatArray, inputs: FloatArray) -> Layer:
    return Layer(name, Weight(name, lambda: weight), inputs, group=name)


def floats(*values: float) -> FloatArray:
    return np.array(values, np.float32)


def normal(*shape: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@given(low=FINITE, high=FINITE)
def test_zero_is_exact_in_every_range(low: float, high: float) -> None:
    found = Range(min(low, high), max(low, high))
    assert found.round_trip(np.zeros(1, np.float32)) == 0


@given(x=arrays(np.float32, 20, elements=FINITE))
def test_a_round_trip_inside_the_range_errs_by_half_a_step(x: FloatArray) -> None:
    found = Range(float(x.min()), float(x.max()))
    scale, zero = found.affine()
    assert scale > 0
    assert 0 <= zero <= 255
    step = float(scale) * 1.001  # the zero point is rounded too, which moves both ends by half a step
    assert np.abs(found.round_trip(x) - x).max() <= step


def test_a_range_clips_what_lies_outside() -> None:
    np.testing.assert_allclose(Range(-1, 1).round_trip(floats(-5, 5)), [-1, 1], atol=0.01)


def test_percentiles_leave_out_the_tail_and_minmax_does_not() -> None:
    x = normal(1000, 10)
    x[0, 0] = 1e4
    clipped = activation_range(x, Calibration(method="percentile", percentile=99.9))
    assert clipped.high < 10
    assert activation_range(x, Calibration(method="minmax")).high == 1e4


def test_static_leaves_the_layers_that_it_hurts_most() -> None:
    outlier, weight = normal(64, 16), normal(8, 16)
    outlier[0, 0], weight[:, 0] = 1e4, 0  # stretches the range until what matters rounds to zero
    layers = [layer(f"l{i}", normal(8, 16, seed=i), normal(64, 16, seed=i)) for i in range(9)]
    layers.append(layer("bad", weight, outlier))
    kept = static_ranges(layers, Calibration(method="minmax", leave_share=0.1))
    assert set(kept) == {f"l{i}" for i in range(9)}
    assert len(static_ranges(layers, Calibration(method="minmax", leave_share=0))) == 10


def test_relative_error_is_energy_over_energy() -> None:
    assert relative_error(floats(3, 4), floats(3, 4)) == 0
    assert relative_error(floats(3, 4), floats(0, 4)) == pytest.approx(9 / 25)
    assert np.isfinite(relative_error(np.zeros(2, np.float32), np.ones(2, np.float32)))


def test_more_bits_err_less_and_rows_are_padded_to_the_block() -> None:
    found = list(sensitivity([layer("x", normal(8, 40), normal(32, 40))], Budget(mean_bits=5), block=32))
    (one,) = found
    assert one.layer == "x"
    assert 0 < one.errors[8] < one.errors[4] < 1


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=12),
    mean=st.floats(4.01, 7.99),
    seed=st.integers(0, 99),
)
def test_a_budget_is_never_overspent(sizes: list[int], mean: float, seed: int) -> None:
    errors = np.random.default_rng(seed).random(len(sizes))
    measured = [
        Sensitivity(str(i), n, {4: float(e), 8: 0.0}) for i, (n, e) in enumerate(zip(sizes, errors, strict=True))
    ]
    high = spend(measured, Budget(mean_bits=mean), PLAIN)
    bits = sum(one.weights * (8 if one.layer in high else 4) for one in measured)
    assert bits <= mean * sum(sizes) + 1e-6


def test_a_budget_goes_where_a_bit_helps_most() -> None:
    measured = [Sensitivity(name, 100, {4: error, 8: 0.0}) for name, error in (("a", 0.1), ("b", 0.9), ("c", 0.5))]
    assert spend(measured, Budget(mean_bits=6.7), PLAIN) == {"b", "c"}
    assert spend(measured, Budget(mean_bits=5.4), PLAIN) == {"b"}
    assert spend([], Budget(mean_bits=5), PLAIN) == frozenset()


def test_a_budget_knows_what_its_target_stores() -> None:
    measured = [Sensitivity(str(i), 100, {4: 1 / (i + 1), 8: 0.0}) for i in range(10)]
    onnx, ggml = {4: 4.5, 8: 8.0}, {4: 4.5, 8: 8.5}
    counts = [len(spend(measured, Budget(mean_bits=6.3), costs)) for costs in (PLAIN, onnx, ggml)]
    assert counts == [5, 5, 4]
