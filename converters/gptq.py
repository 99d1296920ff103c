"""GPTQ: rounding a weight so that its products with the inputs it sees change least.

Columns are rounded one after the other, the ones with the largest inputs first; what each loses is made up for by those
that are still to come, as the inverse of the inputs' second moments says (arXiv:2210.17323: sections 3.2 and 3.3 for the
update and its Cholesky form; order by activation as in the authors' code). Scales and zero points are found before, from the
weights as they are, with errors counted by the second moment of their column: blocks stay runs of neighbouring columns, so
that any runtime of block formats computes them.

Each row is on its own once the guide is made: rows are rounded in chunks, on several threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.quant import WeightFormat

from .quantize import Floats, QuantizedRows, fit_blocks

__all__ = ["RoundingGuide", "make_guide", "quantize_guided"]

# Of the mean second moment, added to each: keeps directions that no text showed from counting for nothing.
DAMPING = 0.01
# What products of different columns lose: those seen on a few thousand tokens are mostly chance in wide matrices. A covariance is
# shrunk towards its diagonal (Schaefer and Strimmer, Stat. Appl. Genet. Mol. Biol. 4:32, 2005). On SmolLM2-135M, 3,100 tokens: of
# the down projections (1,536 columns) rounding then changes products with unseen inputs by 0.7 times as much as rounding to
# nearest does, without by as much (squared); a whole model in 4 bits diverges by 0.196 instead of 0.241. Little depends on it.
SHRINKAGE = 0.5
# Of the mean second moment: a block whose columns no text lit up still takes the scale that suits its weights.
SMALLEST_IMPORTANCE = 1e-6
# Ranges tried for each block, as parts of its own.
_RANGES = {
    2: tuple(np.linspace(1.0, 0.5, 13).tolist()),
    4: tuple(np.linspace(1.05, 0.75, 13).tolist()),
    8: (1.0, 1.003, 0.997),
}
_SMALL_TRIANGLE = 64
_COLUMNS_AT_ONCE = 32  # updated one by one; those beyond them, in one product


@dataclass(frozen=True, slots=True)
class RoundingGuide:
    """What a weight's inputs say of its columns.

    Attributes:
        importance: float32 [columns], over zero: the second moments of the inputs over their mean.
        order: int64 [columns], in which columns are rounded.
        feedback: float32 [columns, columns], upper triangular, in that order: row i over its diagonal is what a unit
            error of column i takes from each later one.
        costs: float64 [columns]: what a squared error of one in each column costs in the products, over all inputs, after the
            later ones have made up for it. Never more than the column's second moment and what damping adds.
    """

    importance: Floats
    order: NDArray[np.int64]
    feedback: Floats
    costs: NDArray[np.float64]


def make_guide(second_moments: NDArray[np.float64]) -> RoundingGuide:
    """Prepare the second moments of a weight's inputs, float64 [columns, columns], for rounding."""
    diagonal = second_moments.diagonal().copy()
    mean = float(diagonal.mean()) or 1.0
    order = np.argsort(-diagonal, kind="stable")
    # inverse(damped) = upper^T upper: from the Cholesky factor of the matrix read backwards, without inverting twice
    damped = second_moments[np.ix_(order[::-1], order[::-1])]
    damped *= (1 - SHRINKAGE) / mean
    damped[np.diag_indices(len(damped))] = diagonal[order[::-1]] / mean + DAMPING
    upper = np.asarray(np.linalg.cholesky(damped), np.float64)[::-1, ::-1]
    del damped
    _invert_upper(upper)
    costs = np.empty_like(diagonal)
    costs[order] = mean / np.square(upper.diagonal())
    upper /= upper.diagonal()[:, None].copy()
    importance = np.maximum(diagonal / mean, SMALLEST_IMPORTANCE).astype(np.float32)
    return RoundingGuide(importance, order, upper.astype(np.float32), costs)


def _invert_upper(matrix: NDArray[np.float64]) -> None:
    """Invert an upper triangular matrix in its place, by halves: a third of the work of a general one, nearly all in
    products.
    """
    size = len(matrix)
    if size <= _SMALL_TRIANGLE:
        matrix[:] = np.triu(np.linalg.inv(matrix))
        return
    half = size // 2
    first, corner, last = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    _invert_upper(first)
    _invert_upper(last)
    corner[:] = first @ (corner @ last)
    np.negative(corner, out=corner)


def quantize_guided(weights: Floats, form: WeightFormat, guide: RoundingGuide) -> QuantizedRows:
    """Quantize rows.

    Args:
        weights: float32 [rows, columns].
        form: A block format; the last block is padded.
        guide: Of the weight's inputs.
    """
    columns, size = weights.shape[1], form.block_size
    scales, zero_points = fit_blocks(weights, form, guide.importance, _RANGES[form.bits])
    values = np.repeat(zero_points, size, axis=1)  # what pads the last block is zero
    rounded = _round_columns(weights, form, guide, scales, zero_points)
    difference = (rounded - values[:, :columns]) * np.repeat(scales, size, axis=1)[:, :columns] - weights
    values[:, :columns] = rounded
    return QuantizedRows(
        values.astype(np.uint8).reshape(len(weights), -1, size),
        scales,
        None if form.symmetric else zero_points.astype(np.uint8),
        float(np.vdot(difference, difference)),
        float(np.vdot(weights, weights)),
    )


def _round_columns(
    weights: Floats, form: WeightFormat, guide: RoundingGuide, scales: Floats, zero_points: Floats
) -> Floats:
    """The stored values, float32 [rows, columns]; scales and zero points are [rows, blocks]."""
    order, top = guide.order, (1 << form.bits) - 1
    remaining = np.ascontiguousarray(weights.T[order])  # a column is a run of memory
    values, by_block = np.empty_like(remaining), (np.ascontiguousarray(scales.T), np.ascontiguousarray(zero_points.T))
    for start in range(0, len(order), _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, len(order))
        errors = np.empty((stop - start, len(weights)), np.float32)
        for place in range(start, stop):
            scale, zero_point = (array[order[place] // form.block_size] for array in by_block)
            column, value, error = remaining[place], values[order[place]], errors[place - start]
            np.divide(column, scale, out=value)
            np.add(value, zero_point, out=value)
            np.rint(value, out=value)
            np.clip(value, 0, top, out=value)
            np.subtract(value, zero_point, out=error)
            np.multiply(error, scale, out=error)
            np.subtract(column, error, out=error)
            remaining[place + 1 : stop] -= guide.feedback[place, place + 1 : stop, None] * error
        remaining[stop:] -= guide.feedback[start:stop, stop:].T @ errors
    return np.ascontiguousarray(values.T)
