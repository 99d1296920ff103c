"""Palettes: the few values that the weights of some rows are rounded to, found by k-means in one dimension.

Lloyd's iterations (IEEE Transactions on Information Theory 28, 1982) on sorted weights: the weights nearest to a value are a
range, whose mean is a quotient of two differences of prefix sums.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["fit_palettes"]

ITERATIONS = 45  # further ones change the error by less than a percent
BINS = 256
Doubles = NDArray[np.float64]


def fit_palettes(
    groups: NDArray[np.float32], count: int, *, large_count_more: bool = True
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The values of each group's weights.

    Args:
        groups: float32 [groups, weights].
        count: Of values, at most 256.
        large_count_more: An error counts 1 + weight^2 / (mean square of the group): a few large weights carry most of a
            function, and are too few for their plain squared error to get them a value.

    Returns:
        For each weight the number of its value, uint8 [groups, weights], and the values in ascending order, float32
        [groups, count], each of which half precision has.
    """
    fitted = np.stack([_fit(np.sort(group).astype(np.float64), count, large_count_more) for group in groups])
    with np.errstate(over="ignore"):  # a value too large is refused where it is written
        tables = np.sort(fitted.astype(np.float16), axis=1).astype(np.float32)
    borders = (tables[:, 1:] + tables[:, :-1]) / 2
    numbers = [np.searchsorted(border, group) for border, group in zip(borders, groups, strict=True)]
    return np.stack(numbers).astype(np.uint8), tables


def _fit(ordered: Doubles, count: int, large_count_more: bool) -> Doubles:
    """Values for weights in ascending order."""
    importance = np.ones_like(ordered)
    if large_count_more:
        squares = np.square(ordered)
        importance += squares / max(squares.mean(), np.finfo(np.float64).tiny)
    counted = np.concatenate([[0.0], np.cumsum(importance)])
    sums = np.concatenate([[0.0], np.cumsum(importance * ordered)])
    values = _first_values(ordered, importance, count)
    for _ in range(ITERATIONS):
        inner = np.searchsorted(ordered, (values[1:] + values[:-1]) / 2)
        borders = np.concatenate([[0], inner, [len(ordered)]])
        shares = np.diff(counted[borders])
        values = np.where(shares > 0, np.diff(sums[borders]) / np.where(shares > 0, shares, 1), values)
    return values


def _first_values(ordered: Doubles, importance: Doubles, count: int) -> Doubles:
    """From the least to the largest weight, as dense as the cube root of their density: the best for many values (Panter and
    Dite, 1951).
    """
    weights, edges = np.histogram(ordered, BINS, weights=importance)
    reached = np.concatenate([[0.0], np.cumsum(np.cbrt(weights))])
    return np.asarray(np.interp(np.linspace(0, reached[-1], count), reached, edges), np.float64)
