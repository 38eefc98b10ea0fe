"""What Core ML stores under each rule, and what it says it cannot."""

from __future__ import annotations

import numpy as np
import pytest

from medge.errors import UnsupportedError
from medge.quantize.coreml import Levels, check_half, levels, refusal, refusal_ios17, stored_bits
from medge.quantize.scheme import Rule, load
from medge.quantize.weights import quantize


def rule(**fields: object) -> Rule:
    return Rule.model_validate({"match": ".*", **fields})


def unfolded(found: Levels) -> np.ndarray:
    blocks = found.values.astype(np.float32).reshape(*found.scales.shape, -1)
    if found.offsets is not None:
        blocks = blocks - found.offsets[..., None].astype(np.float32)
    return np.asarray(blocks * found.scales[..., None].astype(np.float32)).reshape(found.values.shape)


def weights(rows: int = 24, columns: int = 96) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)


def test_positive_scales_cost_4_bit_blocks_nothing() -> None:
    weight = weights()
    found, exact = levels(weight, rule(bits=4, block=32, method="mse")), quantize(weight, 4, 32, "mse")
    assert (exact.scales < 0).any()
    assert (found.scales > 0).all()
    assert found.values.max() <= 15
    np.testing.assert_array_equal(unfolded(found), exact.dequantize())


def test_8_bit_channels_round_on_the_scale_that_is_stored() -> None:
    weight = weights() * np.float32(1e-4)  # scales are float16 subnormals, 3 % apart
    found = levels(weight, rule(bits=8))
    step = found.scales.astype(np.float32)
    clipped = np.abs(found.values) == 127
    assert (np.abs(unfolded(found) - weight) <= np.where(clipped, 4, 0.51) * step).all()
    assert found.offsets is None


@pytest.mark.parametrize("bits", [4, 8])
def test_offsets_serve_one_sided_weights(bits: int) -> None:
    weight = np.abs(weights()) + np.float32(0.1)
    affine = np.square(unfolded(levels(weight, rule(bits=bits, block=32, symmetric=False))) - weight).sum()
    even = np.square(unfolded(levels(weight, rule(bits=bits, block=32))) - weight).sum()
    assert affine < 0.8 * even


def test_zero_stays_zero_under_offsets() -> None:
    weight = weights()
    weight[:, 5] = 0
    assert not unfolded(levels(weight, rule(bits=4, block=32, symmetric=False, method="mse")))[:, 5].any()


def test_the_search_does_not_lose_to_the_plain_range() -> None:
    weight = weights()
    searched, plain = (
        np.square(unfolded(levels(weight, rule(bits=4, block=32, symmetric=False, method=method))) - weight).sum()
        for method in ("mse", "absmax")
    )
    assert searched < plain


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_are_exact(symmetric: bool) -> None:
    found = levels(np.zeros((2, 64), np.float32), rule(bits=4, block=32, symmetric=symmetric))
    assert (found.scales > 0).all()
    assert not unfolded(found).any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_that_do_not_divide_the_row_are_refused(symmetric: bool) -> None:
    with pytest.raises(UnsupportedError, match="Blocks of 32 do not divide rows of 48"):
        levels(np.ones((2, 48), np.float32), rule(bits=4, block=32, symmetric=symmetric))


def test_floats_beyond_float16_are_refused_by_name() -> None:
    check_half("'a.bias'", np.array([1, -65504], np.float32))
    with pytest.raises(UnsupportedError, match=r"'a\.bias' holds weights beyond 65504"):
        check_half("'a.bias'", np.array([1, -7e4], np.float32))


@pytest.mark.parametrize(
    ("scheme", "nearest"),
    [(n, None) for n in ("fp32", "fp16", "int8", "int8-static", "int4", "int4-mixed", "int4-affine", "palette4")]
    + [("int5", "palette6"), ("int4-nl", "palette4")],
)
def test_which_schemes_core_ml_takes(scheme: str, nearest: str | None) -> None:
    found = [refused for one in load(scheme).rules if (refused := refusal(one))]
    assert [near for _, near in found] == ([] if nearest is None else [nearest])
    if nearest is not None:
        assert not any(refusal(one) for one in load(nearest).rules)


def test_ios_17_stores_channels_and_whole_palettes_only() -> None:
    assert refusal_ios17(rule(bits=8)) is None
    assert refusal_ios17(rule(bits=16)) is None
    assert refusal_ios17(rule(bits=4, method="kmeans")) is None
    for one in (rule(bits=4, block=32), rule(bits=8, block=32), rule(bits=4, method="kmeans", group=32), rule(bits=4)):
        assert refusal_ios17(one)


def test_bits_a_weight_count_scales_and_offsets() -> None:
    assert stored_bits(rule(bits=8)) == 8
    assert stored_bits(rule(bits=4, block=32)) == 4 + (16 + 4) / 32
    assert stored_bits(rule(bits=8, block=32)) == 8 + 16 / 32
    assert stored_bits(rule(bits=6, method="kmeans", group=32)) == 6
    assert stored_bits(rule(bits=16)) == 16
