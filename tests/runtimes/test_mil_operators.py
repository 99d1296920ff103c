"""Each operator of the MIL evaluator against coremltools' own value inference, or PyTorch where that has none."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.quiet import quieted
from edgekit.runtimes.mil_constants import DECODERS
from edgekit.runtimes.mil_movers import MOVING
from edgekit.runtimes.mil_operators import COMPUTING
from edgekit.runtimes.mil_package import unpack
from edgekit.runtimes.mil_sizes import GROWING, check_size
from edgekit.runtimes.mil_types import TensorType, round_to_half

# Two orders of summing a few dozen float32 numbers.
RELATIVE, ABSOLUTE = 2e-5, 2e-6
pytestmark = pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools has no package for this machine")
Arguments = dict[str, Any]
KERNELS = {**COMPUTING, **MOVING}

random = np.random.default_rng(4)
FLOATS = random.standard_normal((2, 3, 4)).astype(np.float32)
OTHERS = random.standard_normal((3, 1)).astype(np.float32)
POSITIVE = np.abs(FLOATS) + np.float32(0.1)
INTEGERS = random.integers(-9, 9, (2, 3, 4)).astype(np.int32)
TRUTHS = FLOATS > 0


def ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def inferred(kind: str, arguments: Arguments) -> Any:
    """What coremltools computes of constants."""
    with quieted():  # it takes seconds to import, and is only when a test runs
        from coremltools import target
        from coremltools.converters.mil import Builder
        from coremltools.converters.mil.mil import Function
    with np.errstate(all="ignore"), Function({}, opset_version=target.iOS18):
        result = getattr(Builder, kind)(**deepcopy(arguments))  # it writes into them
    many = isinstance(result, tuple | list)
    return [each.val for each in result] if many else result.val


def tensors(arguments: Arguments) -> Arguments:
    import torch

    return {
        name: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }


BOTH = ("add", "sub", "mul", "maximum", "minimum", "equal", "not_equal")
ORDERS = ("greater", "greater_equal", "less", "less_equal")
UNARY = (
    "abs",
    "ceil",
    "floor",
    "round",
    "sign",
    "cos",
    "sin",
    "exp",
    "exp2",
    "square",
    "tanh",
    "erf",
    "relu",
    "sigmoid",
)
REDUCTIONS = ("sum", "mean", "max", "min", "prod", "sum_square", "l1_norm", "l2_norm", "log_sum_exp")

INFERRED: list[tuple[str, Arguments]] = [
    *((kind, {"x": FLOATS, "y": OTHERS}) for kind in (*BOTH, *ORDERS, "real_div")),
    *((kind, {"x": INTEGERS, "y": ints(3, -2, 5, 1)}) for kind in (*BOTH, *ORDERS, "floor_div", "mod")),
    ("pow", {"x": POSITIVE, "y": OTHERS}),
    *((kind, {"x": TRUTHS, "y": FLOATS > 0.5}) for kind in ("logical_and", "logical_or", "logical_xor")),
    ("logical_not", {"x": TRUTHS}),
    *((kind, {"x": FLOATS}) for kind in (*UNARY, "softplus")),
    ("sqrt", {"x": POSITIVE}),
    *((kind, {"x": POSITIVE, "epsilon": np.float32(0.01)}) for kind in ("log", "rsqrt", "inverse")),
    *((kind, {"x": POSITIVE}) for kind in ("log", "rsqrt", "inverse")),
    *((f"reduce_{kind}", {"x": FLOATS, "axes": ints(0, -1), "keep_dims": True}) for kind in REDUCTIONS),
    *((f"reduce_{kind}", {"x": FLOATS, "axes": ints(1), "keep_dims": False}) for kind in REDUCTIONS),
    *((f"reduce_arg{kind}", {"x": FLOATS, "axis": 1, "keep_dims": keep}) for kind in ("max", "min") for keep in (True, False)),
    ("linear", {"x": FLOATS, "weight": random.standard_normal((5, 4)).astype(np.float32)}),
    ("linear", {"x": FLOATS, "weight": random.standard_normal((2, 4)).astype(np.float32), "bias": FLOATS[0, 0, :2]}),
    ("matmul", {"x": FLOATS, "y": random.standard_normal((2, 4, 5)).astype(np.float32)}),
    ("matmul", {"x": FLOATS, "y": FLOATS, "transpose_x": False, "transpose_y": True}),
    ("matmul", {"x": FLOATS, "y": FLOATS, "transpose_x": True}),
    ("softmax", {"x": 30 * FLOATS, "axis": 1}),
    ("layer_norm", {"x": FLOATS, "axes": ints(-1), "gamma": FLOATS[0, 0], "beta": FLOATS[0, 1], "epsilon": np.float32(0.1)}),
    ("layer_norm", {"x": FLOATS, "axes": ints(1, 2)}),
    *(("gelu", {"x": FLOATS, "mode": mode}) for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")),
    *(("cast", {"x": 5 * FLOATS, "dtype": dtype}) for dtype in ("int32", "fp32", "bool")),
    ("cast", {"x": INTEGERS, "dtype": "fp32"}),
    *(("cumsum", {"x": FLOATS, "axis": 1, "exclusive": False, "reverse": reverse}) for reverse in (True, False)),
    ("band_part", {"x": FLOATS, "lower": 0, "upper": -1}),
    ("band_part", {"x": FLOATS, "lower": 1, "upper": 2}),
    ("fill", {"shape": ints(2, 3), "value": np.float32(1.5)}),
    ("range_1d", {"start": 2, "end": 11, "step": 3}),
    ("clip", {"x": FLOATS, "alpha": np.float32(-0.3), "beta": np.float32(0.4)}),
    ("reshape", {"x": FLOATS, "shape": ints(0, -1, 2)}),
    ("reshape", {"x": FLOATS, "shape": ints(4, 6)}),
    ("transpose", {"x": FLOATS, "perm": ints(2, 0, -2)}),
    ("squeeze", {"x": FLOATS[:, :1, :1], "axes": ints(1)}),
    ("squeeze", {"x": FLOATS[:, :1, :1]}),
    ("expand_dims", {"x": FLOATS, "axes": ints(0, -1)}),
    ("slice_by_size", {"x": FLOATS, "begin": ints(0, 1, 2), "size": ints(2, 1, -1)}),
    ("split", {"x": FLOATS, "num_splits": 2, "axis": -1}),
    ("split", {"x": FLOATS, "split_sizes": ints(1, 3), "axis": 2}),
    ("concat", {"values": [FLOATS, FLOATS[:1]], "axis": 0}),
    ("stack", {"values": [FLOATS, -FLOATS], "axis": 1}),
    ("tile", {"x": FLOATS, "reps": ints(2, 1, 3)}),
    ("gather", {"x": FLOATS, "indices": ints(2, 0, 1, 1), "axis": 1}),
    ("gather", {"x": FLOATS, "indices": np.array([[0, 3], [2, 2]], np.int32), "axis": -1}),
    ("gather", {"x": FLOATS, "indices": np.array([[0, 2], [1, 1]], np.int32), "axis": 1, "batch_dims": 1}),
    ("gather_along_axis", {"x": FLOATS, "indices": np.zeros((2, 2, 4), np.int32) + ints(0, 2, 1, 0), "axis": 1}),
    ("select", {"cond": TRUTHS, "a": FLOATS, "b": OTHERS * np.ones((2, 3, 4), np.float32)}),
    ("identity", {"x": FLOATS}),
    ("shape", {"x": FLOATS}),
    ("reverse", {"x": FLOATS, "axes": ints(0, 2)}),
    ("reverse", {"x": FLOATS}),
    ("pad", {"x": FLOATS, "pad": ints(1, 2, 0, 3), "mode": "constant", "constant_val": np.float32(7)}),
    ("pad", {"x": FLOATS, "pad": ints(1, 2), "mode": "reflect"}),
    ("pad", {"x": FLOATS, "pad": ints(1, 2), "mode": "replicate"}),
]  # fmt: skip


def torch_silu(x: Any) -> Any:
    return x * x.sigmoid()


def torch_l2_norm(x: Any, epsilon: Any) -> Any:
    return x / ((x**2).sum((-3, -2, -1), keepdim=True) + epsilon).sqrt()


def torch_attention(query: Any, key: Any, value: Any, attn_mask: Any) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(query, key, value, attn_mask)


def torch_exclusive_sums(x: Any, axis: int, exclusive: bool, reverse: bool) -> Any:
    return x.flip(axis).cumsum(axis).flip(axis) - x if reverse else x.cumsum(axis) - x


ATTENTION = {"query": FLOATS, "key": -FLOATS, "value": FLOATS + 1}
SUMS = {"x": FLOATS, "axis": 1, "exclusive": True}
BY_TORCH: list[tuple[str, Arguments, Callable[..., Any]]] = [
    ("silu", {"x": 20 * FLOATS}, torch_silu),
    ("cumsum", SUMS | {"reverse": False}, torch_exclusive_sums),
    ("cumsum", SUMS | {"reverse": True}, torch_exclusive_sums),
    ("l2_norm", {"x": FLOATS, "epsilon": np.float32(0.1)}, torch_l2_norm),
    ("scaled_dot_product_attention", {**ATTENTION, "attn_mask": np.tri(3, dtype=bool)}, torch_attention),
    ("scaled_dot_product_attention", {**ATTENTION, "attn_mask": FLOATS[0, :, :3].copy()}, torch_attention),
]


def computed(kind: str, arguments: Arguments) -> Any:
    held = {name: np.asarray(value) if isinstance(value, int | float) else value for name, value in arguments.items()}
    with np.errstate(all="ignore"):
        return KERNELS[kind](**held)


@pytest.mark.parametrize(("kind", "arguments"), INFERRED, ids=[kind for kind, _ in INFERRED])
def test_operator_computes_what_coremltools_infers(kind: str, arguments: Arguments) -> None:
    expected, found = inferred(kind, arguments), computed(kind, arguments)
    for wanted, got in zip(expected, found, strict=True) if isinstance(expected, list) else [(expected, found)]:
        assert np.shape(wanted) == np.shape(got)
        np.testing.assert_allclose(got, wanted, rtol=RELATIVE, atol=ABSOLUTE)


@pytest.mark.parametrize(("kind", "arguments", "reference"), BY_TORCH, ids=[case[0] for case in BY_TORCH])
def test_operator_computes_what_torch_does(kind: str, arguments: Arguments, reference: Callable[..., Any]) -> None:
    np.testing.assert_allclose(
        computed(kind, arguments), reference(**tensors(arguments)).numpy(), rtol=RELATIVE, atol=ABSOLUTE
    )


@pytest.mark.parametrize(("kind", "arguments"), [*INFERRED, *(case[:2] for case in BY_TORCH)])
def test_size_is_known_before_the_result_is(kind: str, arguments: Arguments) -> None:
    held = {name: np.asarray(value) if isinstance(value, int | float) else value for name, value in arguments.items()}
    found = computed(kind, arguments)
    if not isinstance(found, list):
        check_size(kind, held, TensorType("float32", np.shape(found)))
        if kind in GROWING:
            with pytest.raises(ValueError, match="not those of"):
                check_size(kind, held, TensorType("float32", (np.size(found) + 1,)))


def test_interleaved_parts_take_turns() -> None:
    together = computed("concat", {"values": [FLOATS, -FLOATS], "axis": 1, "interleave": True})
    assert together.shape == (2, 6, 4)
    np.testing.assert_array_equal(together[:, ::2], FLOATS)
    np.testing.assert_array_equal(together[:, 1::2], -FLOATS)


def test_every_operator_is_tested() -> None:
    tested = {kind for kind, _ in INFERRED} | {case[0] for case in BY_TORCH} | {"slice_by_index", "slice_update"}
    assert tested == KERNELS.keys()
    assert {kind for kind, _ in CONSTANTS} == DECODERS.keys()


@st.composite
def slices(draw: st.DrawFn) -> Arguments:
    """Arguments of `slice_by_index`, at least one element of a tensor."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    columns = []
    for length in lengths:
        begin = draw(st.integers(0, length - 1))
        end = draw(st.integers(begin + 1, length))
        minus = draw(st.booleans())
        masks = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
        columns.append((begin - length if minus else begin, end, draw(st.integers(1, 3)), *masks))
    values = np.arange(np.prod(lengths), dtype=np.float32).reshape(lengths)
    names = dict.fromkeys(("begin", "end", "stride"), "int32")
    names |= dict.fromkeys(("begin_mask", "end_mask", "squeeze_mask"), "bool")
    arrays = zip(names.items(), zip(*columns, strict=True), strict=True)
    return {"x": values} | {name: np.array(column, dtype) for (name, dtype), column in arrays}


@settings(deadline=None, max_examples=60)
@given(slices())
def test_slices_are_coremltools_ones(arguments: Arguments) -> None:
    expected = inferred("slice_by_index", arguments)
    np.testing.assert_array_equal(computed("slice_by_index", arguments), expected)
    update = np.asarray(-1 - np.asarray(expected, np.float32))
    if update.ndim:  # coremltools takes no scalar
        wanted = inferred("slice_update", arguments | {"update": update})
        np.testing.assert_array_equal(computed("slice_update", arguments | {"update": update}), wanted)


def test_update_of_another_shape_is_refused() -> None:
    place = {"begin": ints(0, 2, 0), "end": ints(2, 4, 4)}  # beyond the length of 3
    with pytest.raises(ValueError, match="an update of shape"):
        computed("slice_update", {"x": FLOATS, "update": FLOATS[:, :2]} | place)


@pytest.mark.parametrize("indices", [ints(0, 4), ints(-1)])
def test_index_beyond_the_axis_is_refused(indices: NDArray[np.int32]) -> None:
    with pytest.raises(IndexError):
        computed("gather", {"x": FLOATS, "indices": indices, "axis": 2})


@settings(max_examples=300)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_rounding_is_numpys(values: list[float]) -> None:
    array = np.array(values, np.float32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(round_to_half(array), array.astype(np.float16).astype(np.float32))


def test_rounding_covers_every_half_and_what_lies_between() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    between = ((finite[:-1] + finite[1:]) / 2).astype(np.float32)
    above, below = (np.nextafter(between, np.float32(far), dtype=np.float32) for far in (9e9, -9e9))
    for values in (finite, between, above, below):
        np.testing.assert_array_equal(round_to_half(values), values.astype(np.float16).astype(np.float32))


def quantized(dtype: type[np.generic], low: int, high: int, shape: tuple[int, ...]) -> NDArray[Any]:
    return random.integers(low, high, shape).astype(dtype)


def halves(*shape: int) -> NDArray[np.float32]:
    return random.standard_normal(shape).astype(np.float16).astype(np.float32)


ZERO, SQUARE = np.zeros((), np.int8), np.array([3, 3], np.uint32)
PAIRS = quantized(np.uint8, 0, 4, (4, 6))
NIBBLES, BYTES = quantized(np.int8, -8, 8, (4, 6)), quantized(np.uint8, 0, 256, (4, 6))
CONSTANTS: list[tuple[str, Arguments]] = [
    ("constexpr_blockwise_shift_scale", {"data": NIBBLES, "scale": halves(4, 2)}),
    ("constexpr_blockwise_shift_scale", {"data": NIBBLES, "scale": halves(1, 1), "offset": halves(1, 1)}),
    ("constexpr_blockwise_shift_scale", {"data": BYTES, "scale": halves(2, 3), "offset": quantized(np.uint8, 0, 256, (2, 3))}),
    ("constexpr_lut_to_dense", {"indices": PAIRS, "lut": halves(2, 3, 4, 1)}),
    ("constexpr_lut_to_dense", {"indices": PAIRS, "lut": halves(2, 1, 4, 3), "vector_axis": np.int32(0)}),
    ("constexpr_lut_to_dense", {"indices": PAIRS, "lut": halves(1, 1, 4, 2), "vector_axis": np.int32(-1)}),
    ("constexpr_lut_to_dense", {"indices": quantized(np.uint8, 0, 256, (5,)), "lut": halves(16), "shape": SQUARE}),
    ("constexpr_affine_dequantize", {"quantized_data": NIBBLES, "scale": halves(4), "zero_point": ZERO, "axis": np.int32(0)}),
    ("constexpr_affine_dequantize", {"quantized_data": BYTES, "scale": halves(6), "zero_point": BYTES[0], "axis": np.int32(-1)}),
    ("constexpr_sparse_to_dense", {"nonzero_data": halves(5), "mask": np.array([[1, 0, 1], [1, 1, 1]], np.uint8)}),
    ("constexpr_sparse_to_dense", {"nonzero_data": halves(5), "mask": np.array([0b10111, 1], np.uint8), "shape": SQUARE}),
    ("constexpr_cast", {"source_val": halves(3)}),
]  # fmt: skip


def decompressed(kind: str, inputs: Arguments) -> Any:
    """What coremltools decodes, in float16 as it is there."""
    with quieted():
        from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops
        from coremltools.converters.mil.mil.ops.defs.iOS18 import compression
        from coremltools.optimize import _utils
    if kind == "constexpr_cast":
        return inputs["source_val"]
    stored = {key: value.astype(np.float16) if value.dtype == np.float32 else value for key, value in inputs.items()}
    if kind == "constexpr_blockwise_shift_scale":
        return compression.constexpr_blockwise_shift_scale.decompress(
            stored["data"], stored["scale"], stored.get("offset")
        )
    if kind == "constexpr_affine_dequantize":
        return constexpr_ops.constexpr_affine_dequantize.decompress(
            stored["quantized_data"], stored["zero_point"], stored["scale"], int(stored["axis"])
        )
    if kind == "constexpr_lut_to_dense" and "shape" not in stored:
        axis = stored.get("vector_axis")
        return _utils.lut_to_dense(stored["indices"], stored["lut"], None if axis is None else int(axis))
    if "shape" not in stored:
        return _utils.sparse_to_dense(stored["nonzero_data"], stored["mask"])
    return getattr(constexpr_ops, kind).decompress(**stored)


@pytest.mark.parametrize(("kind", "inputs"), CONSTANTS, ids=[kind for kind, _ in CONSTANTS])
def test_constant_is_what_coremltools_decodes(kind: str, inputs: Arguments) -> None:
    expected = decompressed(kind, inputs)
    found = DECODERS[kind](inputs, TensorType("float16", expected.shape))
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_blocks_of_any_shape_are_decoded(data: st.DataObject) -> None:
    groups = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    blocks = data.draw(st.lists(st.integers(1, 5), min_size=len(groups), max_size=len(groups)))
    values = quantized(np.int8, -128, 128, tuple(a * b for a, b in zip(groups, blocks, strict=True)))
    inputs = {"data": values, "scale": halves(*groups)}
    if data.draw(st.booleans()):
        inputs["offset"] = quantized(np.int8, -128, 128, tuple(groups))
    test_constant_is_what_coremltools_decodes("constexpr_blockwise_shift_scale", inputs)


@settings(max_examples=100)
@given(
    st.sampled_from([("uint1", 1), ("uint2", 2), ("uint3", 3), ("uint4", 4), ("uint6", 6), ("int4", 4)]),
    st.integers(0, 40),
)
def test_elements_are_unpacked_as_coremltools_packs_them(stored: tuple[str, int], count: int) -> None:
    with quieted():
        from coremltools.optimize import _utils
    name, bits = stored
    low = -8 if name == "int4" else 0
    values = quantized(np.int8 if low else np.uint8, low, low + 2**bits, (count,))
    packed = _utils.pack_elements_into_bits(values, bits) if count else np.zeros(0, np.uint8)
    np.testing.assert_array_equal(unpack(packed, TensorType(name, (count,))), values)
