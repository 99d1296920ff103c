"""HQQ against its definition: one block at a time, in float64, with the sparse part and the rest found in turns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.converters.hqq import GROWTH, NORM, SHARPNESS, TURNS, fit_hqq, shrink
from edgekit.converters.quantize import dequantize, quantize
from edgekit.quant import WeightFormat

Floats = NDArray[np.float32]
FORMATS = [WeightFormat(bits, 32, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]
# A weight within a float32 error of the border of two values may fall to either side and then leads another way.
SHARE_OF_TIES = 0.05


def norm(weights: Floats, scale: float, zero_point: float, bits: int) -> float:
    values = np.clip(np.rint(weights / scale) + zero_point, 0, 2**bits - 1)
    return float((np.abs(weights - scale * (values - zero_point)) ** NORM).sum())


def reference(block: Floats, form: WeightFormat, scale: float, zero_point: float) -> tuple[float, float]:
    """The alternation as the source describes it, on one block."""
    best, least, sharpness = (scale, zero_point), norm(block, scale, zero_point, form.bits), SHARPNESS
    values = np.clip(np.rint(block / scale) + zero_point, 0, 2**form.bits - 1)
    for _ in range(TURNS):
        error = (block - scale * (values - zero_point)) / scale
        size = np.maximum(np.abs(error), 1e-6)
        sparse = np.sign(error) * np.maximum(size - size ** (NORM - 1) / sharpness, 0) * scale
        if not form.symmetric:
            zero_point = float(
                np.clip(
                    zero_point - np.rint(np.mean((block - sparse) / scale - values + zero_point)), 0, 2**form.bits - 1
                )
            )
            values = np.clip(np.rint((block - sparse) / scale) + zero_point, 0, 2**form.bits - 1)
        scale = float(np.dot(values - zero_point, block - sparse) / np.square(values - zero_point).sum())
        values = np.clip(np.rint(block / scale) + zero_point, 0, 2**form.bits - 1)
        found = norm(block, scale, zero_point, form.bits)
        if found < least:
            best, least = (scale, zero_point), found
        sharpness *= GROWTH
    return best


def guess(weights: Floats, form: WeightFormat) -> tuple[Floats, Floats]:
    """Scale and zero point of the whole range."""
    low, high = np.minimum(weights.min(axis=0), 0), np.maximum(weights.max(axis=0), 0)
    if form.symmetric:
        scale = np.maximum(-low, high) / 2 ** (form.bits - 1)
        return scale, np.full_like(scale, 2 ** (form.bits - 1))
    scale = (high - low) / (2**form.bits - 1)
    return scale, np.rint(-low / scale)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_blocks_are_fitted_as_by_the_definition(form: WeightFormat) -> None:
    weights = np.random.default_rng(form.bits).laplace(0.1, 1, (32, 200)).astype(np.float32)
    scales, zero_points = guess(weights, form)
    found = np.stack(fit_hqq(weights, form, scales, zero_points))
    expected = np.array(
        [reference(weights[:, b].astype(np.float64), form, scales[b], zero_points[b]) for b in range(200)]
    ).T
    equal = np.isclose(found, expected, rtol=1e-4).all(axis=0)
    assert equal.mean() >= 1 - SHARE_OF_TIES


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 32), form=st.sampled_from(FORMATS), magnitude=st.sampled_from([1e-6, 1.0, 1e6]))
def test_no_block_is_worse_than_the_guess(seed: int, form: WeightFormat, magnitude: float) -> None:
    weights = (np.random.default_rng(seed).laplace(0.1, 1, (32, 20)) * magnitude).astype(np.float32)
    scales, zero_points = guess(weights, form)
    fitted = fit_hqq(weights, form, scales, zero_points)
    for block in range(20):
        before = norm(weights[:, block], scales[block], zero_points[block], form.bits)
        after = norm(weights[:, block], fitted[0][block], fitted[1][block], form.bits)
        assert after <= before * (1 + 1e-4)  # float32 sums


def test_shrinkage_keeps_small_errors_out_of_the_sparse_part() -> None:
    errors = np.array([0.0, 0.1, -0.1, 0.5, -2.0], np.float32)
    expected = [0, 0, 0, 0.5 - 0.5 ** (NORM - 1) / 10, -(2 - 2 ** (NORM - 1) / 10)]
    np.testing.assert_allclose(shrink(errors, 10.0), expected, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_outliers_cost_the_other_weights_less_than_by_least_squares(symmetric: bool) -> None:
    generator, form = np.random.default_rng(5), WeightFormat(4, 64, symmetric)
    weights = generator.normal(size=(64, 256)).astype(np.float32)
    outliers = generator.random(weights.shape) < 0.02
    weights[outliers] *= 6
    medians = [
        np.median(np.abs(dequantize(quantize(weights, form, rounding=rounding), form, 256) - weights)[~outliers])
        for rounding in ("nearest", "hqq")
    ]
    assert medians[1] < medians[0]


def test_weights_that_are_all_equal_or_zero_stay() -> None:
    for value in (0.0, 0.3, -1.0):
        weights = np.full((2, 64), value, np.float32)
        for form in FORMATS:
            found = dequantize(quantize(weights, form, rounding="hqq"), form, 64)
            np.testing.assert_allclose(found, weights, rtol=1e-5)
