"""Palettes against the known error of the best scalar quantizer, and against what can't be improved on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.converters.palettes import fit_palettes
from edgekit.converters.quantize import dequantize, quantize
from edgekit.quant import WeightFormat

# Of the best scalar quantizer for normal values, as a part of their variance: Max, Quantizing for minimum distortion, 1960.
NORMAL_ERROR = {4: 0.1175, 16: 0.009497, 32: 0.002499}
# Of 60,000 samples, whose own best values differ from the distribution's.
SAMPLED = 0.03


@pytest.mark.parametrize("count", NORMAL_ERROR)
def test_normal_weights_lose_as_little_as_can_be(count: int) -> None:
    weights = np.random.default_rng(0).normal(0, 1, (1, 60_000)).astype(np.float32)
    numbers, tables = fit_palettes(weights, count, large_count_more=False)
    error = np.square(tables[0][numbers[0]] - weights[0]).mean()
    assert error == pytest.approx(NORMAL_ERROR[count], rel=SAMPLED)


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from([2, 4, 6]), seed=st.integers(0, 9999), columns=st.integers(1, 40), groups=st.integers(1, 3))
def test_each_weight_is_the_nearest_of_its_rows_values(bits: int, seed: int, columns: int, groups: int) -> None:
    weights = np.random.default_rng(seed).normal(0, 1, (16 * groups, columns)).astype(np.float32)
    form = WeightFormat(bits, 16, palette=True)
    rows = quantize(weights, form)
    assert rows.tables is not None
    assert rows.values.max() < 1 << bits
    assert rows.tables.shape == (groups, 1 << bits)
    found = dequantize(rows, form, columns)
    known = np.repeat(rows.tables, 16, axis=0) * rows.scales
    distances = np.abs(known[:, None, :] - weights[:, :, None])
    np.testing.assert_allclose(np.abs(found - weights), distances.min(-1), atol=1e-6, rtol=0)
    assert rows.squared_error == pytest.approx(float(np.square(found - weights).sum()), rel=1e-3, abs=1e-6)


def test_weights_of_few_values_are_kept() -> None:
    values = np.random.default_rng(0).normal(0, 1, 4).astype(np.float32)
    weights = np.tile(values, (16, 30)) * np.geomspace(1e-3, 1e3, 16, dtype=np.float32)[:, None]
    form = WeightFormat(4, 16, palette=True)
    # But for the table's own half precision.
    np.testing.assert_allclose(dequantize(quantize(weights, form), form, weights.shape[1]), weights, rtol=1e-3)


def test_large_weights_are_kept_better_than_small_ones() -> None:
    weights = (
        np.random.default_rng(0).standard_t(4, (1, 16 * 576)).astype(np.float32)
    )  # with tails, as language models have
    large = np.abs(weights) > 5 * np.sqrt(np.square(weights).mean())
    errors = []
    for large_count_more in (False, True):
        numbers, tables = fit_palettes(weights, 16, large_count_more=large_count_more)
        errors.append(np.linalg.norm((tables[0][numbers] - weights)[large]) / np.linalg.norm(weights[large]))
    assert errors[1] < 0.5 * errors[0]
