"""Stored weights: the numbers that every format packs are those that the ONNX program holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgekit.converters.packing import unpack
from edgekit.converters.quantize import QuantizedRows
from edgekit.converters.stored_weights import StoredMatrix, StoredWeight, stored_weights
from edgekit.converters.to_onnx import export
from edgekit.plan import Plan, make_plan
from edgekit.quant import QuantScheme, WeightFormat, load_scheme
from edgekit.registry import CONVERTERS
from edgekit.source import Source, open_source
from edgekit.target import load_target

TARGET = load_target("linux-x86-64")
TEXTS = [np.random.default_rng(3).integers(0, 256, 48).tolist()]


def _onnx_arrays(folder: Path) -> dict[str, np.ndarray]:
    program = onnx.load(folder / "onnx" / "model.onnx")
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in program.graph.initializer}


def _same(matrix: StoredMatrix, name: str, arrays: dict[str, np.ndarray]) -> None:
    rows, form = matrix.rows, matrix.plan.format
    if not isinstance(rows, QuantizedRows):
        np.testing.assert_array_equal(rows, arrays[f"{name}.weight"])
        return
    values = unpack(arrays[f"{name}.weight"].reshape(*rows.values.shape[:2], -1), form.bits, form.block_size)
    np.testing.assert_array_equal(rows.values, values)
    np.testing.assert_array_equal(rows.scales, arrays[f"{name}.scales"])
    if rows.zero_points is not None:
        zero_points = unpack(arrays[f"{name}.zero_points"], form.bits, rows.zero_points.shape[1])
        np.testing.assert_array_equal(rows.zero_points, zero_points)
    if rows.offsets is not None:
        np.testing.assert_array_equal(rows.offsets, arrays[f"{name}.offsets"])


def _check(source: Source, plan: Plan, out: Path) -> None:
    graph = export(source, plan, out / "bundle", texts=TEXTS)
    arrays = _onnx_arrays(out / "bundle")
    found = list(stored_weights(source, plan, out, texts=TEXTS))
    assert sorted(weight.role for weight in found) == sorted(plan.weights)
    for weight in found:
        pieces = len(weight.matrices) > 1
        for index, matrix in enumerate(weight.matrices):
            _same(matrix, f"{weight.role}.{index}" if pieces else weight.role, arrays)
    reports = {report for weight in found for report in (matrix.report for matrix in weight.matrices)}
    assert {(r.role, r.bits, r.relative_error, r.peak) for r in reports} == {
        (r.role, r.bits, r.relative_error, r.peak) for r in graph.weights
    }


@pytest.mark.parametrize("quant", ["fp32", "fp16", "int8", "int4", "int4-mixed", "int8-scaled"])
def test_numbers_are_those_of_the_onnx_program(
    quant: str, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.converters.weight_rows.CHUNK_ELEMENTS", 1000)  # many chunks a tensor
    source = open_source(tiny_model("llama", attention_bias=True, num_hidden_layers=2))
    _check(source, make_plan(source, TARGET, quant=quant), tmp_path)


def test_carried_blocks_of_several_types_are_those_of_the_onnx_program(
    tiny_model: Any, write_gguf: Any, tmp_path: Path
) -> None:
    from gguf import GGMLQuantizationType as Kind

    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    names = {"attn_q": Kind.Q4_0, "attn_k": Kind.Q4_1, "attn_v": Kind.Q8_0}
    kinds = {f"blk.0.{name}.weight": kind for name, kind in names.items()}
    path = write_gguf(tiny_model("qwen2", **sizes), tmp_path / "a.gguf", kinds=kinds)
    source = open_source(path)
    plan = make_plan(source, TARGET, quant="keep")
    assert len(plan.weights["layers.0.qkv"].pieces) == 3
    _check(source, plan, tmp_path)


def test_row_scaled_blocks_stand_for_the_rows_own_numbers(tiny_model: Any, tmp_path: Path) -> None:
    source = open_source(tiny_model("llama", num_hidden_layers=1))
    scheme = QuantScheme("rows", WeightFormat(8, 32), row_scaled=True)
    plan = make_plan(source, TARGET, quant=scheme)
    weights = {weight.role: weight for weight in stored_weights(source, plan, tmp_path)}
    down, (tensor,) = weights["layers.0.down"], source.parts["layers.0.down"]
    assert isinstance(rows := down.matrices[0].rows, QuantizedRows)
    assert rows.scales.shape == (down.rows, 1)
    # Half a step of a row's 255 levels, with the clipping that lowers the squared error.
    assert np.abs(down.floats() - tensor.read()).max() < 12 * rows.scales.max()


def test_parts_of_a_weight_are_its_rows(tiny_model: Any, tmp_path: Path) -> None:
    source = open_source(tiny_model("llama", num_hidden_layers=1))
    plan = make_plan(source, TARGET, quant=load_scheme("int4"))
    weights = {weight.role: weight for weight in stored_weights(source, plan, tmp_path)}
    qkv = weights["layers.0.qkv"]
    two = StoredWeight(qkv.role, (qkv.matrices[0].part(0, 50), qkv.matrices[0].part(50, qkv.rows)))
    whole = qkv.floats()
    for start, stop in ((0, qkv.rows), (10, 40), (40, 70), (50, 128), (60, 61)):
        np.testing.assert_array_equal(two.part(start, stop).floats(), whole[start:stop])
        np.testing.assert_array_equal(qkv.part(start, stop).floats(), whole[start:stop])


@pytest.mark.parametrize("quant", ["int8", "int8-scaled", "int4-mixed"])
def test_forms_of_executorch_can_be_calibrated_and_scaled(
    quant: str, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONVERTERS, "executorch", "")  # only planned for
    source = open_source(tiny_model("llama", num_hidden_layers=1, hidden_size=128, tie_word_embeddings=True))
    plan = make_plan(source, TARGET, quant=quant, format="executorch")
    reports = [weight.matrices[0].report for weight in stored_weights(source, plan, tmp_path, texts=TEXTS)]
    assert "head" in {report.role for report in reports}
    # Of normal numbers a row of 8 bits loses 1%, blocks with 4 bits 10%, and 15% where guides round them.
    assert all(report.relative_error < {8: 0.02, 4: 0.2}.get(report.bits, 1e-9) for report in reports), reports
