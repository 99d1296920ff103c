"""Block quantization in numpy: weight = scale * (value - zero point), one scale for each block along a row.

Scales minimise the weighted squared error of each block: a few ranges around the block's own are tried, values are rounded
for each, and the least-squares scale for those values is taken; the best range wins. (Search over ranges: as in MSE
calibration, arXiv:2106.08295, section 3.1. Least-squares scale for given values, and errors of large weights counted more
than those of small ones: as ggml's `make_qx_quants`.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.quant import Rounding, WeightFormat
from edgekit.source import StoredBlocks

from .hqq import fit_hqq
from .palettes import fit_palettes
from .row_scales import quantize_rows

__all__ = ["QuantizedRows", "carry_over", "dequantize", "fit_blocks", "quantize"]

# Ranges tried, as parts of the block's own; at 8 bits a step is so fine that only its phase matters.
_RANGES = {2: (1.0, 0.85, 0.7), 4: (1.03, 0.97), 8: (1.0, 1.003, 0.997)}
# Elements worked on at a time: their temporaries stay in a core's second-level cache.
_TILE_ELEMENTS = 1 << 16
_SMALLEST = np.float32(1e-30)

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Some rows of a weight as integers, for any format: each converter packs them its own way.

    Attributes:
        values: uint8 [rows, blocks, block_size], each below 2^bits.
        scales: float32 [rows, blocks].
        zero_points: uint8 [rows, blocks]; None for symmetric formats.
        squared_error: Sum over all weights of (weight - stored weight)^2.
        squared_weight: Sum over all weights of weight^2.
        offsets: float32 [rows, blocks], added to each weight of a block; None for formats without.
        tables: float32 [tables, 2^bits], each of equally many rows: what values stand for in palettes, whose rows
            have one scale each; None for other formats.
    """

    values: Bytes
    scales: Floats
    zero_points: Bytes | None
    squared_error: float
    squared_weight: float
    offsets: Floats | None = None
    tables: Floats | None = None


def quantize(weights: Floats, form: WeightFormat, *, rounding: Rounding = "nearest") -> QuantizedRows:
    """Quantize rows.

    Args:
        weights: float32 [rows, columns]; columns are padded with zeros to whole blocks.
        form: A block format.
        rounding: With `hqq`, scales and zero points are refined by that; else, and in row-scaled formats, they are those of
            least squares.
    """
    if form.row_scaled:
        return _quantize_row_scaled(weights, form)
    if form.palette:
        return _in_palettes(weights, form)
    rows, columns = weights.shape
    blocks = -(-columns // form.block_size)
    if columns % form.block_size:
        weights = np.pad(weights, ((0, 0), (0, blocks * form.block_size - columns)))
    flat = np.ascontiguousarray(weights).reshape(rows * blocks, form.block_size)
    values, scales = np.empty(flat.shape, np.uint8), np.empty(len(flat), np.float32)
    zero_points = np.empty(len(flat), np.uint8)
    error = 0.0
    step = max(_TILE_ELEMENTS // form.block_size, 1)
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        error += _quantize_tile(flat[part], form, rounding, values[part], scales[part], zero_points[part])
    return QuantizedRows(
        values.reshape(rows, blocks, form.block_size),
        scales.reshape(rows, blocks),
        None if form.symmetric else zero_points.reshape(rows, blocks),
        error,
        float(np.vdot(flat, flat)),
    )


def _quantize_row_scaled(weights: Floats, form: WeightFormat) -> QuantizedRows:
    """With the scale of each block, which its row's is a part of, around the zero point in the middle."""
    found = quantize_rows(weights, form)
    rows, columns = weights.shape
    values = (found.values.astype(np.int16) + (1 << (form.bits - 1))).astype(np.uint8)
    scales = found.row_scales[:, None]
    if found.block_scales is not None:
        scales = scales * found.block_scales
    blocks = values.reshape(rows, -1, form.block_size or columns)
    return QuantizedRows(blocks, scales, None, found.squared_error, found.squared_weight)


def carry_over(stored: StoredBlocks) -> QuantizedRows:
    """A checkpoint's own blocks: no rounding, no error."""
    rows, size = stored.values.shape[0], stored.format.block_size
    values = stored.values.reshape(rows, -1, size)
    middle = np.float32(1 << (stored.format.bits - 1))
    centred = values.astype(np.float32)
    centred -= middle if stored.zero_points is None else stored.zero_points[..., None].astype(np.float32)
    squares = np.square(centred).sum(-1) * np.square(stored.scales)
    if stored.offsets is not None:
        squares += stored.offsets * (2 * stored.scales * centred.sum(-1) + size * stored.offsets)
    return QuantizedRows(values, stored.scales, stored.zero_points, 0.0, float(np.sum(squares)), stored.offsets)


def dequantize(rows: QuantizedRows, form: WeightFormat, columns: int) -> Floats:
    """The weights that stored rows stand for, float32 [rows, columns]."""
    if rows.tables is not None:
        shared = rows.values.reshape(len(rows.tables), -1)
        return np.take_along_axis(rows.tables, shared, axis=1).reshape(len(rows.values), columns) * rows.scales
    if rows.zero_points is None:
        zero_points = np.full(rows.scales.shape, 1 << (form.bits - 1), np.float32)
    else:
        zero_points = rows.zero_points.astype(np.float32)
    weights = (rows.values - zero_points[..., None]) * rows.scales[..., None]
    if rows.offsets is not None:
        weights += rows.offsets[..., None]
    return weights.reshape(len(weights), -1)[:, :columns]


def fit_blocks(
    weights: Floats, form: WeightFormat, importance: Floats, ranges: Sequence[float]
) -> tuple[Floats, Floats]:
    """Scales and zero points of each block, float32 [rows, blocks], of least squared error.

    Args:
        weights: float32 [rows, columns].
        form: A block format.
        importance: float32 [columns]: what an error in each column counts.
        ranges: Tried for each block, as parts of its own.
    """
    rows, columns = weights.shape
    blocks, size = -(-columns // form.block_size), form.block_size
    if columns % size:
        weights = np.pad(weights, ((0, 0), (0, blocks * size - columns)))
        importance = np.pad(importance, (0, blocks * size - columns))
    scales, zero_points = np.empty((rows, blocks), np.float32), np.empty((rows, blocks), np.float32)
    step = max(_TILE_ELEMENTS // (blocks * size), 1)
    of_columns = np.tile(importance.reshape(blocks, size).T, step)
    for start in range(0, rows, step):
        part = weights[start : start + step]
        tile = np.ascontiguousarray(part.reshape(-1, size).T)
        found = _best_fit(tile, of_columns[:, : tile.shape[1]], form, ranges, np.empty_like(tile), np.empty_like(tile))
        for whole, values in zip((scales, zero_points), found, strict=True):
            whole[start : start + step] = values.reshape(len(part), blocks)
    return scales, zero_points


def _in_palettes(weights: Floats, form: WeightFormat) -> QuantizedRows:
    """Each row scaled to a mean square of one, and each weight as the nearest of the table's: else small rows lose theirs."""
    scales = np.sqrt(np.square(weights).mean(1, keepdims=True))
    scales[scales < _SMALLEST] = 1
    alike = (weights / scales).reshape(len(weights) // form.block_size, -1)
    values, tables = fit_palettes(alike, 1 << form.bits)
    error = np.take_along_axis(tables, values, axis=1).reshape(weights.shape) * scales - weights
    squares = float(np.vdot(error, error)), float(np.vdot(weights, weights))
    return QuantizedRows(values.reshape(len(weights), 1, -1), scales, None, *squares, tables=tables)


def _quantize_tile(
    tile: Floats, form: WeightFormat, rounding: Rounding, values: Bytes, scales: Floats, zero_points: Bytes
) -> float:
    """Quantize blocks [blocks, block_size] into the given arrays; the sum of squared errors."""
    weights = np.ascontiguousarray(tile.T)  # blocks side by side: every reduction runs over contiguous memory
    levels, product = np.empty_like(weights), np.empty_like(weights)
    top = np.float32((1 << form.bits) - 1)
    # An error counts 1 + weight^2 / (mean square of the block): large weights carry most of the function.
    importance = weights * weights
    importance *= np.float32(form.block_size) / np.maximum(np.add.reduce(importance, axis=0), _SMALLEST)
    importance += 1
    best_scale, best_zero_point = _best_fit(weights, importance, form, _RANGES[form.bits], levels, product)
    if rounding == "hqq":
        best_scale, best_zero_point = fit_hqq(weights, form, best_scale, best_zero_point)
        best_scale = _storable(best_scale, form)
    _round(weights, best_scale, best_zero_point, top, levels)
    np.add(levels, best_zero_point, out=product)
    values[...] = product.astype(np.uint8).T
    scales[...], zero_points[...] = best_scale, best_zero_point.astype(np.uint8)
    np.multiply(levels, best_scale, out=levels)
    np.subtract(levels, weights, out=levels)
    return float(np.vdot(levels, levels))


def _best_fit(
    weights: Floats, importance: Floats, form: WeightFormat, ranges: Sequence[float], levels: Floats, product: Floats
) -> tuple[Floats, Floats]:
    """(scale, zero point) of the best candidate for each block [block_size, blocks]; `levels`, `product`: temporaries."""
    top = np.float32((1 << form.bits) - 1)
    important = weights * importance
    best_gain: Floats | None = None
    for scale, zero_point in _candidates(weights, form, ranges):
        _round(weights, scale, zero_point, top, levels)
        np.multiply(levels, important, out=product)
        agreement = np.add.reduce(product, axis=0)
        np.multiply(levels, levels, out=product)
        np.multiply(product, importance, out=product)
        energy = np.maximum(np.add.reduce(product, axis=0), _SMALLEST)
        fitted = agreement / energy
        gain = agreement * fitted  # how much of the block's weighted energy the values explain
        if best_gain is None:
            best_gain, best_scale, best_zero_point = gain, fitted, zero_point
        else:
            better = gain > best_gain
            np.copyto(best_gain, gain, where=better)
            np.copyto(best_scale, fitted, where=better)
            np.copyto(best_zero_point, zero_point, where=better)
    best_scale[np.abs(best_scale) < _SMALLEST] = 1
    return _storable(best_scale, form), best_zero_point


def _storable(scale: Floats, form: WeightFormat) -> Floats:
    """The scales as the format keeps them."""
    if not form.bfloat16_scales:
        return scale
    bits = np.maximum(scale, _SMALLEST).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to the nearest, ties to even
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def _candidates(weights: Floats, form: WeightFormat, ranges: Sequence[float]) -> Iterator[tuple[Floats, Floats]]:
    """(scale, zero point) of each block for each range that is tried; weights are [block_size, blocks]."""
    low: Floats = np.minimum(np.minimum.reduce(weights, axis=0), 0)
    high: Floats = np.maximum(np.maximum.reduce(weights, axis=0), 0)
    middle = np.float32(1 << (form.bits - 1))
    top = np.float32((1 << form.bits) - 1)
    for part in ranges:
        if form.bfloat16_scales:
            scale = np.maximum(-low / middle, high / (middle - 1)) * np.float32(part)
            zero_point = np.full_like(scale, middle)
        elif form.symmetric:
            # The value range is one longer below zero: the sign of the scale turns it to the longer side.
            scale = np.where(-low > high, low, high) * np.float32(-part) / middle
            zero_point = np.full_like(scale, middle)
        else:
            scale = (high - low) * np.float32(part) / top
            zero_point = np.rint(-low * np.float32(part) / np.maximum(scale, _SMALLEST)).clip(0, top)
        scale[np.abs(scale) < _SMALLEST] = 1
        yield scale, zero_point


def _round(weights: Floats, scale: Floats, zero_point: Floats, top: np.float32, levels: Floats) -> None:
    """levels = round(weights / scale), kept where level + zero point is storable."""
    np.multiply(weights, np.float32(1) / scale, out=levels)
    np.rint(levels, out=levels)
    np.maximum(levels, -zero_point, out=levels)
    np.minimum(levels, top - zero_point, out=levels)
