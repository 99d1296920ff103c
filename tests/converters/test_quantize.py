"""Block quantization: bounds on its error, edge cases, and what ONNX Runtime computes from the packed bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgekit.converters.packing import pack
from edgekit.converters.quantize import QuantizedRows, carry_over, dequantize, quantize
from edgekit.quant import BLOCK_SIZES, Rounding, WeightFormat
from edgekit.source import StoredBlocks

Floats = NDArray[np.float32]

FORMATS = [
    WeightFormat(bits, size, symmetric) for bits in (2, 4, 8) for size in BLOCK_SIZES for symmetric in (True, False)
]
# Sums of squares are added in float32 tile by tile and rounded differently in the test.
ERROR_TOLERANCE = 1e-3
# Scales are fitted with float32 sums of up to 256 terms.
ROUNDING = 2e-5
# ONNX Runtime multiplies in float32 in another order; the products here sum 256 terms of size up to 1.
MATMUL_TOLERANCE = 2e-5
QUICK = settings(max_examples=60, deadline=None, derandomize=True)
formats = st.sampled_from(FORMATS)


@st.composite
def matrices(draw: st.DrawFn) -> Floats:
    """Noise of varied scale and offset with some outliers; columns are often no whole number of blocks."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 300))
    generator = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    values = generator.normal(draw(st.sampled_from([0.0, 0.5, -3.0])), 1.0, (rows, columns))
    values[generator.random(values.shape) < 0.02] *= draw(st.sampled_from([1, 10]))
    scaled: Floats = (values * 10.0 ** draw(st.integers(-8, 8))).astype(np.float32)
    return scaled


def padded_blocks(weights: Floats, block_size: int) -> Floats:
    columns = -(-weights.shape[1] // block_size) * block_size
    padded = np.pad(weights, ((0, 0), (0, columns - weights.shape[1])))
    return padded.reshape(weights.shape[0], -1, block_size)


def squared(values: Floats) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))


def plain_rounding(weights: Floats, form: WeightFormat) -> Floats:
    """Round to nearest over each block's whole range: the textbook scheme with a zero point."""
    blocks, top = padded_blocks(weights, form.block_size).astype(np.float64), (1 << form.bits) - 1
    low, high = np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0)
    scale = np.maximum((high - low) / top, 1e-300)
    zero = np.rint(-low / scale)
    stored = ((np.rint(blocks / scale) + zero).clip(0, top) - zero) * scale
    rows: Floats = stored.reshape(weights.shape[0], -1)[:, : weights.shape[1]].astype(np.float32)
    return rows


def counted(weights: Floats, stored: Floats, block_size: int) -> float:
    """Squared error in which large weights count more, as the module says."""
    blocks = padded_blocks(weights, block_size).astype(np.float64)
    errors = np.square(padded_blocks(stored, block_size) - blocks)
    mean = np.maximum(np.square(blocks).mean(-1, keepdims=True), 1e-300)
    return float(np.sum(errors * (1 + np.square(blocks) / mean)))


def errors(weights: Floats, form: WeightFormat) -> tuple[float, float]:
    """Of this module and of plain rounding."""
    found = dequantize(quantize(weights, form), form, weights.shape[1])
    size = form.block_size
    return counted(weights, found, size), counted(weights, plain_rounding(weights, form), size)


@QUICK
@given(weights=matrices(), size=st.sampled_from(BLOCK_SIZES))
def test_error_in_8_bits_is_at_most_that_of_plain_rounding(weights: Floats, size: int) -> None:
    found, plain = errors(weights, WeightFormat(8, size, symmetric=False))
    assert found <= plain * (1 + ERROR_TOLERANCE) + ROUNDING**2 * squared(weights)


@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", ["normal", "laplace", "shifted"])
def test_error_in_4_bits_is_less_than_that_of_plain_rounding(shape: str, size: int) -> None:
    """Over many blocks: of one alone the whole range, which is not tried, may happen to fit best."""
    generator = np.random.default_rng(size)
    draw = generator.laplace if shape == "laplace" else generator.normal
    weights = draw(0.5 if shape == "shifted" else 0.0, 1.0, (64, 4 * size)).astype(np.float32)
    found, plain = errors(weights, WeightFormat(4, size, symmetric=False))
    assert found < plain


@QUICK
@given(weights=matrices(), form=formats)
def test_reported_error_is_the_actual_one(weights: Floats, form: WeightFormat) -> None:
    rows = quantize(weights, form)
    actual = squared(dequantize(rows, form, weights.shape[1]) - weights)
    assert rows.squared_error == pytest.approx(actual, rel=ERROR_TOLERANCE, abs=ROUNDING**2 * squared(weights))
    assert rows.squared_weight == pytest.approx(squared(weights), rel=ERROR_TOLERANCE)


@QUICK
@given(weights=matrices(), size=st.sampled_from(BLOCK_SIZES), symmetric=st.booleans())
def test_every_weight_is_within_half_a_step_in_8_bits(weights: Floats, size: int, symmetric: bool) -> None:
    form = WeightFormat(8, size, symmetric)
    difference = np.abs(dequantize(quantize(weights, form), form, weights.shape[1]) - weights)
    blocks = padded_blocks(weights, size)
    span = np.abs(blocks).max(-1) * 2 if symmetric else np.maximum(blocks.max(-1), 0) - np.minimum(blocks.min(-1), 0)
    # The end of the range that 8 bits have no value for, and the least-squares scale, cost up to another half step.
    step = span / 255
    assert (padded_blocks(difference, size).max(-1) <= step * 1.01).all()


@QUICK
@given(weights=matrices(), form=formats)
def test_sizes_are_those_of_the_format(weights: Floats, form: WeightFormat) -> None:
    rows = quantize(weights, form)
    assert (rows.zero_points is None) == form.symmetric
    assert sum(array.nbytes for array in constants_of(rows, form).values()) == form.size_bytes(*weights.shape)


@QUICK
@given(weights=matrices(), form=formats)
def test_padding_changes_nothing(weights: Floats, form: WeightFormat) -> None:
    columns = -(-weights.shape[1] // form.block_size) * form.block_size
    wide = np.pad(weights, ((0, 0), (0, columns - weights.shape[1])))
    np.testing.assert_array_equal(quantize(weights, form).values, quantize(wide, form).values)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_zeros_stay_zeros(form: WeightFormat) -> None:
    weights = np.zeros((3, 70), np.float32)
    rows = quantize(weights, form)
    np.testing.assert_array_equal(dequantize(rows, form, 70), weights)
    assert rows.squared_error == rows.squared_weight == 0
    assert np.isfinite(rows.scales).all()


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, -7e-5, 1e-20, 1e15])
def test_constant_blocks_are_kept(value: float, form: WeightFormat) -> None:
    weights = np.full((2, 2 * form.block_size), value, np.float32)
    np.testing.assert_allclose(dequantize(quantize(weights, form), form, weights.shape[1]), weights, rtol=ROUNDING)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("magnitude", [1e-20, 1e-12, 1e-5, 1.0, 1e10, 1e18])
def test_large_and_small_magnitudes_are_quantized_alike(magnitude: float, form: WeightFormat) -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, (2, 300))
    weights = (noise * magnitude).astype(np.float32)
    rows = quantize(weights, form)
    found = dequantize(rows, form, 300)
    assert np.isfinite(rows.scales).all()
    assert np.isfinite(found).all()
    step = 2 * magnitude / ((1 << form.bits) - 1)
    clipped = {2: 0.3, 4: 0.1, 8: 0}[form.bits] * 2 * magnitude  # the narrowest range that is tried
    assert np.abs(found.astype(np.float64) - weights).max() <= step + clipped


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-30, 1e-28])
def test_weights_too_small_to_matter_stay_as_small(magnitude: float, form: WeightFormat) -> None:
    weights = (np.random.default_rng(0).uniform(-1, 1, (2, 300)) * magnitude).astype(np.float32)
    fitted = 1.5 if form.bits == 2 else 1.1  # of a few levels, the end may lie beyond the largest weight
    assert np.abs(dequantize(quantize(weights, form), form, 300)).max() <= fitted * magnitude


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_carried_blocks_are_exact(bits: int, offset: bool) -> None:
    generator = np.random.default_rng(bits)
    values = generator.integers(0, 1 << bits, (5, 96), dtype=np.uint8)
    scales, offsets = generator.normal(size=(2, 5, 3)).astype(np.float16).astype(np.float32)
    form = WeightFormat(bits, 32, offset=offset)
    rows = carry_over(StoredBlocks(form, values, scales, offsets if offset else None))
    expected = (values.astype(np.float32) - (1 << (bits - 1))) * np.repeat(scales, 32, axis=1)
    if offset:
        expected += np.repeat(offsets, 32, axis=1)
    np.testing.assert_array_equal(dequantize(rows, form, 96), expected)
    assert rows.squared_error == 0
    assert rows.squared_weight == pytest.approx(squared(expected), rel=ERROR_TOLERANCE)


# ---- The same bytes in ONNX Runtime ----


def run(node: Any, constants: dict[str, NDArray[Any]], feeds: dict[str, NDArray[Any]]) -> Floats:
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    inputs = [helper.make_tensor_value_info(name, kinds[value.dtype], value.shape) for name, value in feeds.items()]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], "one", inputs, [output], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: Floats = session.run(["out"], feeds)[0]
    return found


def constants_of(rows: QuantizedRows, form: WeightFormat) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {"packed": pack(rows.values, form.bits), "scales": rows.scales}
    return arrays if rows.zero_points is None else arrays | {"zero_points": pack(rows.zero_points, form.bits)}


@pytest.mark.parametrize("columns", [256, 80, 17])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_matmul_in_onnx_runtime_uses_the_dequantized_weights(form: WeightFormat, columns: int) -> None:
    generator = np.random.default_rng(columns)
    weights = generator.uniform(-0.5, 1, (24, columns)).astype(np.float32)
    values = generator.uniform(-1, 1, (3, columns)).astype(np.float32)
    rows = quantize(weights, form)
    constants = constants_of(rows, form)
    node = helper.make_node(
        "MatMulNBits", ["x", *constants], ["out"], domain="com.microsoft",
        K=columns, N=24, bits=form.bits, block_size=form.block_size, accuracy_level=0,
    )  # fmt: skip
    expected = values.astype(np.float64) @ dequantize(rows, form, columns).astype(np.float64).T
    np.testing.assert_allclose(run(node, constants, {"x": values}), expected, atol=MATMUL_TOLERANCE, rtol=0)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_gather_in_onnx_runtime_gives_the_dequantized_rows(form: WeightFormat) -> None:
    weights = np.random.default_rng(3).normal(0.1, 1, (20, 512)).astype(np.float32)
    rows = quantize(weights, form)
    constants = constants_of(rows, form)
    constants["packed"] = constants["packed"].reshape(20, -1)
    chosen = np.array([[3, 0, 19, 3]], np.int64)
    inputs = ["packed", "chosen", *list(constants)[1:]]
    node = helper.make_node(
        "GatherBlockQuantized", inputs, ["out"], domain="com.microsoft",
        bits=form.bits, block_size=form.block_size, quantize_axis=1, gather_axis=0,
    )  # fmt: skip
    found = run(node, constants, {"chosen": chosen})
    np.testing.assert_array_equal(found[0], dequantize(rows, form, 512)[chosen[0]])


@QUICK
@given(matrices(), st.sampled_from([32, 64, 128]), st.sampled_from(["nearest", "hqq"]))
def test_scales_for_xnnpack_are_positive_bfloat16_numbers(weights: Floats, size: int, rounding: Rounding) -> None:
    form = WeightFormat(4, size, bfloat16_scales=True)
    rows = quantize(weights, form, rounding=rounding)
    assert rows.zero_points is None
    assert rows.scales.min() > 0
    assert not (rows.scales.view(np.uint32) & 0xFFFF).any()
    stored = dequantize(rows, form, weights.shape[1])
    assert np.isclose(squared(stored - weights), rows.squared_error, rtol=ERROR_TOLERANCE, atol=1e-30)
    if rounding == "hqq":  # makes another norm of the errors small
        return
    absmax = np.abs(padded_blocks(weights, size)).max(-1, keepdims=True) / 7
    plain = (np.rint(padded_blocks(weights, size) / np.maximum(absmax, 1e-30)) * absmax).reshape(len(weights), -1)
    # Less by a fifth over many blocks; in few it may be more, and each scale is wrong by up to 2^-9 of itself.
    unavoidable = counted(weights, np.zeros_like(weights), size) * 2.0**-16
    assert counted(weights, stored, size) <= counted(weights, plain[:, : weights.shape[1]], size) * 1.2 + unavoidable
