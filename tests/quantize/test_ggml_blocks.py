from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import gguf
import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import medge.quantize
from medge.errors import CorruptError, MissingExtraError, UnsupportedError, UsageError
from medge.quantize import _ggml_blocks, ggml_blocks, ggml_reference
from medge.quantize.ggml_blocks import BLOCK, GGML_TYPE, TypeName, engine, quantize_rows, row_bytes
from medge.spec import FloatArray

TYPES: tuple[TypeName, ...] = get_args(TypeName)
BLOCKS = [type for type in TYPES if BLOCK[type][0] > 1]
SCALED = [type for type in TYPES if type not in ("F32", "BF16")]
K = 768
ERRORS = {"F32": 0, "F16": 3e-4, "BF16": 3e-3, "Q8_0": 6e-3, "Q6_K": 0.019, "Q5_K": 0.037, "Q5_1": 0.043} | {
    "Q4_0": 0.10, "IQ4_NL": 0.082, "Q4_1": 0.088, "Q4_K": 0.076
}  # fmt: skip
"""Root mean square of the error, over that of normal weights."""


def rows(kind: str, n: int = 21, k: int = K) -> FloatArray:
    random = np.random.default_rng(7)
    x = random.normal(0, 0.02, (n, k))
    if kind == "heavy tails":
        x = random.standard_t(2, (n, k)) * 0.01
    elif kind == "one outlier":
        x[:, ::97] = 3
    elif kind == "sparse":
        x *= random.random((n, k)) < 0.05
    elif kind in ("constant", "negative constant", "zero"):
        x[:] = {"constant": 0.3, "negative constant": -0.3, "zero": 0}[kind]
    elif kind in ("positive", "negative"):
        x = random.uniform(0.1, 1, (n, k)) * (1 if kind == "positive" else -1)
    elif kind == "tiny":
        x *= 1e-7
    return x.astype(np.float32)


KINDS = (
    *("normal", "heavy tails", "one outlier", "sparse", "zero", "constant", "negative constant"),
    *("positive", "negative", "tiny"),
)


def importance(k: int = K) -> FloatArray:
    return (np.random.default_rng(8).chisquare(1, k) + 1e-3).astype(np.float32)


def decoded(packed: NDArray[np.uint8], type: TypeName) -> FloatArray:
    return np.asarray(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[type]), np.float32)


def error(x: FloatArray, packed: NDArray[np.uint8], type: TypeName, weights: FloatArray | None = None) -> float:
    squares = np.square(decoded(packed, type).astype(np.float64) - x)
    return float((squares if weights is None else squares * weights).sum())


def ggmls(x: FloatArray, type: TypeName, weights: FloatArray | None = None) -> NDArray[np.uint8]:
    out = np.empty((len(x), row_bytes(type, x.shape[1])), np.uint8)
    assert ggml_reference.quantize(x, GGML_TYPE[type], weights, out) == ggml_reference.DONE
    return out


@pytest.mark.parametrize("type", TYPES)
def test_gguf_py_decodes_the_bytes_to_nearly_the_weights(type: TypeName) -> None:
    x = rows("normal")
    packed = quantize_rows(x, type)
    assert packed.shape == (len(x), row_bytes(type, K))
    relative = float(np.sqrt(error(x, packed, type) / np.square(x, dtype=np.float64).sum()))
    assert ERRORS[type] / 2 <= relative <= ERRORS[type]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type", [type for type in TYPES if type != "F32"])
def test_the_bytes_are_ggml_s(type: TypeName, kind: str, weighted: bool) -> None:
    x, weights = rows(kind), importance() if weighted else None
    np.testing.assert_array_equal(quantize_rows(x, type, weights), ggmls(x, type, weights))


@given(
    x=arrays.arrays(np.float32, (3, 256), elements=st.floats(-4, 4, width=32, allow_subnormal=False)),
    weights=arrays.arrays(np.float32, 256, elements=st.floats(0, 4, width=32, allow_subnormal=False)),
    type=st.sampled_from(BLOCKS),
)
def test_the_bytes_are_ggml_s_whatever_the_weights(x: FloatArray, weights: FloatArray, type: TypeName) -> None:
    x[np.abs(x) < 1e-30] = 0  # below, ggml divides by subnormal scales
    weights[np.abs(weights) < 1e-6] = 0
    given_weights = weights if weights.any() else None
    np.testing.assert_array_equal(quantize_rows(x, type, given_weights), ggmls(x, type, given_weights))


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("type", [type for type in TYPES if type != "F32"])
def test_every_instruction_set_gives_the_same_bytes(type: TypeName, weighted: bool, squares: bool) -> None:
    x, weights = rows("heavy tails"), importance() if weighted else None
    expected = quantize_rows(x, type, weights, "least-squares" if squares else "ggml")
    names = _ggml_blocks.instruction_sets()
    assert names[-1] == "base"
    for index in range(len(names)):
        out = np.empty_like(expected)
        number = ggml_blocks._COMPILED.index(type)
        assert _ggml_blocks.quantize(number, False, squares, x, len(x), K, weights, out, index) == 0
        np.testing.assert_array_equal(out, expected, err_msg=names[index])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "constant" not in kind])  # there fits tie
@pytest.mark.parametrize("type", BLOCKS)
def test_least_squares_has_no_larger_error(type: TypeName, kind: str, weighted: bool) -> None:
    x, weights = rows(kind), importance() if weighted else None
    theirs = error(x, ggmls(x, type, weights), type, weights)
    # 3 %: super-blocks round the fitted scales; on normal weights it is always lower
    assert error(x, quantize_rows(x, type, weights, "least-squares"), type, weights) <= 1.03 * theirs
    if kind == "normal" and not (type == "Q6_K" and weighted):  # there ggml minimizes the same
        assert error(x, quantize_rows(x, type, weights, "least-squares"), type, weights) < theirs


def test_least_squares_lowers_the_error_of_q4_0_and_q4_1() -> None:
    x = rows("normal", n=64)
    ratios: dict[TypeName, float] = {"Q4_0": 0.92, "Q4_1": 0.82, "Q5_1": 0.82}
    for type, ratio in ratios.items():
        assert error(x, quantize_rows(x, type, None, "least-squares"), type) < ratio * error(x, ggmls(x, type), type)


@pytest.mark.parametrize("type", BLOCKS)
def test_an_importance_lowers_the_error_it_weighs(type: TypeName) -> None:
    if type == "Q8_0":
        pytest.skip("ggml has no use for an importance there")
    x, weights = rows("normal"), importance()
    plain, weighted = (error(x, quantize_rows(x, type, w), type, weights) for w in (None, weights))
    assert weighted < plain


@pytest.mark.parametrize("type", TYPES)
def test_bfloat16_is_read_as_it_lies(type: TypeName) -> None:
    bits = (rows("normal").view(np.uint32) >> 16).astype(np.uint16)
    x = (bits.astype(np.uint32) << 16).view(np.float32)
    for weights in (None, importance()):
        np.testing.assert_array_equal(quantize_rows(bits, type, weights), quantize_rows(x, type, weights))


@pytest.mark.parametrize("type", TYPES)
def test_pieces_threads_and_strides_change_nothing(type: TypeName) -> None:
    x = rows("normal", n=50)
    whole = quantize_rows(x, type, importance())
    with ThreadPoolExecutor(8) as pool:
        pieces = pool.map(lambda i: quantize_rows(x[i : i + 3], type, importance()), range(0, 50, 3))
    np.testing.assert_array_equal(np.concatenate(list(pieces)), whole)
    np.testing.assert_array_equal(quantize_rows(np.asfortranarray(x), type, importance()), whole)
    unaligned = np.frombuffer(b"-" + x.tobytes(), np.float32, offset=1).reshape(x.shape)
    np.testing.assert_array_equal(quantize_rows(unaligned, type, importance()), whole)
    assert quantize_rows(x[:0], type).shape == (0, row_bytes(type, K))


def test_other_threads_run_meanwhile() -> None:
    x = rows("normal", n=2000)
    worker = threading.Thread(target=quantize_rows, args=(x, "Q4_K", importance()))
    worker.start()
    steps = 0
    while worker.is_alive():
        steps += 1
    assert steps > 100


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type", TYPES)
def test_weights_that_are_no_numbers_are_refused(type: TypeName, value: float) -> None:
    x = rows("normal")
    x[-1, -1] = value
    with pytest.raises(CorruptError, match="1 weights are infinite or not a number"):
        quantize_rows(x, type)


@pytest.mark.parametrize("objective", get_args(ggml_blocks.Objective))
@pytest.mark.parametrize("type", SCALED)
def test_weights_beyond_float16_scales_are_refused(type: TypeName, objective: ggml_blocks.Objective) -> None:
    x = rows("normal")
    x[3, 5] = 1e30
    with pytest.raises(UnsupportedError, match=r"Weights of 1e\+30 need values or block scales beyond float16"):
        quantize_rows(x, type, None, objective)


@pytest.mark.parametrize("type", ["F32", "BF16"])
def test_wide_floats_keep_large_weights(type: TypeName) -> None:
    x = np.full((1, 32), 1e30, np.float32)
    np.testing.assert_allclose(decoded(quantize_rows(x, type), type), x, rtol=4e-3)


@pytest.mark.parametrize("type", SCALED)
def test_large_weights_that_fit_are_kept(type: TypeName) -> None:
    x = rows("normal") * np.float32(1e5)
    found = decoded(quantize_rows(x, type), type)
    np.testing.assert_allclose(found, x, atol=0.2 * float(np.abs(x).max()))


def test_what_cannot_be_split_into_blocks_is_refused() -> None:
    widths: dict[TypeName, int] = {"Q4_0": 48, "Q4_K": 1152, "Q8_0": 0}
    for type, k in widths.items():
        with pytest.raises(UnsupportedError, match=f"do not divide rows of {k}"):
            quantize_rows(np.zeros((2, k), np.float32), type)
    with pytest.raises(UsageError, match=r"'Q3_K' is no block type\. Types: F32, F16"):
        row_bytes("Q3_K", 256)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.ones(32), np.full(K, -1), np.full(K, np.nan), np.full(K, np.inf), np.zeros(K)])
def test_an_importance_that_is_none_is_refused(bad: FloatArray) -> None:
    with pytest.raises(UsageError, match="An importance"):
        quantize_rows(rows("normal"), "Q4_K", bad.astype(np.float32))


def test_the_extension_checks_sizes_itself() -> None:
    x, out = np.zeros((2, 32), np.float32), np.zeros((2, 18), np.uint8)
    good = (3, False, False, x, 2, 32, None, out, 0)
    assert _ggml_blocks.quantize(*good) == 0
    for position, value in ((0, -1), (0, 99), (4, 3), (4, -1), (5, 16), (6, x), (7, out[:1]), (8, 9), (8, -1)):
        bad = [*good]
        bad[position] = value
        with pytest.raises(ValueError, match="contradict"):
            _ggml_blocks.quantize(*bad)  # type: ignore[arg-type]


def test_the_tables_agree_with_the_extension_and_with_ggml() -> None:
    assert _ggml_blocks.blocks() == tuple(BLOCK[type] for type in ggml_blocks._COMPILED)
    for type, number in GGML_TYPE.items():
        assert number == gguf.GGMLQuantizationType[type]
        assert BLOCK[type] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    assert set(GGML_TYPE) == set(BLOCK) == set(TYPES)


@pytest.fixture
def _no_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delattr(medge.quantize, "_ggml_blocks", raising=False)
    monkeypatch.setitem(sys.modules, "medge.quantize._ggml_blocks", None)
    ggml_blocks._compiled.cache_clear()
    yield
    ggml_blocks._compiled.cache_clear()


def test_the_engine_is_named() -> None:
    assert engine() == "medge's, compiled"


@pytest.mark.usefixtures("_no_extension")
def test_without_the_extension_ggml_stands_in_and_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    assert engine().startswith("ggml's own, slower: medge was installed without a C compiler. Install gcc")
    x = rows("normal")
    for type in TYPES:
        packed = quantize_rows(x, type, importance())
        np.testing.assert_array_equal(packed, ggmls(x, type, importance()) if type != "F32" else x.view(np.uint8))
    with pytest.raises(MissingExtraError, match="Least squares need medge's compiled quantizers"):
        quantize_rows(x, "Q4_0", None, "least-squares")
    x[0, 0] = 1e30
    with pytest.raises(UnsupportedError, match="beyond float16"):
        quantize_rows(x, "Q4_0")
    x[0, 0] = np.nan
    with pytest.raises(CorruptError, match="not a number"):
        quantize_rows(x, "Q4_0")


@pytest.mark.usefixtures("_no_extension")
def test_without_both_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ggml_reference.load.cache_clear()
    with pytest.raises(MissingExtraError, match=r"not compiled when it was installed\. Install gcc 12 or clang 15"):
        quantize_rows(rows("normal"), "Q4_0")
    with pytest.raises(MissingExtraError, match="not compiled"):
        engine()
