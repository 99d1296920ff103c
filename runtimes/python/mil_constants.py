"""Compressed constants of MIL, decoded: the operators whose names begin with `constexpr_`.

Numerics are coremltools' (`decompress` of each operator): differences and products are rounded to the type of the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log2, prod
from operator import floordiv, mod

import numpy as np

from .mil_package import unpack
from .mil_types import ArrayLike, TensorType, round_to_half

__all__ = ["DECODERS", "Decoder"]

Decoder = Callable[[Mapping[str, ArrayLike], TensorType], ArrayLike]

_ELEMENTS_AT_A_TIME = 1 << 22  # bounds what decoding takes beside its result


def blockwise_shift_scale(inputs: Mapping[str, ArrayLike], kind: TensorType) -> ArrayLike:
    """scale * (data - offset), where each block of the data has a scale and an offset of its own."""
    data, scale, offset = inputs["data"], inputs["scale"], inputs.get("offset")
    if data.ndim != scale.ndim or any(map(mod, data.shape, scale.shape)):
        raise ValueError(f"scales of shape {scale.shape} for data of shape {data.shape}")
    if offset is not None and offset.shape != scale.shape:
        raise ValueError(f"offsets of shape {offset.shape} for scales of shape {scale.shape}")
    blocks = [each for pair in zip(scale.shape, map(floordiv, data.shape, scale.shape), strict=True) for each in pair]
    scale = np.expand_dims(scale, tuple(range(1, 2 * scale.ndim, 2)))
    offset = None if offset is None else np.expand_dims(offset, tuple(range(1, 2 * offset.ndim, 2)))
    blocked, out = data.reshape(blocks), np.empty(blocks, np.float32)
    step = max(_ELEMENTS_AT_A_TIME // max(prod(blocks[1:]), 1), 1)
    for start in range(0, blocks[0], step):
        part = slice(start, start + step)
        values = blocked[part].astype(np.float32)
        if offset is not None:
            values = _rounded(values - offset[part].astype(np.float32), kind)
        out[part] = _rounded(values * scale[part], kind)
    return out.reshape(data.shape)


def lut_to_dense(inputs: Mapping[str, ArrayLike], kind: TensorType) -> ArrayLike:
    """Look each index up in its block's table, of numbers or of vectors along `vector_axis`."""
    if "shape" in inputs:  # iOS 16: one table, and indices packed in bytes
        return _unpacked_lut(inputs)
    indices, lut = inputs["indices"], inputs["lut"]
    if lut.ndim != indices.ndim + 2 or any(map(mod, indices.shape, lut.shape)):
        raise ValueError(f"tables of shape {lut.shape} for indices of shape {indices.shape}")
    if indices.size * lut.shape[-1] != kind.count:  # before it takes memory
        raise ValueError(f"it does not make {kind}")
    if indices.max(initial=0) >= lut.shape[-2]:
        raise ValueError("an index is beyond its table")
    tables, dense = lut.reshape(-1, lut.shape[-1]), np.empty((*indices.shape, lut.shape[-1]), lut.dtype)
    # Along each axis, what a group's number adds to the row of its table's first value.
    first_rows = [
        np.arange(length) // (length // groups) * prod(lut.shape[axis + 1 : -1])
        for axis, (length, groups) in enumerate(zip(indices.shape, lut.shape, strict=False))
    ]
    step = max(_ELEMENTS_AT_A_TIME // max(prod(indices.shape[1:]), 1), 1)
    for start in range(0, len(indices), step):
        part = slice(start, start + step)
        dense[part] = tables[sum(np.ix_(first_rows[0][part], *first_rows[1:])) + indices[part]]
    if lut.shape[-1] == 1:
        return dense[..., 0]
    axis = int(inputs["vector_axis"]) % indices.ndim
    shape = [length * (lut.shape[-1] if index == axis else 1) for index, length in enumerate(indices.shape)]
    return np.moveaxis(dense, -1, axis + 1).reshape(shape)


def affine_dequantize(inputs: Mapping[str, ArrayLike], kind: TensorType) -> ArrayLike:
    """scale * (data - zero point), one of each for the whole or for each index of an axis."""
    data, axis = inputs["quantized_data"], int(inputs["axis"])
    if any(value.size not in {1, data.shape[axis]} for value in (inputs["zero_point"], inputs["scale"])):
        raise ValueError(f"zero points or scales that are not {data.shape[axis]}")  # they would make the result larger
    shape = [1] * data.ndim
    shape[axis] = -1
    zero_point, scale = (
        value.reshape(shape) if value.ndim else value for value in (inputs["zero_point"], inputs["scale"])
    )
    return _rounded((data.astype(np.float32) - zero_point.astype(np.float32)) * scale, kind)


def sparse_to_dense(inputs: Mapping[str, ArrayLike], kind: TensorType) -> ArrayLike:
    """Put the data where the mask has a bit, zeros elsewhere."""
    data, mask = inputs["nonzero_data"], inputs["mask"]
    if "shape" in inputs:  # iOS 16: bits of the mask packed in bytes
        shape = tuple(map(int, inputs["shape"]))
        mask = unpack(mask, TensorType("uint1", shape))
    dense = np.zeros(mask.shape, data.dtype)
    dense[mask != 0] = data
    return dense


def cast(inputs: Mapping[str, ArrayLike], kind: TensorType) -> ArrayLike:
    """The same numbers in another type."""
    return inputs["source_val"]


DECODERS: Mapping[str, Decoder] = {
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_sparse_to_dense": sparse_to_dense,
    "constexpr_cast": cast,
}


def _unpacked_lut(inputs: Mapping[str, ArrayLike]) -> ArrayLike:
    lut, shape = inputs["lut"], tuple(map(int, inputs["shape"]))
    bits = int(log2(lut.size))
    return lut[unpack(inputs["indices"], TensorType(f"uint{bits}", shape))]


def _rounded(values: ArrayLike, kind: TensorType) -> ArrayLike:
    return round_to_half(values) if kind.dtype == "float16" else values
