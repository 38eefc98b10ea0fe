"""The interpreter's operations against coremltools' own definitions, its reader against coremltools' writer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medge.errors import CorruptError, MedgeError, UnsupportedError, UsageError
from medge.export.coreml_program import Target, Toolkit, toolkit
from medge.runtimes.mil_package import Constant, Package
from medge.runtimes.mil_reference import Interpreter

ITEMS = {
    name: {"author": "", "description": "", "name": name, "path": f"com.apple.CoreML/{name}"}
    for name in ("model.mlmodel", "weights")
}
MANIFEST = {"fileFormatVersion": "1.0.0", "itemInfoEntries": ITEMS, "rootModelIdentifier": "model.mlmodel"}
RNG = np.random.default_rng(0)
Body = Callable[[Any, Any], Any]


@pytest.fixture(scope="session")
def tools() -> Toolkit:
    return toolkit()


@pytest.fixture
def save(tools: Toolkit, tmp_path: Path) -> Callable[..., Path]:
    """`save(lambda mb, x: mb.relu(x=x), shape)` -> a package whose program takes x, float32, and gives y."""

    def run(body: Body, shape: tuple[int, ...], *, name: str = "x", target: str = "ios18", dtype: str = "fp32") -> Path:
        mb, types = tools.builder, tools.mil.types
        inputs = {"x": mb.placeholder(shape, getattr(types, dtype), name="x")}
        chosen = Target(target, "array")
        function = tools.mil.Function(inputs, opset_version=tools.opset(chosen))
        with function:
            function.set_outputs([mb.cast(x=body(mb, function.inputs["x"]), dtype="fp32", name="y")])
        root = tmp_path / f"{name}.mlpackage"
        data = root / "Data" / "com.apple.CoreML"
        (data / "weights").mkdir(parents=True)
        spec = tools.specification(function, chosen, data / "weights", None)
        (data / "model.mlmodel").write_bytes(spec.SerializeToString())
        (root / "Manifest.json").write_text(json.dumps(MANIFEST))
        return root

    return run


def run(root: Path, x: np.ndarray) -> np.ndarray:
    return Interpreter(Package(root)).run({"x": x})["y"]


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16)


X = draw(2, 6, 8)
PIXELS = draw(1, 3, 8, 8)
W, B = draw(5, 8), draw(5)
KERNEL = draw(5, 3, 4, 4)


def by_torch(name: str, *arguments: Any, **keywords: Any) -> Callable[[], np.ndarray]:
    def compute() -> np.ndarray:
        torch = pytest.importorskip("torch")
        tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arguments]
        return np.asarray(getattr(torch.nn.functional, name)(*tensors, **keywords).numpy())

    return compute


CASES: dict[str, tuple[np.ndarray, Body, Callable[[], np.ndarray]]] = {
    "linear": (X, lambda mb, x: mb.linear(x=x, weight=W, bias=B), lambda: X @ W.T + B),
    "linear without bias": (X, lambda mb, x: mb.linear(x=x, weight=W), lambda: X @ W.T),
    "matmul": (X, lambda mb, x: mb.matmul(x=x, y=x, transpose_y=True), lambda: X @ X.swapaxes(1, 2)),
    "matmul, the other": (X, lambda mb, x: mb.matmul(x=x, y=x, transpose_x=True), lambda: X.swapaxes(1, 2) @ X),
    "conv": (
        PIXELS,
        lambda mb, x: mb.conv(x=x, weight=KERNEL, bias=B, strides=[4, 4], pad_type="valid"),
        by_torch("conv2d", PIXELS, KERNEL, B, stride=4),
    ),
    "layer norm": (
        X,
        lambda mb, x: mb.layer_norm(x=x, axes=[-1], gamma=W[0], beta=W[1], epsilon=np.float32(1e-6)),
        by_torch("layer_norm", X, (8,), W[0], W[1], 1e-6),
    ),
    "gelu": (X, lambda mb, x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), by_torch("gelu", X, approximate="tanh")),
    "softmax": (X, lambda mb, x: mb.softmax(x=x, axis=1), by_torch("softmax", X, 1)),
    "attention": (
        X,
        lambda mb, x: mb.scaled_dot_product_attention(query=x, key=x, value=x),
        by_torch("scaled_dot_product_attention", X, X, X),
    ),
    "add": (X, lambda mb, x: mb.add(x=x, y=W[0]), lambda: X + W[0]),
    "sub": (X, lambda mb, x: mb.sub(x=x, y=W[0]), lambda: X - W[0]),
    "mul": (X, lambda mb, x: mb.mul(x=x, y=np.float32(3)), lambda: X * 3),
    "real_div": (X, lambda mb, x: mb.real_div(x=x, y=np.float32(3)), lambda: X / 3),
    "maximum": (X, lambda mb, x: mb.maximum(x=x, y=np.float32(0.5)), lambda: np.maximum(X, 0.5)),
    "relu": (X, lambda mb, x: mb.relu(x=x), lambda: np.maximum(X, 0)),
    "silu": (X, lambda mb, x: mb.silu(x=x), by_torch("silu", X)),
    "sigmoid": (X, lambda mb, x: mb.sigmoid(x=x), by_torch("sigmoid", X)),
    "reduce_mean": (X, lambda mb, x: mb.reduce_mean(x=x, axes=[1], keep_dims=True), lambda: X.mean(1, keepdims=True)),
    "reduce_sum": (X, lambda mb, x: mb.reduce_sum(x=x, axes=[-1]), lambda: X.sum(-1)),
    "reshape": (X, lambda mb, x: mb.reshape(x=x, shape=[3, -1, 4]), lambda: X.reshape(3, 8, 4)),
    "transpose": (X, lambda mb, x: mb.transpose(x=x, perm=[2, 0, 1]), lambda: X.transpose(2, 0, 1)),
    "expand_dims": (X, lambda mb, x: mb.expand_dims(x=x, axes=[0, -1]), lambda: X[None, ..., None]),
    "squeeze": (X[:1], lambda mb, x: mb.squeeze(x=x, axes=[0]), lambda: X[0]),
    "concat": (X, lambda mb, x: mb.concat(values=[x, x], axis=1), lambda: np.concatenate([X, X], 1)),
    "slice": (
        X,
        lambda mb, x: mb.slice_by_index(
            x=x, begin=[0, 1, 0], end=[0, 5, 8], stride=[1, 2, 1], end_mask=[True, False, False]
        ),
        lambda: X[:, 1:5:2],
    ),
    "slice of one": (
        X,
        lambda mb, x: mb.slice_by_index(x=x, begin=[0, 5, 0], end=[2, 6, 8], squeeze_mask=[False, True, False]),
        lambda: X[:, 5],
    ),
    "identity": (X, lambda mb, x: mb.identity(x=x), lambda: X),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operation_computes_what_it_is_defined_as(case: str, save: Callable[..., Path]) -> None:
    x, body, expected = CASES[case]
    np.testing.assert_allclose(run(save(body, x.shape), x), expected(), rtol=2e-5, atol=2e-6)


def test_gather_reads_rows(save: Callable[..., Path]) -> None:
    root = save(lambda mb, x: mb.gather(x=W, indices=x, axis=0, validate_indices=False), (2, 3), dtype="int32")
    ids = np.array([[0, 4, 2], [1, 1, 3]], np.int32)
    np.testing.assert_array_equal(run(root, ids), W[ids])
    with pytest.raises(CorruptError, match=r"index outside 0\.\.4"):
        run(root, ids + 1)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_activations_pass_through_8_bits(dtype: str, save: Callable[..., Path]) -> None:
    zero = np.array(3, dtype)

    def body(mb: Any, x: Any) -> Any:
        levels = mb.quantize(input=x, scale=np.float32(0.02), zero_point=zero, output_dtype=dtype)
        return mb.dequantize(input=levels, scale=np.float32(0.02), zero_point=zero)

    info = np.iinfo(dtype)
    levels = np.clip(np.rint(X / np.float32(0.02)) + 3, info.min, info.max)
    np.testing.assert_allclose(run(save(body, X.shape), X), (levels - 3) * np.float32(0.02), atol=1e-6)


def test_each_result_is_rounded_to_fp16(save: Callable[..., Path]) -> None:
    def body(mb: Any, x: Any) -> Any:
        return mb.add(x=mb.mul(x=mb.cast(x=x, dtype="fp16"), y=np.float16(1.1)), y=np.float16(100))

    expected = half(half(half(X) * np.float32(np.float16(1.1))).astype(np.float32) + 100)
    np.testing.assert_array_equal(run(save(body, X.shape), X), expected.astype(np.float32))


def test_fp16_products_are_summed_in_fp32(save: Callable[..., Path]) -> None:
    """4,096 ones: fp16 itself would stop counting at 2,048."""
    ones = np.ones((1, 4097), np.float32)
    root = save(lambda mb, x: mb.linear(x=mb.cast(x=x, dtype="fp16"), weight=half(ones)), ones.shape)
    assert run(root, ones) == np.float16(4097)


def test_fp16_overflows_to_infinity_without_a_word(save: Callable[..., Path]) -> None:
    root = save(lambda mb, x: mb.mul(x=mb.cast(x=x, dtype="fp16"), y=np.float16(2)), (1,))
    assert np.isinf(run(root, np.array([60000], np.float32)))


def compressed(tools: Toolkit) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Every constexpr operation in every type that it has: name, target, builder call."""
    types = tools.mil.types
    for bits in (4, 8):
        for sign in ("", "u"):
            name = f"{sign}int{bits}"
            dtype = getattr(types, f"np_{name}_dtype", np.dtype(name) if bits == 8 else None)
            low = 0 if sign else -(2 ** (bits - 1))
            data = RNG.integers(low, low + 2**bits, (6, 32)).astype(dtype)
            offset = RNG.integers(low, low + 2**bits, (6, 2)).astype(dtype)
            call: dict[str, Any] = {"data": data, "scale": half(np.abs(draw(6, 2)))}
            yield f"{name} blocks", "ios18", partial(_constexpr, "blockwise_shift_scale", call)
            yield f"{name} offsets", "ios18", partial(_constexpr, "blockwise_shift_scale", {**call, "offset": offset})
    for bits in (1, 2, 3, 4, 6, 8):
        dtype = getattr(types, f"np_uint{bits}_dtype", np.uint8)
        call = {"indices": RNG.integers(0, 2**bits, (6, 32)).astype(dtype), "lut": half(draw(3, 1, 2**bits, 1))}
        yield f"palette {bits}", "ios18", partial(_constexpr, "lut_to_dense", call)
    for bits in (1, 2, 4, 6, 8):
        indices = RNG.integers(0, 256, 6 * 32 * bits // 8).astype(np.uint8)
        call = {"indices": indices, "lut": half(draw(2**bits)), "shape": np.array([6, 32], np.uint32)}
        yield f"one palette {bits}", "ios17", partial(_constexpr, "lut_to_dense", call)
    for dtype in ("int8", "uint8"):
        data = RNG.integers(np.iinfo(dtype).min, 127, (6, 32)).astype(dtype)
        zero = RNG.integers(0, 99, 6).astype(dtype)
        call = {"quantized_data": data, "zero_point": zero, "scale": half(np.abs(draw(6))), "axis": np.int32(0)}
        yield f"affine {dtype}", "ios17", partial(_constexpr, "affine_dequantize", call)


def _constexpr(name: str, call: dict[str, Any], mb: Any) -> Any:
    return getattr(mb, f"constexpr_{name}")(**call)


def test_compressed_weights_unfold_to_what_coremltools_unfolds(tools: Toolkit, save: Callable[..., Path]) -> None:
    identity = np.eye(32, dtype=np.float32)
    for name, target, call in compressed(tools):
        seen: list[np.ndarray] = []

        def body(mb: Any, x: Any, call: Callable[..., Any] = call, seen: list[np.ndarray] = seen) -> Any:
            weight = call(mb)
            seen.append(np.asarray(weight.op.materialized_val_inference(), np.float32))
            return mb.linear(x=mb.cast(x=x, dtype="fp16"), weight=weight)

        root = save(body, (32, 32), name=name, target=target)
        np.testing.assert_allclose(run(root, identity).T, seen[0], rtol=2e-3, atol=1e-6, err_msg=name)


def test_the_reader_sees_what_coremltools_reader_sees(tools: Toolkit, save: Callable[..., Path]) -> None:
    def body(mb: Any, x: Any) -> Any:
        x = mb.slice_by_index(x=x, begin=[0, 0, 0], end=[2, -1, 8], end_mask=[False, False, True])
        return mb.linear(x=mb.gelu(x=x, mode="TANH_APPROXIMATION"), weight=W, bias=B)

    root = save(body, X.shape)
    ours = Package(root)
    loader = import_module("coremltools.converters.mil.frontend.milproto.load")
    spec = tools.coremltools.utils.load_spec(str(root))
    theirs = loader.load(spec, spec.specificationVersion, str(root / "Data/com.apple.CoreML/weights"))
    values = {one.outputs[0].name: one.outputs[0].val for one in theirs.functions["main"].operations}
    for operation in ours.program.operations:
        if operation.type == "const":
            (constant,) = operation.inputs["val"]
            assert isinstance(constant, Constant)
            np.testing.assert_array_equal(ours.constant(constant), values[operation.outputs[0][0]])


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (lambda mb, x: mb.gelu(x=x, mode="EXACT"), "GELU in mode EXACT"),
        (lambda mb, x: mb.conv(x=mb.expand_dims(x=x, axes=[0]), weight=draw(4, 2, 3, 3)), "stride is not its kernel"),
        (lambda mb, x: mb.concat(values=[x, x], axis=1, interleave=True), "interleaved"),
    ],
)
def test_a_form_that_it_lacks_is_named(body: Body, what: str, save: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedError, match=what) as caught:
        run(save(body, X.shape), X)
    assert "Mac" in caught.value.remedy


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (lambda mb, x: mb.erf(x=x), "no operation 'erf'"),
        (
            lambda mb, x: mb.scaled_dot_product_attention(
                query=x, key=x, value=x, attn_mask=np.ones((6, 6), np.float32)
            ),
            "parameter 'attn_mask'",
        ),
    ],
)
def test_what_it_lacks_is_refused_before_it_runs(body: Body, what: str, save: Callable[..., Path]) -> None:
    package = Package(save(body, X.shape))
    with pytest.raises(UnsupportedError, match=what):
        Interpreter(package)


def test_wrong_inputs_are_named(save: Callable[..., Path]) -> None:
    interpreter = Interpreter(Package(save(lambda mb, x: mb.relu(x=x), X.shape)))
    with pytest.raises(UsageError, match="takes x, not y"):
        interpreter.run({"y": X})
    with pytest.raises(UsageError, match=r"'x' has shape \(1, 6, 8\)"):
        interpreter.run({"x": X[:1]})


def runs(root: Path) -> bool:
    try:
        Interpreter(Package(root)).run({"x": X})
    except MedgeError:
        return False
    return True


@pytest.mark.parametrize("seed", range(8))
def test_damage_anywhere_in_the_specification_is_one_error(seed: int, save: Callable[..., Path]) -> None:
    """Bytes changed, cut and doubled at random: an answer or a MedgeError, never another exception."""

    def body(mb: Any, x: Any) -> Any:
        y = mb.linear(x=mb.reshape(x=x, shape=[2, 48]), weight=draw(7, 48), bias=draw(7))
        return mb.concat(values=[mb.softmax(x=y), mb.transpose(x=mb.transpose(x=y, perm=[1, 0]), perm=[1, 0])], axis=1)

    root = save(body, X.shape)
    path = root / "Data/com.apple.CoreML/model.mlmodel"
    whole, rng, failed = path.read_bytes(), np.random.default_rng(seed), 0
    for _ in range(60):
        damaged = bytearray(whole)
        at = int(rng.integers(len(whole)))
        kind = rng.integers(3)
        if kind == 0:
            damaged[at] = int(rng.integers(256))
        elif kind == 1:
            del damaged[at : at + int(rng.integers(1, 9))]
        else:
            damaged[at:at] = damaged[at : at + 16]
        path.write_bytes(damaged)
        failed += not runs(root)
    assert failed > 20
