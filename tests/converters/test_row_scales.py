"""Row-scaled weights and encodings: bounds on every error, and the parts that NPUs ask for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.converters.qdq_graph import Encoding
from edgekit.converters.row_scales import LARGEST_BLOCK_SCALE, quantize_rows
from edgekit.quant import WeightFormat

FORMATS = {8: WeightFormat(8, row_scaled=True), 4: WeightFormat(4, 32, row_scaled=True)}
# Relative error of normal weights, over the whole matrix, of which one row may be nearly all: 8 bits of a row of 256 (whose
# largest is up to 6 deviations: 6 / 127 / sqrt(12)), and blocks of 32 with 4 bits, whose
# scales are whole numbers up to 15.
LARGEST_ERROR = {8: 0.014, 4: 0.12}


@pytest.mark.parametrize("bits", [8, 4])
@settings(deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0, 3))
def test_rows_stand_for_the_weights(bits: int, seed: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    weights = (random.normal(size=(6, 256)) * np.exp(spread * random.normal(size=(6, 1)))).astype(np.float32)
    rows = quantize_rows(weights, FORMATS[bits])
    scales = np.ones((6, 8)) if rows.block_scales is None else rows.block_scales
    found = rows.values.reshape(6, 8, 32) * scales[..., None] * rows.row_scales[:, None, None]
    error = np.square(found.reshape(6, 256) - weights).sum()
    assert np.isclose(rows.squared_error, error, rtol=1e-3)
    assert np.sqrt(error / np.square(weights).sum()) <= LARGEST_ERROR[bits]
    assert (np.abs(rows.values) <= 1 << (bits - 1)).all()
    assert (rows.row_scales > 0).all()


@settings(deadline=None)
@given(seed=st.integers(0, 10_000))
def test_block_scales_are_small_whole_numbers(seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = (random.normal(size=(4, 128)) * np.exp(4 * random.normal(size=(4, 128)))).astype(np.float32)
    rows = quantize_rows(weights, FORMATS[4])
    assert rows.block_scales is not None
    assert rows.block_scales.dtype == np.uint8
    assert rows.block_scales.shape == (4, 4)
    assert rows.block_scales.min() >= 1
    assert (rows.block_scales.max(1) == LARGEST_BLOCK_SCALE).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_stay_zeros(bits: int) -> None:
    rows = quantize_rows(np.zeros((2, 64), np.float32), FORMATS[bits])
    assert not rows.values.any()
    assert rows.squared_error == 0
    assert np.isfinite(rows.row_scales).all()


@pytest.mark.parametrize(("form", "expected"), [(FORMATS[8], 5 * (64 + 4)), (FORMATS[4], 5 * (32 + 2 + 4))])
def test_plan_knows_the_stored_size(form: WeightFormat, expected: int) -> None:
    assert form.size_bytes(5, 64) == expected
    rows = quantize_rows(np.ones((5, 64), np.float32), form)
    blocks = 0 if rows.block_scales is None else rows.block_scales.nbytes
    assert rows.values.size * form.bits // 8 + rows.row_scales.nbytes + blocks == expected


@settings(deadline=None)
@given(low=st.floats(-1e6, 1e6), high=st.floats(-1e6, 1e6), bits=st.sampled_from([8, 16]), centred=st.booleans())
def test_encoding_keeps_zero_and_rounds_to_half_a_step(low: float, high: float, bits: int, centred: bool) -> None:
    low, high = min(low, high), max(low, high)
    encoding = (Encoding.centred if centred else Encoding.of_range)(low, high, bits)
    assert encoding.zero_point == 2 ** (bits - 1) or not centred
    assert encoding.encode(np.zeros(1, np.float32))[0] == encoding.zero_point
    values = np.linspace(low, high, 50).astype(np.float32)
    decoded = (encoding.encode(values).astype(np.float64) - encoding.zero_point) * encoding.scale
    # The zero point is rounded too: an end of the range may lie half a step outside.
    assert np.abs(decoded - values).max() <= encoding.scale * 1.01 + 1e-6 * max(abs(low), abs(high))
    beyond = encoding.encode(np.array([-2e6, 2e6], np.float32))
    assert list(beyond) == [0, 2**bits - 1] or encoding.scale > 1e6 / 2**bits
