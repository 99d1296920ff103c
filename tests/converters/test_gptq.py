"""GPTQ against the textbook: one row at a time, the whole inverse updated after each column, in float64."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.converters.gptq import DAMPING, SHRINKAGE, make_guide, quantize_guided
from edgekit.converters.quantize import dequantize, quantize
from edgekit.quant import WeightFormat

Floats = NDArray[np.float32]
Moments = NDArray[np.float64]
# Weights that lie this close to the border of two values may be rounded either way by float32 and float64.
SHARE_OF_TIES = 0.01
FORMATS = [
    WeightFormat(bits, size, symmetric) for bits in (2, 4, 8) for size in (16, 32) for symmetric in (True, False)
]


def problem(seed: int, rows: int, columns: int, samples: int = 400) -> tuple[Floats, Moments]:
    """Weights, and second moments of inputs that are correlated and of very different sizes, as a decoder's are."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(columns, columns)) * generator.random(columns) ** 3
    inputs = generator.normal(size=(samples, columns)) @ mixing
    return generator.normal(size=(rows, columns)).astype(np.float32), inputs.T @ inputs


def loss(weights: Floats, stored: Floats, moments: Moments) -> float:
    """Squared error of the products with the inputs."""
    difference = stored.astype(np.float64) - weights
    return float(np.einsum("ij,jk,ik->", difference, moments, difference))


def textbook(weights: Floats, scales: Floats, zero_points: Floats, form: WeightFormat, moments: Moments) -> Floats:
    """Optimal brain quantization in a fixed order (arXiv:2210.17323, equations 2 and 3)."""
    columns = weights.shape[1]
    order = np.argsort(-moments.diagonal(), kind="stable")
    shrunk = (1 - SHRINKAGE) * moments + SHRINKAGE * np.diag(moments.diagonal())
    damped = shrunk / moments.diagonal().mean() + DAMPING * np.eye(columns)
    stored = np.empty(weights.shape)
    for row in range(len(weights)):
        weight, left, inverse = weights[row].astype(np.float64), list(order), np.linalg.inv(damped)
        while left:
            column = left.pop(0)
            scale, zero = (array[row, column // form.block_size] for array in (scales, zero_points))
            value = np.clip(np.rint(weight[column] / scale + zero), 0, 2**form.bits - 1)
            stored[row, column] = (value - zero) * scale
            step = (weight[column] - stored[row, column]) / inverse[column, column]
            weight = weight - step * inverse[column]
            inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
            inverse[column, column] = 1  # gone: its row and column are zero from here on
    return stored.astype(np.float32)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_values_are_those_of_the_textbook(form: WeightFormat) -> None:
    weights, moments = problem(1, 6, 80)
    rows = quantize_guided(weights, form, make_guide(moments))
    found = dequantize(rows, form, 80)
    zeros = np.full(rows.scales.shape, 1 << (form.bits - 1), np.float32)
    if rows.zero_points is not None:
        zeros = rows.zero_points.astype(np.float32)
    expected = textbook(weights, rows.scales, zeros, form, moments)
    differing = np.abs(found - expected) > np.abs(np.repeat(rows.scales, form.block_size, axis=1)[:, :80]) * 0.5
    assert differing.mean() <= SHARE_OF_TIES


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 32), columns=st.integers(1, 200), form=st.sampled_from(FORMATS))
def test_reported_error_is_the_actual_one(seed: int, columns: int, form: WeightFormat) -> None:
    weights, moments = problem(seed, 3, columns)
    rows = quantize_guided(weights, form, make_guide(moments))
    actual = float(np.square(dequantize(rows, form, columns) - weights, dtype=np.float64).sum())
    assert rows.squared_error == pytest.approx(actual, rel=1e-3)  # float32 sums
    assert rows.values.shape == (3, -(-columns // form.block_size), form.block_size)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [128, 100])
def test_products_change_less_than_by_rounding_to_nearest(form: WeightFormat, columns: int) -> None:
    weights, moments = problem(2, 64, columns)
    guided = dequantize(quantize_guided(weights, form, make_guide(moments)), form, columns)
    nearest = dequantize(quantize(weights, form), form, columns)
    assert loss(weights, guided, moments) < 0.7 * loss(weights, nearest, moments)


def test_few_inputs_do_not_make_products_with_others_worse_than_rounding_to_nearest() -> None:
    # As in a decoder: every column a little like the others, twice as many inputs as columns to learn from.
    generator, columns, form = np.random.default_rng(9), 256, WeightFormat(4, 64, symmetric=False)
    common = generator.normal(size=(32, columns)) * 0.1
    inputs = generator.normal(size=(9000, columns)) + generator.normal(size=(9000, 32)) @ common
    learnt, unseen = (part.T @ part for part in (inputs[: 2 * columns], inputs[2 * columns :]))
    weights = generator.normal(size=(64, columns)).astype(np.float32)
    guided = dequantize(quantize_guided(weights, form, make_guide(learnt)), form, columns)
    nearest = dequantize(quantize(weights, form), form, columns)
    assert loss(weights, guided, unseen) < loss(weights, nearest, unseen)  # 0.91 of it; without shrinkage 1.16


def test_inputs_that_do_not_correlate_leave_rounding_to_nearest() -> None:
    form, weights = WeightFormat(4, 32, symmetric=False), problem(3, 16, 64)[0]
    rows = quantize_guided(weights, form, make_guide(np.eye(64)))
    stored, scales = dequantize(rows, form, 64), np.repeat(np.abs(rows.scales), 32, axis=1)
    inside = np.abs(stored - weights) <= scales * 0.5001
    clipped = np.isin(np.abs(stored / scales).round(), [0, 15])  # at an end of the range, or at its zero point
    assert (inside | clipped | (np.abs(stored - weights) <= 2 * scales)).all()
    assert inside.mean() > 0.97


def test_inputs_that_never_occur_are_no_division_by_zero() -> None:
    moments = np.zeros((64, 64))
    moments[3, 3] = 5.0
    weights = problem(4, 4, 64)[0]
    form = WeightFormat(4, 32, symmetric=False)
    for seen in (moments, np.zeros((64, 64))):
        stored = dequantize(quantize_guided(weights, form, make_guide(seen)), form, 64)
        assert np.isfinite(stored).all()
        assert np.abs(stored - weights).max() < 1


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_columns_that_no_text_lit_up_are_rounded_to_nearest(form: WeightFormat) -> None:
    generator = np.random.default_rng(8)
    inputs = generator.normal(size=(600, 256))
    inputs[:, 64:128] = 0
    weights = generator.normal(scale=0.02, size=(16, 256)).astype(np.float32)
    stored = dequantize(quantize_guided(weights, form, make_guide(inputs.T @ inputs)), form, 256)
    unseen, difference = weights[:, 64:128], (stored - weights)[:, 64:128]
    assert np.linalg.norm(difference) < (0.6 if form.bits == 2 else 0.3) * np.linalg.norm(unseen)


def test_chunks_of_rows_are_rounded_as_the_whole() -> None:
    weights, moments = problem(5, 40, 96)
    form, guide = WeightFormat(4, 32), make_guide(moments)
    whole = quantize_guided(weights, form, guide).values
    parts = [quantize_guided(weights[start : start + 13], form, guide).values for start in range(0, 40, 13)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_guide_is_made_with_two_copies_of_the_moments() -> None:
    moments = problem(6, 1, 512)[1]
    tracemalloc.start()
    try:
        make_guide(moments)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.2 * moments.nbytes
