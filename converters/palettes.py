"""Palettes: the few values that the weights of some rows are rounded to, found by k-means in one dimension.

Lloyd's iterations (IEEE Transactions on Information Theory 28, 1982) on sorted weights: the weights nearest to a value are a
range, whose mean is the difference of two prefix sums.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["fit_palettes"]

ITERATIONS = 15  # further ones change the error by less than a percent
BINS = 256


def fit_palettes(groups: NDArray[np.float32], count: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The values of each group's weights.

    Args:
        groups: float32 [groups, weights].
        count: Of values, at most 256.

    Returns:
        For each weight the number of its value, uint8 [groups, weights], and the values in ascending order, float32
        [groups, count], each of which half precision has.
    """
    fitted = np.stack([_fit(np.sort(group).astype(np.float64), count) for group in groups])
    with np.errstate(over="ignore"):  # a value too large is refused where it is written
        tables = np.sort(fitted.astype(np.float16), axis=1).astype(np.float32)
    borders = (tables[:, 1:] + tables[:, :-1]) / 2
    numbers = [np.searchsorted(border, group) for border, group in zip(borders, groups, strict=True)]
    return np.stack(numbers).astype(np.uint8), tables


def _fit(ordered: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Values for weights in ascending order."""
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    values = _first_values(ordered, count)
    for _ in range(ITERATIONS):
        inner = np.searchsorted(ordered, (values[1:] + values[:-1]) / 2)
        borders = np.concatenate([[0], inner, [len(ordered)]])
        numbers = np.diff(borders)
        values = np.where(numbers > 0, np.diff(sums[borders]) / np.maximum(numbers, 1), values)
    return values


def _first_values(ordered: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Values as dense as the cube root of the weights' density: the best for many of them (Panter and Dite, 1951)."""
    weights, edges = np.histogram(ordered, BINS)
    reached = np.concatenate([[0.0], np.cumsum(np.cbrt(weights))])
    return np.asarray(np.interp((np.arange(count) + 0.5) / count * reached[-1], reached, edges), np.float64)
