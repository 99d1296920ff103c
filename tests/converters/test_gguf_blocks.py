"""GGUF's blocks taken apart and put into a program, against the `gguf` package's dequantization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto

from edgekit.converters.gguf_blocks import BLOCK_TYPES
from edgekit.converters.onnx_graph import GraphBuilder, Region
from edgekit.converters.onnx_weights import StoredWeights
from edgekit.converters.packing import pack
from edgekit.converters.quantize import carry_over, dequantize
from edgekit.converters.to_onnx import export
from edgekit.plan import WeightPlan, make_plan
from edgekit.runtimes.backend_onnxruntime import OnnxRuntimeBackend
from edgekit.source import open_source
from edgekit.target import RuntimeOptions, load_target

Floats = NDArray[np.float32]
BlockMaker = Callable[..., NDArray[np.uint8]]

ROWS, COLUMNS = 24, 512
# The program adds an offset that is rounded to a float32 to a product that is exact: each may be off by half a unit in the
# last place of the block's largest weight.
LAST_PLACE = float(np.finfo(np.float32).eps)
# As parts of the sum of all products' sizes: float32 sums in another order; and with inputs that MatMulNBits rounds to 8 bits
# a block, each by at most 1/254 of the block's largest.
SUM_TOLERANCE, INT8_TOLERANCE = 1e-6, 0.01
LOGITS_TOLERANCE = 2e-4  # float32 in another order, through three layers
FEW = settings(max_examples=40, deadline=None, derandomize=True)


def reference(kind: str, stored: NDArray[np.uint8]) -> Floats:
    with np.errstate(all="ignore"):
        found: Floats = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
    return found


def taken_apart(kind: str, stored: NDArray[np.uint8]) -> Any:
    size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    return BLOCK_TYPES[kind].read(stored.reshape(len(stored), -1, size_bytes))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_stand_for_the_dequantized_weights_bit_for_bit(kind: str, make_blocks: BlockMaker) -> None:
    stored = make_blocks(gguf.GGMLQuantizationType[kind], ROWS, COLUMNS)
    blocks = taken_apart(kind, stored)
    assert blocks.values.max() < 1 << blocks.format.bits
    assert (blocks.offsets is not None) == blocks.format.offset
    np.testing.assert_array_equal(dequantize(carry_over(blocks), blocks.format, COLUMNS), reference(kind, stored))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@FEW
@given(seed=st.integers(0, 2**32))
def test_any_bytes_stand_for_the_dequantized_weights(kind: str, seed: int) -> None:
    size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    stored = np.random.default_rng(seed).integers(0, 256, (8, size_bytes), dtype=np.uint8)
    expected, blocks = reference(kind, stored), taken_apart(kind, stored)
    with np.errstate(all="ignore"):
        found = dequantize(carry_over(blocks), blocks.format, expected.shape[1])
    size = blocks.format.block_size
    finite = np.isfinite(expected).reshape(8, -1, size).all(-1).repeat(size, axis=1)
    if not blocks.format.offset:
        np.testing.assert_array_equal(found[finite], expected[finite])
    largest = np.abs(expected).reshape(8, -1, size).max(-1).repeat(size, axis=1)
    assert (np.abs(found - expected) <= LAST_PLACE * largest)[finite].all()
    assert not np.isfinite(found)[~np.isfinite(expected)].any(), "what is damaged must not look sound"


# ---- In ONNX Runtime ----


def write_region(path: Path, region: Region | None, values: NDArray[Any] | None) -> None:
    if region and values is not None:
        with path.open("r+b") as file:
            file.seek(region.offset)
            file.write(np.ascontiguousarray(values).tobytes())


def run(folder: Path, kinds: dict[str, NDArray[np.uint8]], x: Floats, accuracy_level: int) -> tuple[Floats, Floats]:
    """x times a weight made of these pieces, and the first piece's rows 5, 0 and 5, each through one program."""
    blocks = [taken_apart(kind, stored) for kind, stored in kinds.items()]
    pieces = tuple(WeightPlan((ROWS, COLUMNS), one.format, carried=True) for one in blocks)
    whole = WeightPlan((ROWS * len(pieces), COLUMNS), pieces[0].format, carried=True, pieces=pieces)
    graph = GraphBuilder("data")
    plans = {"weight": whole if len(pieces) > 1 else pieces[0], "table": pieces[0]}
    weights = StoredWeights(graph, plans, TensorProto.FLOAT, accuracy_level)
    weights.product("weight", graph.input("x", TensorProto.FLOAT, [1, "new", COLUMNS]), "product")
    weights.lookup("table", graph.input("rows", TensorProto.INT64, [1, "new"]), "found")
    for name in ("product", "found"):
        graph.output(name, TensorProto.FLOAT, [1, "new", f"{name}.columns"])
    data = folder / "data"
    data.write_bytes(bytes(graph.data_bytes))
    for regions, one in zip((*weights.regions["weight"], *weights.regions["table"]), (*blocks, blocks[0]), strict=True):
        values = pack(one.values.reshape(ROWS, -1, one.format.block_size), one.format.bits)
        for region, array in zip(
            (regions.values, regions.scales, regions.offsets), (values, one.scales, one.offsets), strict=True
        ):
            write_region(data, region, array)
    (folder / "program.onnx").write_bytes(graph.model("one").SerializeToString())
    session = onnxruntime.InferenceSession(folder / "program.onnx", providers=["CPUExecutionProvider"])
    product, found = session.run(["product", "found"], {"x": x[None], "rows": np.array([[5, 0, 5]])})
    return product[0], found[0]


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_program_computes_with_the_dequantized_weights_bit_for_bit(
    kind: str, make_blocks: BlockMaker, tmp_path: Path
) -> None:
    stored = make_blocks(gguf.GGMLQuantizationType[kind], ROWS, COLUMNS)
    expected = reference(kind, stored)
    product, found = run(tmp_path, {kind: stored}, np.eye(COLUMNS, dtype=np.float32), 0)
    np.testing.assert_array_equal(product.T, expected)
    np.testing.assert_array_equal(found, expected[[5, 0, 5]])


@pytest.mark.parametrize(("accuracy_level", "tolerance"), [(0, SUM_TOLERANCE), (4, INT8_TOLERANCE)])
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_products_are_those_of_the_dequantized_weights(
    kind: str, accuracy_level: int, tolerance: float, make_blocks: BlockMaker, tmp_path: Path
) -> None:
    stored = make_blocks(gguf.GGMLQuantizationType[kind], ROWS, COLUMNS)
    x = np.random.default_rng(0).normal(0.5, 1, (7, COLUMNS)).astype(np.float32)
    product, _ = run(tmp_path, {kind: stored}, x, accuracy_level)
    inputs, weights = x.astype(np.float64), reference(kind, stored).astype(np.float64)
    assert (np.abs(product - inputs @ weights.T) <= tolerance * (np.abs(inputs) @ np.abs(weights).T)).all()


def test_pieces_of_different_types_are_exact_side_by_side(make_blocks: BlockMaker, tmp_path: Path) -> None:
    kinds = {kind: make_blocks(gguf.GGMLQuantizationType[kind], ROWS, COLUMNS) for kind in ("Q4_K", "Q6_K", "Q8_0")}
    product, _ = run(tmp_path, kinds, np.eye(COLUMNS, dtype=np.float32), 0)
    expected = np.concatenate([reference(kind, stored) for kind, stored in kinds.items()])
    np.testing.assert_array_equal(product.T, expected)


# ---- Whole models ----


def logits(model: Path, out: Path, quant: str) -> tuple[Floats, Any]:
    """Logits of 40 tokens at full accuracy, and the program's description."""
    source = open_source(model)
    plan = replace(make_plan(source, load_target("linux-x86-64"), quant=quant, context=64), accuracy_level=0)
    graph = export(source, plan, out)
    decoder = OnnxRuntimeBackend(out, graph, context=64, options=RuntimeOptions(threads=1)).decoder()
    tokens = np.random.default_rng(1).integers(0, 256, 40)
    return decoder.forward(tokens, rows=40, rope_length=40).copy(), graph


# The types of attention's query, key, value and output, then of gate, up and down.
MIXES = {
    "llama": ("Q4_K", "Q4_K", "Q6_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    "qwen2": ("Q4_1", "Q5_1", "Q4_1", "Q8_0", "Q5_0", "Q5_0", "Q4_0"),
}
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.mark.parametrize("model_type", MIXES)
def test_mixed_model_computes_what_its_dequantized_weights_do(
    model_type: str, tiny_model: Any, write_gguf: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    directory = tiny_model(model_type, **sizes, head_dim=64, tie_word_embeddings=True)
    kinds = {
        f"blk.{layer}.{name}.weight": gguf.GGMLQuantizationType[kind]
        for layer in range(8)
        for name, kind in zip(MATRICES, MIXES[model_type], strict=True)
    } | {"token_embd.weight": gguf.GGMLQuantizationType["Q5_K"]}
    path = write_gguf(directory, tmp_path / "model.gguf", kinds=kinds)
    expected, _ = logits(path, tmp_path / "whole", "fp32")
    found, graph = logits(path, tmp_path / "kept", "keep")
    np.testing.assert_allclose(found, expected, atol=LOGITS_TOLERANCE, rtol=0)
    matrices = [report for report in graph.weights if report.bits < 16]
    assert {report.relative_error for report in matrices} == {0}
    runs = [kind for kind, _ in groupby(MIXES[model_type][:3])]
    assert [report.stored for report in matrices if report.role == "layers.0.qkv"] == runs
