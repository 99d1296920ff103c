"""Choosing the next token from a row of logits.

The filters have the semantics of the generation loop of transformers: repetition penalty (CTRL, arXiv:1909.05858),
temperature, top-k, top-p (nucleus sampling, arXiv:1904.09751), min-p (arXiv:2407.01082), in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import GenerationError
from edgekit.session import GenerateOptions

__all__ = ["Sampler"]

_Floats: TypeAlias = NDArray[np.float32]
_Ids: TypeAlias = NDArray[np.int64]

_GROUPS = 2048
_ROW = 256
_FEW = 256
_KEY_SHIFT = 16


class Sampler:
    """Picks the tokens of one reply.

    Tell it the prompt once with `observe`; it remembers what it picks itself. The same seed, options and logits give
    the same tokens. Not safe to share between threads.

    Args:
        options: Reads temperature, top_k, top_p, min_p, repetition_penalty and seed.
    """

    def __init__(self, options: GenerateOptions) -> None:
        self._options = options
        self._random = np.random.Generator(np.random.PCG64(options.seed))
        self._seen = _SeenTokens()

    def observe(self, tokens: Sequence[int]) -> None:
        """Mark tokens as seen, for the repetition penalty; each counts once however often it comes.

        Raises:
            ValueError: A token is negative.
        """
        if self._options.repetition_penalty != 1:
            self._seen.add(tokens)

    def next(self, logits: _Floats) -> int:
        """Pick the next token and mark it as seen.

        Args:
            logits: float32 [vocab], left unchanged. Minus infinity forbids a token.

        Raises:
            GenerationError: The logits hold NaN or plus infinity, or forbid every token.
            ValueError: The shape is not [vocab], or an observed token is outside of it.
        """
        token = self._greedy(logits) if self._options.temperature == 0 else self._draw(logits)
        self.observe((token,))
        return token

    def distribution(self, logits: _Floats) -> tuple[_Ids, NDArray[np.float64]]:
        """Return what `next` draws from: the kept token ids, int64 [kept] ascending, and their probabilities.

        Greedy decoding keeps one token. Takes the arguments of `next` and raises the same errors.
        """
        if self._options.temperature == 0:
            return np.array([self._greedy(logits)]), np.ones(1)
        ids, weights = self._weigh(logits)
        exact = weights.astype(np.float64)
        return np.arange(len(weights)) if ids is None else ids, exact / exact.sum()

    def _greedy(self, logits: _Floats) -> int:
        scores = self._penalize(logits)
        # argmax takes the first of equals, and NaN for the greatest
        token = int(scores.argmax())
        _check_peak(float(scores[token]))
        return token

    def _draw(self, logits: _Floats) -> int:
        ids, weights = self._weigh(logits)
        place = _draw_place(weights, self._random.random())
        return place if ids is None else int(ids[place])

    def _weigh(self, logits: _Floats) -> tuple[_Ids | None, _Floats]:
        """Return the kept ids, ascending, or None for all, and their probabilities relative to the greatest one."""
        options = self._options
        scores = self._penalize(logits)
        peak = scores.max()
        _check_peak(float(peak))
        # subtracting before dividing keeps a tiny temperature from overflowing to plus infinity
        with np.errstate(over="ignore"):
            scores = (scores - peak) / np.float32(options.temperature)
        ids: _Ids | None = None
        if 0 < options.top_k < len(scores):
            ids = np.flatnonzero(scores >= _kth_largest(scores, options.top_k))
            scores = scores[ids]
        with np.errstate(under="ignore"):
            weights: _Floats = np.exp(scores)
        kept = _filter(weights, options.top_p, options.min_p)
        if kept is not None:
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        return ids, weights

    def _penalize(self, logits: _Floats) -> _Floats:
        """Return the logits with the repetition penalty: the array itself if there is none, else a copy."""
        scores: _Floats = np.asarray(logits, dtype=np.float32)
        if scores.ndim != 1 or not len(scores):
            raise ValueError(f"logits have shape {list(scores.shape)}, expected [vocab]")
        seen = self._seen.ids(len(scores))
        if len(seen):
            penalty = np.float32(self._options.repetition_penalty)
            scores = scores.copy()
            values = scores[seen]
            with np.errstate(over="ignore"):
                scores[seen] = np.where(values < 0, values * penalty, values / penalty)
        return scores


class _SeenTokens:
    """A growing set of token ids that is an array at any time, so that a step costs no conversion."""

    def __init__(self) -> None:
        self._is_seen = np.zeros(1024, dtype=np.bool_)
        self._ids = np.empty(1024, dtype=np.int64)
        self._count = 0

    def add(self, tokens: Sequence[int]) -> None:
        new: _Ids = np.unique(np.asarray(tokens, dtype=np.int64))
        if not len(new):
            return
        if new[0] < 0:
            raise ValueError(f"token {new[0]} is negative")
        if new[-1] >= len(self._is_seen):
            self._is_seen = np.concatenate([self._is_seen, np.zeros(int(new[-1]) + 1, dtype=np.bool_)])
        new = new[~self._is_seen[new]]
        end = self._count + len(new)
        if end > len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(end, dtype=np.int64)])
        self._is_seen[new] = True
        self._ids[self._count : end] = new
        self._count = end

    def ids(self, vocab_size: int) -> _Ids:
        if self._is_seen[vocab_size:].any():
            raise ValueError(f"an observed token is outside the {vocab_size} of the logits")
        return self._ids[: self._count]


def _check_peak(peak: float) -> None:
    # NaN anywhere makes the maximum NaN, so that one comparison covers the whole row
    if not np.isfinite(peak):
        what = "forbid every token" if peak == -np.inf else f"contain {peak}"
        raise GenerationError(
            f"the model's logits {what}",
            hint="the compiled model is broken on this device: convert it again, or try another backend or precision",
        )


def _draw_place(weights: _Floats, uniform: float) -> int:
    """Return the place that a number from [0, 1) falls on when the weights are laid end to end.

    Sums of rows first, then within one row, so that a whole vocabulary is not accumulated number by number.
    """
    whole = len(weights) // _ROW * _ROW
    rows = weights[:whole].reshape(-1, _ROW)
    sums = np.append(rows.sum(axis=1), weights[whole:].sum())
    row, rest = _locate(sums, uniform * float(sums.sum(dtype=np.float64)))
    place, _ = _locate(weights[row * _ROW : (row + 1) * _ROW], rest)
    return row * _ROW + place


def _locate(weights: _Floats, target: float) -> tuple[int, float]:
    """Return the place in which the running sum passes the target, never one of no weight, and what is left of it."""
    sums = weights.cumsum(dtype=np.float64)
    # rounding may put the target at or past the total: then the last place that has any weight
    place = min(int(sums.searchsorted(target, side="right")), int(sums.searchsorted(sums[-1])))
    return place, target - (float(sums[place - 1]) if place else 0.0)


def _filter(weights: _Floats, top_p: float, min_p: float) -> _Ids | None:
    """Return the places that top-p and then min-p keep, ascending, or None for all.

    Both keep the largest weights, so their order does not matter, and the min-p set, found without sorting, is all
    that top-p needs to look at. The largest weight is 1.
    """
    if top_p >= 1 and min_p <= 0:
        return None
    nucleus_mass = top_p * float(weights.sum(dtype=np.float64))
    kept: _Ids | None = np.flatnonzero(weights >= np.float32(min_p)) if min_p > 0 else None
    if top_p >= 1:
        return kept
    if kept is None:
        return _nucleus(weights, nucleus_mass)
    return kept[_nucleus(weights[kept], nucleus_mass)]


def _nucleus(weights: _Floats, mass: float) -> _Ids:
    """Return the places of the fewest largest weights that reach a mass, ascending; all if they do not.

    Of equal weights at the border the first ones are kept; transformers leaves that to its sort.
    """
    border, equals = _nucleus_border(weights, mass)
    kept = weights >= border
    places = np.flatnonzero(weights == border)
    kept[places[equals:]] = False
    return np.flatnonzero(kept)


def _nucleus_border(weights: _Floats, mass: float) -> tuple[np.float32, int]:
    """Return the smallest weight of the nucleus, and how many of those equal to it belong to it.

    Only part of the weights is sorted: the few largest if they reach the mass, as in most steps of a language model;
    else the weights that agree with the border in sign, exponent and the top of the mantissa, which a histogram finds.
    """
    above = 0.0
    group = weights
    if len(weights) > 4 * _FEW:
        group = weights[weights >= _kth_largest(weights, _FEW)]
        if float(group.sum(dtype=np.float64)) < mass:
            # the bits of floats that are not negative are ordered as the floats are
            keys = weights.view(np.int32) >> _KEY_SHIFT
            masses = np.bincount(keys, weights=weights)[::-1].cumsum()
            # after min-p the weights may not reach the mass: then the last bin that holds any
            place = min(int(masses.searchsorted(mass)), int(masses.searchsorted(masses[-1])))
            above = float(masses[place - 1]) if place else 0.0
            group = weights[keys == len(masses) - 1 - place]
    group = np.sort(group)[::-1]
    last = min(int((above + group.cumsum(dtype=np.float64)).searchsorted(mass)), len(group) - 1)
    border = group[last]
    return border, last + 1 - int(np.count_nonzero(group > border))


def _kth_largest(values: _Floats, k: int) -> np.float32:
    """Return the k-th largest value.

    The values are split into groups. The k-th largest of the groups' maxima has k values at or above it, so nothing
    below it can be among the k largest, and the partition runs over few values.
    """
    if k < _GROUPS and len(values) > 4 * _GROUPS:
        whole = len(values) // _GROUPS * _GROUPS
        maxima = np.concatenate([values[:whole].reshape(-1, _GROUPS).max(axis=0), values[whole:]])
        values = values[values >= np.partition(maxima, len(maxima) - k)[len(maxima) - k]]
    return np.float32(np.partition(values, len(values) - k)[len(values) - k])
