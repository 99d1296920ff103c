"""Rows for NPUs: whole numbers with one float32 scale for each row, and in 4 bits a small whole-number scale for each block.

Scales minimise the squared error among a few tried around the one that the largest weight asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.quant import WeightFormat

__all__ = ["LARGEST_BLOCK_SCALE", "ScaledRows", "quantize_rows"]

LARGEST_BLOCK_SCALE = 15
# Ranges tried, as parts of the one that clips nothing.
_PARTS = {8: (1.0, 0.95, 0.9), 4: (1.0, 0.93, 0.86, 0.8)}
_SMALLEST = np.float32(1e-30)
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """Some rows: weight = row scale * block scale * value.

    Attributes:
        values: int8 [rows, columns], at 4 bits from -8 to 7.
        row_scales: float32 [rows].
        block_scales: uint8 [rows, blocks], from 1 to 15; None where a row is one block.
    """

    values: NDArray[np.int8]
    row_scales: Floats
    block_scales: NDArray[np.uint8] | None
    squared_error: float
    squared_weight: float
    largest: float


def quantize_rows(weights: Floats, form: WeightFormat) -> ScaledRows:
    """Quantize rows, float32 [rows, columns], to a row-scaled format whose blocks divide the columns."""
    rows, columns = weights.shape
    size = form.block_size or columns
    blocks = weights.reshape(rows, columns // size, size)
    largest = np.maximum(np.abs(blocks).max(-1), _SMALLEST)
    top = (1 << (form.bits - 1)) - 1
    wanted = _best_scales(blocks, largest / np.float32(top), form.bits)
    if not form.block_size:
        numbers, row_scales = None, wanted[:, 0]
        scales = wanted
    else:
        row_scales = wanted.max(-1) / np.float32(LARGEST_BLOCK_SCALE)
        numbers = np.clip(np.rint(wanted / row_scales[:, None]), 1, LARGEST_BLOCK_SCALE).astype(np.uint8)
        scales = numbers * row_scales[:, None]
    values = _rounded(blocks, scales, form.bits)
    difference = values * scales[..., None] - blocks
    return ScaledRows(
        values.reshape(rows, columns).astype(np.int8),
        row_scales,
        numbers,
        float(np.vdot(difference, difference)),
        float(np.vdot(weights, weights)),
        float(np.abs(weights).max()),
    )


def _best_scales(blocks: Floats, scales: Floats, bits: int) -> Floats:
    """The least-squares scale of the best of the tried ranges, float32 [rows, blocks]."""
    best, least = scales, np.full(scales.shape, np.inf, np.float32)
    for part in _PARTS[bits]:
        tried = scales * np.float32(part)
        values = _rounded(blocks, tried, bits)
        energy = np.maximum(np.square(values).sum(-1), _SMALLEST)
        fitted = np.maximum((values * blocks).sum(-1) / energy, _SMALLEST)
        error = np.square(values * fitted[..., None] - blocks).sum(-1)
        best, least = np.where(error < least, fitted, best), np.minimum(error, least)
    return best


def _rounded(blocks: Floats, scales: Floats, bits: int) -> Floats:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    values: Floats = np.clip(np.rint(blocks / scales[..., None]), low, high)
    return values
