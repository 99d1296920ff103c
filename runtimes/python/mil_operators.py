"""MIL's operators that compute numbers, in numpy; what they return is rounded to the declared type by the evaluator.

Each is named and takes its parameters as MIL's specification has them (coremltools, `converters/mil/mil/ops/defs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from .mil_types import HELD, ArrayLike

__all__ = ["BINARY", "COMPUTING", "Kernel"]

Kernel = Callable[..., Any]

_CAST_TYPES = {"fp16": "float16", "fp32": "float32"}
_erf_of_each = np.frompyfunc(math.erf, 1, 1)  # numpy has none


def linear(x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> ArrayLike:
    """x [..., in] times weight [out, in] transposed, plus bias [out]."""
    product = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        product += bias
    return product.reshape(*x.shape[:-1], weight.shape[0])


def matmul(x: ArrayLike, y: ArrayLike, transpose_x: bool = False, transpose_y: bool = False) -> ArrayLike:
    """Matrix product of the last two axes."""
    left = x.swapaxes(-1, -2) if transpose_x else x
    right = y.swapaxes(-1, -2) if transpose_y else y
    return np.asarray(np.matmul(left, right))


def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None
) -> ArrayLike:
    """softmax(query keyᵀ / sqrt(dim) + mask) value; a mask of bool says what is seen."""
    scores = np.matmul(query, key.swapaxes(-1, -2)) / np.float32(math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, np.float32(-np.inf)) if attn_mask.dtype == bool else scores + attn_mask
    return np.asarray(np.matmul(softmax(scores), value))


def softmax(x: ArrayLike, axis: int = -1) -> ArrayLike:
    """Exponentials that sum to 1 along an axis."""
    exponentials = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=axis, keepdims=True))


def layer_norm(
    x: ArrayLike,
    axes: ArrayLike | None = None,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    epsilon: float = 1e-5,
) -> ArrayLike:
    """Mean 0 and variance 1 over the axes, then scaled by gamma and shifted by beta, which have the axes' shape."""
    over = tuple(range(x.ndim)) if axes is None else tuple(int(axis) % x.ndim for axis in axes)
    centred = x - x.mean(axis=over, keepdims=True)
    normal = centred / np.sqrt((centred * centred).mean(axis=over, keepdims=True) + np.float32(epsilon))
    shape = [length if axis in over else 1 for axis, length in enumerate(x.shape)]
    if gamma is not None:
        normal = normal * gamma.reshape(shape)
    return np.asarray(normal if beta is None else normal + beta.reshape(shape))


def erf(x: ArrayLike) -> ArrayLike:
    """The error function."""
    return np.asarray(_erf_of_each(x), np.float32)


def l2_norm(x: ArrayLike, epsilon: float = 1e-6) -> ArrayLike:
    """Divide by the root of the sum of squares over the last three axes."""
    squares = (x * x).sum(axis=tuple(range(max(x.ndim - 3, 0), x.ndim)), keepdims=True)
    return np.asarray(x / np.sqrt(squares + np.float32(epsilon)))


def sigmoid(x: ArrayLike) -> ArrayLike:
    """1 / (1 + exp(-x)), which is 0 where the exponential is too large."""
    return np.asarray(1 / (1 + np.exp(-x)))


def gelu(x: ArrayLike, mode: str = "EXACT") -> ArrayLike:
    """x times the normal distribution function of x, or one of its two approximations."""
    if mode == "EXACT":
        return np.asarray(0.5 * x * (1 + erf(x / math.sqrt(2))))
    if mode == "TANH_APPROXIMATION":
        return np.asarray(0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + 0.044715 * x * x * x))))
    if mode == "SIGMOID_APPROXIMATION":
        return np.asarray(x * sigmoid(np.float32(1.702) * x))
    raise ValueError(f"gelu has no mode {mode!r}")


def cast(x: ArrayLike, dtype: str) -> ArrayLike:
    """The same numbers in another type; fractions are cut off."""
    return x.astype(HELD[_CAST_TYPES.get(dtype, dtype)])


def cumsum(x: ArrayLike, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> ArrayLike:
    """Running sums along an axis, from its end where `reverse`, each without its own element where `exclusive`."""
    source = np.flip(x, axis) if reverse else x
    sums = np.cumsum(source, axis=axis, dtype=x.dtype)
    if exclusive:
        sums = sums - source
    return np.asarray(np.flip(sums, axis) if reverse else sums)


def band_part(x: ArrayLike, lower: int = -1, upper: int = -1) -> ArrayLike:
    """Zero all but a band of diagonals of the last two axes; a negative width keeps all on that side."""
    row, column = np.ogrid[: x.shape[-2], : x.shape[-1]]
    kept = ((lower < 0) | (row - column <= lower)) & ((upper < 0) | (column - row <= upper))
    return np.where(kept, x, np.zeros((), x.dtype))


def fill(shape: ArrayLike, value: Any = 0.0) -> ArrayLike:
    """A tensor of one value."""
    return np.full(tuple(map(int, shape)), value)


def range_1d(start: Any, end: Any, step: Any) -> ArrayLike:
    """Numbers from start to before end."""
    return np.arange(start, end, step)


def clip(x: ArrayLike, alpha: float, beta: float) -> ArrayLike:
    """Between alpha and beta."""
    return np.clip(x, np.float32(alpha), np.float32(beta))


def _with_epsilon(compute: Kernel, default: float) -> Kernel:
    """Operators that add a small number before they compute."""

    def kernel(x: ArrayLike, epsilon: float = default) -> ArrayLike:
        return np.asarray(compute(x + np.float32(epsilon)))

    return kernel


def _reduction(compute: Kernel) -> Kernel:
    """Over the axes, or all of them."""

    def kernel(x: ArrayLike, axes: ArrayLike | None = None, keep_dims: bool = False) -> ArrayLike:
        over = tuple(range(x.ndim)) if axes is None else tuple(map(int, axes))
        return np.asarray(compute(x, axis=over, keepdims=bool(keep_dims)))

    return kernel


def _position(
    compute: Kernel, x: ArrayLike, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> ArrayLike:
    return np.asarray(compute(x, axis=int(axis), keepdims=bool(keep_dims))).astype(HELD[output_dtype])


def _log_sum_exp(x: ArrayLike, axis: tuple[int, ...], keepdims: bool) -> ArrayLike:
    largest = x.max(axis=axis, keepdims=True)
    total = np.log(np.exp(x - largest).sum(axis=axis, keepdims=True)) + largest
    return np.asarray(total if keepdims else np.squeeze(total, axis))


def _unary(compute: Kernel) -> Kernel:
    def kernel(x: ArrayLike) -> ArrayLike:
        return np.asarray(compute(x))

    return kernel


def _binary(compute: Kernel) -> Kernel:
    def kernel(x: ArrayLike, y: ArrayLike) -> ArrayLike:
        return np.asarray(compute(x, y))

    return kernel


BINARY: Mapping[str, Kernel] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "real_div": np.true_divide,
    "floor_div": np.floor_divide,
    "mod": np.mod,
    "pow": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}
_UNARY: Mapping[str, Kernel] = {
    "abs": np.abs,
    "ceil": np.ceil,
    "floor": np.floor,
    "round": np.round,
    "sign": np.sign,
    "cos": np.cos,
    "sin": np.sin,
    "exp": np.exp,
    "exp2": np.exp2,
    "sqrt": np.sqrt,
    "square": np.square,
    "tanh": np.tanh,
    "logical_not": np.logical_not,
    "erf": erf,
    "relu": lambda x: np.maximum(x, np.zeros((), x.dtype)),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "softplus": lambda x: np.logaddexp(x, np.zeros((), x.dtype)),
}
_REDUCTIONS: Mapping[str, Kernel] = {
    "reduce_sum": np.sum,
    "reduce_mean": np.mean,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum_square": lambda x, **over: np.sum(x * x, **over),
    "reduce_l1_norm": lambda x, **over: np.sum(np.abs(x), **over),
    "reduce_l2_norm": lambda x, **over: np.sqrt(np.sum(x * x, **over)),
    "reduce_log_sum_exp": _log_sum_exp,
}
COMPUTING: Mapping[str, Kernel] = {
    **{name: _binary(compute) for name, compute in BINARY.items()},
    **{name: _unary(compute) for name, compute in _UNARY.items()},
    **{name: _reduction(compute) for name, compute in _REDUCTIONS.items()},
    "reduce_argmax": partial(_position, np.argmax),
    "reduce_argmin": partial(_position, np.argmin),
    "log": _with_epsilon(np.log, 1e-45),
    "rsqrt": _with_epsilon(lambda x: 1 / np.sqrt(x), 1e-12),
    "inverse": _with_epsilon(lambda x: 1 / x, 1e-4),
    "linear": linear,
    "matmul": matmul,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "l2_norm": l2_norm,
    "gelu": gelu,
    "cast": cast,
    "cumsum": cumsum,
    "band_part": band_part,
    "fill": fill,
    "range_1d": range_1d,
    "clip": clip,
}
