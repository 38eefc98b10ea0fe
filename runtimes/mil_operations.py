"""MIL's operations in numpy: those that medge's graphs use, and their neighbours.

Each function has the operation's own parameter names; one that is not in its signature is refused, so nothing is
ignored silently. Floats come as float32 whatever they are stored as; the interpreter rounds results.
Definitions: coremltools 9.0, converters/mil/mil/ops/defs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medge.runtimes import mil_constexpr
from medge.runtimes.mil_constexpr import along
from medge.runtimes.mil_package import Array


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x (…, in), weight (out, in), bias (out,) -> (…, out)."""
    out: Array = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], len(weight))


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    """Batched, with numpy's broadcasting."""
    left, right = x.swapaxes(-1, -2) if transpose_x else x, y.swapaxes(-1, -2) if transpose_y else y
    return np.asarray(np.matmul(left, right))


def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    strides: Array,
    pad_type: str = "valid",
    pad: Array | None = None,
    dilations: Array | None = None,
    groups: int = 1,
) -> Array:
    """Only the patch embedding's form: (B, C, H, W) by kernels (D, C, k, k) whose stride is their size."""
    kernel = weight.shape[2:]
    plain = (dilations is None or (dilations == 1).all()) and groups == 1 and (pad is None or not pad.any())
    if not plain or pad_type != "valid" or tuple(strides) != kernel or any(np.array(x.shape[2:]) % kernel):
        raise NotImplementedError("a convolution whose stride is not its kernel")
    batch, channels, height, width = x.shape
    rows, columns = height // kernel[0], width // kernel[1]
    patches = x.reshape(batch, channels, rows, kernel[0], columns, kernel[1]).transpose(0, 2, 4, 1, 3, 5)
    out = linear(patches.reshape(batch, rows * columns, -1), weight.reshape(len(weight), -1), bias)
    return out.swapaxes(1, 2).reshape(batch, len(weight), rows, columns)


def layer_norm(
    x: Array, axes: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5
) -> Array:
    """Biased variance over `axes`, then gain and bias."""
    over = tuple(int(axis) for axis in axes)
    centred = np.asarray(x - x.mean(over, keepdims=True))
    variance = np.square(centred).mean(over, keepdims=True)
    centred /= np.sqrt(variance + np.float32(epsilon))
    shape = [n if axis in over or axis - x.ndim in over else 1 for axis, n in enumerate(x.shape)]
    if gamma is not None:
        centred *= gamma.reshape(shape)
    return centred if beta is None else centred + beta.reshape(shape)


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """The tanh approximation; the erf form ("EXACT") is not what any model of medge is trained with."""
    if mode != "TANH_APPROXIMATION":
        raise NotImplementedError(f"GELU in mode {mode}")
    inner = np.square(x)
    inner *= np.float32(0.044715)
    inner += 1
    inner *= x
    inner *= np.float32((2 / np.pi) ** 0.5)
    np.tanh(inner, out=inner)
    inner += 1
    inner *= x
    inner *= np.float32(0.5)
    return inner


def softmax(x: Array, axis: int = -1) -> Array:
    """Shifted by the maximum."""
    out = np.asarray(x - x.max(axis, keepdims=True))
    np.exp(out, out=out)
    out /= out.sum(axis, keepdims=True)
    return out


def scaled_dot_product_attention(query: Array, key: Array, value: Array) -> Array:
    """softmax(q k' / sqrt(d)) v over the last two axes; fused, so only its result is rounded."""
    scaled = query * np.float32(query.shape[-1] ** -0.5)
    heads = [scaled.reshape(-1, *query.shape[-2:])]
    heads += [x.reshape(-1, *x.shape[-2:]) for x in (key, value)]
    out = np.empty((*heads[0].shape[:-1], value.shape[-1]), np.float32)
    for i, (q, k, v) in enumerate(zip(*heads, strict=True)):  # a head at a time stays in the cache
        out[i] = softmax(q @ k.T) @ v
    return out.reshape(*query.shape[:-1], value.shape[-1])


def gather(x: Array, indices: Array, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Array:
    """Rows of `x` along an axis; indices are checked here whatever `validate_indices` says."""
    if batch_dims:
        raise NotImplementedError("gather with batch dimensions")
    if indices.size and not 0 <= indices.min() <= indices.max() < x.shape[axis]:
        raise IndexError(f"an index outside 0..{x.shape[axis] - 1}")
    return np.take(x, indices, axis=int(axis))


def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    *,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """numpy's slices; a mask leaves a bound open, or takes one entry and drops the axis."""

    def index(axis: int) -> slice | int:
        if squeeze_mask is not None and squeeze_mask[axis]:
            return int(begin[axis])
        first = None if begin_mask is not None and begin_mask[axis] else int(begin[axis])
        last = None if end_mask is not None and end_mask[axis] else int(end[axis])
        return slice(first, last, 1 if stride is None else int(stride[axis]))

    return x[tuple(index(axis) for axis in range(x.ndim))]


def quantize(
    input: Array,  # noqa: A002 - MIL's name
    scale: Array,
    zero_point: Array | None = None,
    axis: int = 0,
    output_dtype: str = "int8",
) -> Array:
    """clip(round(input / scale) + zero_point)."""
    info = np.iinfo(output_dtype)
    levels = np.rint(input / along(scale, input, axis))
    if zero_point is not None:
        levels += along(zero_point, input, axis)
    return np.clip(levels, info.min, info.max).astype(info.dtype)


def dequantize(
    input: Array,  # noqa: A002 - MIL's name
    scale: Array,
    zero_point: Array | None = None,
    axis: int = 0,
) -> Array:
    """scale * (input - zero_point)."""
    levels = input.astype(np.float32)
    if zero_point is not None:
        levels -= along(zero_point, input, axis)
    return levels * along(scale, input, axis)


def cast(x: Array, dtype: str) -> Array:
    """To the type that the output declares; the interpreter converts."""
    return np.trunc(x) if dtype.startswith(("int", "uint")) and x.dtype.kind == "f" else x


def concat(values: Sequence[Array], axis: int, interleave: bool = False) -> Array:
    """Along one axis."""
    if interleave:
        raise NotImplementedError("interleaved concat")
    return np.concatenate(values, int(axis))


def _reduce(function: Callable[..., Any]) -> Callable[..., Array]:
    def reduce(x: Array, axes: Array | None = None, keep_dims: bool = False) -> Array:
        over = None if axes is None else tuple(int(axis) for axis in axes)
        return np.asarray(function(x, axis=over, keepdims=bool(keep_dims)))

    return reduce


def _binary(function: Callable[..., Any]) -> Callable[..., Array]:
    def binary(x: Array, y: Array) -> Array:
        return np.asarray(function(x, y))

    return binary


def _unary(function: Callable[..., Any]) -> Callable[..., Array]:
    def unary(x: Array) -> Array:
        return np.asarray(function(x))

    return unary


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def reshape(x: Array, shape: Array) -> Array:
    """-1 stands for the rest, as in numpy; 0 for the input's own size there."""
    return x.reshape([x.shape[i] if n == 0 else int(n) for i, n in enumerate(shape)])


def transpose(x: Array, perm: Array) -> Array:
    """Axes in another order."""
    return x.transpose([int(axis) for axis in perm])


def expand_dims(x: Array, axes: Array) -> Array:
    """Axes of size one, at their places in the result."""
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


def squeeze(x: Array, axes: Array | None = None) -> Array:
    """Without axes of size one."""
    return x.squeeze(None if axes is None else tuple(int(axis) for axis in axes))


def identity(x: Array) -> Array:
    """The same value by another name."""
    return x


CONSTEXPR: dict[tuple[str, bool], Callable[..., Array]] = {
    ("constexpr_blockwise_shift_scale", False): mil_constexpr.blockwise_shift_scale,
    ("constexpr_lut_to_dense", False): mil_constexpr.lut_to_dense,
    ("constexpr_lut_to_dense", True): mil_constexpr.lut_to_dense_flat,
    ("constexpr_affine_dequantize", True): mil_constexpr.affine_dequantize,
}
"""By name and whether it is the form before iOS 18."""

OPERATIONS: dict[str, Callable[..., Array]] = {
    **{f.__name__: f for f in (linear, matmul, conv, layer_norm, gelu, softmax, scaled_dot_product_attention)},
    **{f.__name__: f for f in (quantize, dequantize, cast, concat, gather, slice_by_index)},
    **{f.__name__: f for f in (reshape, transpose, expand_dims, squeeze, identity)},
    **{"add": _binary(np.add), "sub": _binary(np.subtract), "mul": _binary(np.multiply)},
    **{"real_div": _binary(np.divide), "maximum": _binary(np.maximum), "minimum": _binary(np.minimum)},
    **{"tanh": _unary(np.tanh), "exp": _unary(np.exp), "sqrt": _unary(np.sqrt), "square": _unary(np.square)},
    **{"abs": _unary(np.abs), "relu": _unary(lambda x: np.maximum(x, 0)), "sigmoid": _unary(_sigmoid)},
    "silu": _unary(lambda x: x * _sigmoid(x)),
    **{"reduce_mean": _reduce(np.mean), "reduce_sum": _reduce(np.sum), "reduce_max": _reduce(np.max)},
}
"""What the interpreter can run."""
