"""Which tokens may be drawn: temperature, top-k, top-p, min-p and typical-p over one row of scores.

The filters have the semantics and the order of the generation loop of transformers: temperature, top-k, top-p (nucleus
sampling, arXiv:1904.09751), min-p (arXiv:2407.01082), typical-p (locally typical sampling, arXiv:2202.00666). Each works
on the probabilities of what the ones before it have kept. None of them sorts the vocabulary.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import GenerationError
from edgekit.session import GenerateOptions

__all__ = ["as_row", "check_peak", "draw_place", "filter_scores", "kth_largest", "to_float32"]

Floats: TypeAlias = NDArray[np.float32]
Ids: TypeAlias = NDArray[np.int64]

FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32_TINY = float(np.finfo(np.float32).tiny)
_GROUPS = 2048
_ROW = 256
_FEW = 1024
# float32 weights are summed in float64: what the sums may be off by is far below this share
_SLACK = 0.99


def as_row(logits: Floats) -> Floats:
    """Return the logits as float32 [vocab]: the array itself if it is that already.

    Raises:
        ValueError: The shape is not [vocab].
    """
    row: Floats = np.asarray(logits, dtype=np.float32)
    if row.ndim != 1 or not len(row):
        raise ValueError(f"logits have shape {list(row.shape)}, expected [vocab]")
    return row


def check_peak(peak: float) -> None:
    """Refuse a row of logits by its maximum, which is NaN if any of them is.

    Raises:
        GenerationError: It is NaN, plus infinity, or minus infinity, which forbids every token.
    """
    if not math.isfinite(peak):
        what = "forbid every token" if peak == -np.inf else f"contain {peak}"
        raise GenerationError(
            f"the model's logits {what}",
            hint="the compiled model is broken on this device: convert it again, or try another backend or precision",
        )


def to_float32(value: float) -> np.float32:
    """Return a positive number as the nearest float32 that is neither 0 nor infinite: both make NaN of some logits."""
    return np.float32(min(max(value, _FLOAT32_TINY), FLOAT32_MAX))


def filter_scores(
    scores: Floats, peak: np.float32, options: GenerateOptions, buffer: Floats
) -> tuple[Ids | None, Floats]:
    """Return the ids of the tokens that may be drawn, and their probabilities relative to the greatest of the row.

    Args:
        scores: float32 [vocab], the logits after the penalties; left unchanged unless it is the buffer.
        peak: The greatest of them, a finite number.
        options: Reads temperature (over 0), top_k, top_p, min_p and typical_p.
        buffer: float32 [vocab], overwritten; what is returned may be a view of it.

    Returns:
        The ids, int64 [kept] ascending, or None for all; the weights, float32 [kept].
    """
    # subtracting before dividing keeps a tiny temperature from overflowing to plus infinity
    with np.errstate(over="ignore", under="ignore"):
        np.subtract(scores, peak, out=buffer)
        weights: Floats = np.divide(buffer, to_float32(options.temperature), out=buffer)
        ids: Ids | None = None
        if 0 < options.top_k < len(scores):
            ids = np.flatnonzero(weights >= kth_largest(weights, options.top_k))
            weights = weights[ids]
        np.exp(weights, out=weights)
    places = _keep_likely(weights, options.top_p, options.min_p)
    if places is not None:
        ids, weights = _take(ids, places), weights[places]
    if options.typical_p < 1:
        places = _keep_typical(weights, options.typical_p)
        ids, weights = _take(ids, places), weights[places]
    return ids, weights


def draw_place(weights: Floats, uniform: float) -> int:
    """Return the place that a number from [0, 1) falls on when the weights are laid end to end.

    Sums of rows first, then within one row, so that a whole vocabulary is not accumulated number by number. All sums
    are float64. A place of no weight is never returned.
    """
    whole = len(weights) // _ROW * _ROW
    sums = weights[:whole].reshape(-1, _ROW).sum(axis=1, dtype=np.float64)
    sums = np.append(sums, weights[whole:].sum(dtype=np.float64))
    row, rest = _locate(sums, uniform * float(sums.sum()))
    place, _ = _locate(weights[row * _ROW : (row + 1) * _ROW], rest)
    return row * _ROW + place


def kth_largest(values: Floats, k: int) -> np.float32:
    """Return the k-th largest value, k from 1 to their number.

    The values are split into groups. The k-th largest of the groups' maxima has k values at or above it, so nothing
    below it can be among the k largest, and the partition runs over few values.
    """
    if k < _GROUPS and len(values) > 4 * _GROUPS:
        whole = len(values) // _GROUPS * _GROUPS
        maxima = np.concatenate([values[:whole].reshape(-1, _GROUPS).max(axis=0), values[whole:]])
        values = values[values >= np.partition(maxima, len(maxima) - k)[len(maxima) - k]]
    return np.float32(np.partition(values, len(values) - k)[len(values) - k])


def _take(ids: Ids | None, places: Ids) -> Ids:
    return places if ids is None else ids[places]


def _locate(weights: NDArray[np.floating], target: float) -> tuple[int, float]:
    """Return the place in which the running sum passes the target, never one of no weight, and what is left of it."""
    sums = weights.cumsum(dtype=np.float64)
    # rounding may put the target at or past the total: then the last place that has any weight
    place = min(int(sums.searchsorted(target, side="right")), int(sums.searchsorted(sums[-1])))
    return place, target - (float(sums[place - 1]) if place else 0.0)


def _keep_likely(weights: Floats, top_p: float, min_p: float) -> Ids | None:
    """Return the places that top-p and then min-p keep, ascending, or None for all. The largest weight is 1.

    Both keep the largest weights, so their order does not matter. All weights below a share of (1 - top_p) of their mean
    have less than (1 - top_p) of the mass together: none of them is in the nucleus, and only the rest is looked at.
    Of equal weights at the border of the nucleus the first ones are kept; transformers leaves that to its sort.
    """
    if top_p >= 1 and min_p <= 0:
        return None
    if top_p >= 1:
        return np.flatnonzero(weights >= np.float32(min_p))
    total = float(weights.sum(dtype=np.float64))
    floor = max(min_p, _SLACK * (1 - top_p) * total / len(weights))
    likely = weights[np.flatnonzero(weights >= np.float32(floor))]
    border, count = _nucleus(likely, top_p * total)
    kept = weights >= border
    surplus = int(np.count_nonzero(kept)) - count
    if surplus:
        kept[np.flatnonzero(weights == border)[-surplus:]] = False
    return np.flatnonzero(kept)


def _nucleus(weights: Floats, mass: float) -> tuple[np.float32, int]:
    """Return the smallest of the fewest largest weights that reach a mass, and their number; all if they do not.

    The weights are reordered: halved by partition, until the half that holds the border is small enough to sort.
    """
    above, count = 0.0, 0
    while len(weights) > _FEW:
        half = len(weights) // 2
        weights.partition(half)
        upper = float(weights[half:].sum(dtype=np.float64))
        if above + upper >= mass:
            weights = weights[half:]
        else:
            above, count, weights = above + upper, count + len(weights) - half, weights[:half]
    falling = np.sort(weights)[::-1]
    last = min(int((above + falling.cumsum(dtype=np.float64)).searchsorted(mass)), len(falling) - 1)
    return falling[last], count + last + 1


def _keep_typical(weights: Floats, typical_p: float) -> Ids:
    """Return the places of the tokens whose information is nearest to the entropy, ascending, up to a mass of typical_p.

    The largest weight is 1. Information is minus the logarithm of a weight, but for a constant, so its distance from its
    mean, the entropy, is that of the logarithm from the mean logarithm. Equals at the border are all kept.

    The border is sought among few: tokens further below the mean than the likeliest is above it come last, by falling
    weight, and those of them that have less than (1 - typical_p) of the mass together are not needed to reach it.
    """
    total = float(weights.sum(dtype=np.float64))
    distances: Floats = np.log(np.maximum(weights, np.float32(_FLOAT32_TINY)))
    mean = float((weights * distances).sum(dtype=np.float64)) / total
    distances -= np.float32(mean)
    np.abs(distances, out=distances)
    floor = _SLACK * min((1 - typical_p) * total / len(weights), float(np.exp(2 * mean)))
    likely = np.flatnonzero(weights >= np.float32(floor))
    return np.flatnonzero(distances <= _typical_border(distances[likely], weights[likely], typical_p * total))


def _typical_border(distances: Floats, weights: Floats, mass: float) -> np.float32:
    """Return the distance within which the weights reach a mass; the greatest if they do not.

    The bits of floats that are not negative are ordered as they are: a distance and its weight, packed into one integer,
    are partitioned together.
    """
    pairs = distances.view(np.uint32).astype(np.uint64)
    pairs <<= np.uint64(32)
    pairs |= weights.view(np.uint32)
    before = 0.0
    while len(pairs) > _FEW:
        half = len(pairs) // 2
        pairs.partition(half)
        nearer = float(_packed_weights(pairs[:half]).sum(dtype=np.float64))
        if before + nearer >= mass:
            pairs = pairs[:half]
        else:
            before, pairs = before + nearer, pairs[half:]
    pairs = np.sort(pairs)
    masses = before + _packed_weights(pairs).cumsum(dtype=np.float64)
    last = min(int(masses.searchsorted(mass)), len(pairs) - 1)
    return np.float32((pairs[last : last + 1] >> np.uint64(32)).astype(np.uint32).view(np.float32)[0])


def _packed_weights(pairs: NDArray[np.uint64]) -> Floats:
    return pairs.astype(np.uint32).view(np.float32)  # the cast keeps the lower half
