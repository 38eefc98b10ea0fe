"""Every block type holds what gguf-py reads out of it, no worse than the quantizers of others."""

from __future__ import annotations

from ctypes import c_int64, c_size_t, c_void_p
from typing import Any

import gguf
import numpy as np
import pytest

from medge.errors import UnsupportedError
from medge.quantize.gguf import LEVELS, affine, block_type, pack, refusal, uneven
from medge.quantize.scheme import Rule, Scheme, load
from medge.quantize.weights import quantize
from medge.runtimes.gguf_file import BlockType
from medge.spec import FloatArray

TYPES = list(BlockType.__members__.values())
BLOCKS = [t for t in TYPES if t.values > 1]


def weights(kind: str, seed: int = 0) -> FloatArray:
    random = np.random.default_rng(seed)
    value = random.standard_normal((24, 128)) * 0.02
    if kind == "heavy":
        value = random.standard_t(3, (24, 128)) * 0.02
    if kind == "one-sided":
        value = np.abs(value) + 0.01
    return value.astype(np.float32)


def decoded(packed: np.ndarray[Any, Any], type: BlockType) -> FloatArray:
    return np.asarray(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(type)), np.float32)


def error(found: FloatArray, exact: FloatArray) -> float:
    return float(np.square(found - exact, dtype=np.float64).sum())


@pytest.mark.parametrize("kind", ["normal", "heavy", "one-sided"])
@pytest.mark.parametrize("type", [BlockType.Q8_0, BlockType.Q5_1, BlockType.Q4_1, BlockType.Q4_0])
def test_blocks_are_no_worse_than_gguf_py_s(type: BlockType, kind: str) -> None:
    exact = weights(kind)
    ours = error(decoded(pack(exact, type, "mse"), type), exact)
    theirs = gguf.quants.quantize(exact, gguf.GGMLQuantizationType(type))
    assert ours <= error(decoded(theirs, type), exact) * (1.001 if type == BlockType.Q8_0 else 1.0)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_uneven_levels_serve_weights_better_than_even_ones(kind: str) -> None:
    exact = weights(kind)
    uneven_error = error(decoded(pack(exact, BlockType.IQ4_NL), BlockType.IQ4_NL), exact)
    assert uneven_error < error(decoded(pack(exact, BlockType.Q4_0, "mse"), BlockType.Q4_0), exact)


def test_uneven_is_no_worse_than_ggml_s_own_search() -> None:
    from medge.runtimes import ggml

    exact = weights("normal")
    library = ggml.load()
    quantizer = library._function("quantize_iq4_nl", c_size_t, (c_void_p, c_void_p, c_int64, c_int64, c_void_p))
    theirs = np.empty_like(pack(exact, BlockType.IQ4_NL))
    quantizer(exact.ctypes.data, theirs.ctypes.data, *exact.shape, None)
    ours = error(decoded(pack(exact, BlockType.IQ4_NL), BlockType.IQ4_NL), exact)
    assert ours <= 1.01 * error(decoded(theirs, BlockType.IQ4_NL), exact)


def test_the_levels_are_ggml_s() -> None:
    assert LEVELS.tolist() == list(gguf.quants.IQ4_NL.kvalues)


@pytest.mark.parametrize(("type", "bits", "method"), [(BlockType.Q4_0, 4, "mse"), (BlockType.Q8_0, 8, "absmax")])
def test_even_blocks_hold_the_numbers_of_every_other_format(type: BlockType, bits: int, method: Any) -> None:
    exact = weights("heavy")
    np.testing.assert_array_equal(
        decoded(pack(exact, type, method), type), quantize(exact, bits, 32, method).dequantize()
    )


@pytest.mark.parametrize(("type", "bits"), [(BlockType.Q4_1, 4), (BlockType.Q5_1, 5)])
def test_affine_blocks_decode_to_what_was_searched(type: BlockType, bits: int) -> None:
    exact = weights("one-sided")
    found = affine(exact.reshape(-1, 32), bits, refits=3).dequantize().reshape(exact.shape)
    np.testing.assert_allclose(decoded(pack(exact, type, "mse"), type), found, atol=1e-7)
    plain = affine(exact.reshape(-1, 32), bits, refits=0).dequantize().reshape(exact.shape)
    assert error(found, exact) < error(plain, exact)


def test_uneven_blocks_decode_to_what_was_searched() -> None:
    exact = weights("normal")
    scales, indices = uneven(exact.reshape(-1, 32))
    found = (scales[:, None] * LEVELS[indices]).reshape(exact.shape)
    np.testing.assert_allclose(decoded(pack(exact, BlockType.IQ4_NL), BlockType.IQ4_NL), found, atol=1e-7)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 1e-7, 1e-40])
def test_constant_rows(type: BlockType, value: float) -> None:
    if type == BlockType.BF16:
        return  # never written, only unfolded to
    exact = np.full((2, 64), value, np.float32)
    step = 2.0**-24  # float16's smallest number: what a scale cannot say finer
    np.testing.assert_allclose(decoded(pack(exact, type, "mse"), type), exact, rtol=0.01, atol=128 * step)


@pytest.mark.parametrize("type", [t for t in TYPES if t not in (BlockType.F32, BlockType.BF16)])
def test_values_beyond_float16_are_refused(type: BlockType) -> None:
    exact = np.zeros((1, 32), np.float32)
    exact[0, 3] = 1e9
    with pytest.raises(UnsupportedError, match="float16"):
        pack(exact, type, "mse")


def test_floats_are_kept_and_long_tensors_packed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = weights("normal")
    assert pack(exact, BlockType.F32).tobytes() == exact.tobytes()
    assert pack(exact, BlockType.F16).tobytes() == exact.astype(np.float16).tobytes()
    whole = {type: pack(exact, type, "mse").tobytes() for type in BLOCKS}
    monkeypatch.setattr("medge.quantize.gguf._CHUNK", 5 * exact.shape[1])
    assert {type: pack(exact, type, "mse").tobytes() for type in BLOCKS} == whole


@pytest.mark.parametrize(
    ("scheme", "type"),
    [
        ("fp32", BlockType.F32),
        ("fp16", BlockType.F16),
        ("int8", BlockType.Q8_0),
        ("int5", BlockType.Q5_1),
        ("int4", BlockType.Q4_0),
        ("int4-affine", BlockType.Q4_1),
        ("int4-nl", BlockType.IQ4_NL),
    ],
)
def test_the_schemes_types(scheme: str, type: BlockType) -> None:
    assert refusal(load(scheme)) is None
    assert block_type(load(scheme).rule("vision_model.encoder.layers.0.mlp.fc1")) == type


@pytest.mark.parametrize(("bits", "type"), [(6, BlockType.Q8_0), (5, BlockType.Q5_1)])
def test_a_width_that_ggml_has_not_gets_the_next_finer(bits: Any, type: BlockType) -> None:
    assert block_type(Rule(match=".*", bits=bits)) == type


@pytest.mark.parametrize(
    ("rule", "reason", "nearest"),
    [
        (Rule(match=".*", bits=4, method="kmeans"), "palettes", "int4-nl"),
        (Rule(match=".*", bits=6, method="kmeans"), "palettes", "int5"),
        (Rule(match=".*", bits=5, method="nonlinear"), "have 4 bits", "int5"),
        (Rule(match=".*", bits=8, symmetric=False), "offset", "int8"),
        (Rule(match=".*", bits=4, block=16), "finer", "int4"),
    ],
)
def test_what_ggml_has_no_blocks_for_is_refused(rule: Rule, reason: str, nearest: str) -> None:
    scheme = Scheme(name="x", title="x", activations="dynamic", rules=(rule,))
    refused = refusal(scheme)
    assert refused is not None
    assert reason in refused[0]
    assert refused[1] == nearest
    with pytest.raises(UnsupportedError, match=nearest):
        block_type(rule)


def test_static_activations_are_refused() -> None:
    assert refusal(load("int8-static")) == (
        "ggml scales activations when it runs: it has no place for calibrated ranges",
        "int8",
    )
