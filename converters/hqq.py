"""HQQ: scales and zero points under a norm that large errors weigh less on than in least squares, found without any data.

Half-quadratic splitting: the error of each weight is split into a sparse part, found by shrinkage, and a rest that scale and
zero point are fitted to by least squares, in turns (H. Badri, A. Shaji, "Half-Quadratic Quantization of Large Machine Learning
Models", mobiusml.github.io/hqq_blog, 2023: the norm, the shrinkage and their constants). There the zero point is a float and
the scale stays; runtimes compute fast with integer zero points only, so here the zero point is rounded and the scale fitted to
it in closed form (as torchao's scale-only variant of HQQ does).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekit.quant import WeightFormat

__all__ = ["fit_hqq", "shrink"]

NORM = 0.7  # the sum of |error|^NORM is what is made small
SHARPNESS, GROWTH = 10.0, 1.01  # of the shrinkage, relative to the step between two values
TURNS = 10
_SMALLEST = np.float32(1e-30)

Floats = NDArray[np.float32]


def fit_hqq(weights: Floats, form: WeightFormat, scale: Floats, zero_point: Floats) -> tuple[Floats, Floats]:
    """Scale and zero point of each block, from a first guess.

    Args:
        weights: float32 [block_size, blocks].
        form: A block format.
        scale, zero_point: float32 [blocks].

    Returns:
        Those of the turn with the least norm of the error, and none that is worse than the guess.
    """
    top, unit = np.float32((1 << form.bits) - 1), np.abs(scale)
    best_scale, best_zero_point = scale.copy(), zero_point.copy()
    levels = _levels(weights, scale, zero_point, top)
    least = _norm(_errors(weights, levels, scale, unit))
    sharpness = SHARPNESS
    for _ in range(TURNS):
        rest = weights - shrink(_errors(weights, levels, scale, scale), sharpness) * scale
        if not form.symmetric:
            shift = np.rint((rest / scale - levels).mean(axis=0))
            zero_point = np.clip(zero_point - shift, 0, top)
            levels = _levels(rest, scale, zero_point, top)
        energy = np.maximum(np.square(levels).sum(axis=0), _SMALLEST)
        fitted: Floats = (levels * rest).sum(axis=0) / energy
        scale = np.where(np.abs(fitted) < _SMALLEST, scale, fitted)
        levels = _levels(weights, scale, zero_point, top)
        error = _norm(_errors(weights, levels, scale, unit))
        better = error < least
        if not better.any():
            break
        for best, found in ((least, error), (best_scale, scale), (best_zero_point, zero_point)):
            np.copyto(best, found, where=better)
        sharpness *= GROWTH
    return best_scale, best_zero_point


def shrink(errors: Floats, sharpness: float) -> Floats:
    """The sparse part of errors (in steps): the generalised soft threshold of the norm, zero where an error is small."""
    size = np.abs(errors)
    kept = size - np.maximum(size, np.float32(1e-6)) ** np.float32(NORM - 1) / np.float32(sharpness)
    sparse: Floats = np.copysign(np.maximum(kept, 0), errors)
    return sparse


def _levels(weights: Floats, scale: Floats, zero_point: Floats, top: np.float32) -> Floats:
    """Rounded weights less their zero point."""
    levels: Floats = np.rint(weights / scale)
    np.maximum(levels, -zero_point, out=levels)
    np.minimum(levels, top - zero_point, out=levels)
    return levels


def _errors(weights: Floats, levels: Floats, scale: Floats, unit: Floats) -> Floats:
    errors: Floats = levels * scale
    np.subtract(weights, errors, out=errors)
    np.divide(errors, unit, out=errors)
    return errors


def _norm(errors: Floats) -> Floats:
    norms: Floats = (np.abs(errors) ** np.float32(NORM)).sum(axis=0)
    return norms
