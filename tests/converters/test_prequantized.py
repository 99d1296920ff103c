"""GPTQ and AWQ checkpoints, packed by the textbook's loops, read back exactly; every other method refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import edgekit
from edgekit.converters.from_safetensors import open_directory
from edgekit.errors import EdgeKitError, SourceError, UnsupportedError

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_rows(values: Integers, bits: int) -> NDArray[np.int32]:
    """GPTQ's packing along the first axis, as AutoGPTQ's `pack` loops over it."""
    count = 32 // bits
    words = np.zeros((len(values) // count, values.shape[1]), np.uint32)
    for row in range(len(words)):
        for place in range(count):
            words[row] |= (values[row * count + place].astype(np.uint32)) << np.uint32(bits * place)
    return words.view(np.int32)


def pack_columns(values: Integers, bits: int, order: tuple[int, ...]) -> NDArray[np.int32]:
    """Packing along the last axis: the integer at `order[i]` of each run goes to place i of its word."""
    count = 32 // bits
    words = np.zeros((len(values), values.shape[1] // count), np.uint32)
    for column in range(words.shape[1]):
        for place in range(count):
            words[:, column] |= values[:, column * count + order[place]].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def quantized(weight: Floats, bits: int, size: int, groups: Integers) -> tuple[Integers, Integers, NDArray[np.float16]]:
    """Round to nearest by groups of inputs: values [inputs, outputs], zero points and scales [groups, outputs]."""
    inputs = weight.T.astype(np.float64)
    top, count = (1 << bits) - 1, int(groups.max()) + 1
    scales, zero_points = np.zeros((count, inputs.shape[1]), np.float16), np.zeros((count, inputs.shape[1]), np.int64)
    values = np.zeros(inputs.shape, np.int64)
    for group in range(count):
        part = inputs[groups == group]
        low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
        scales[group] = np.maximum((high - low) / top, 1e-4)
        step = scales[group].astype(np.float64)
        zero_points[group] = np.clip(np.round(-low / step), 1, top)  # GPTQ stores one less
        values[groups == group] = np.clip(np.round(part / step) + zero_points[group], 0, top)
    return values, zero_points, scales


def dequantized(values: Integers, zero_points: Integers, scales: NDArray[np.float16], groups: Integers) -> Floats:
    """The textbook's formula, [outputs, inputs]."""
    weights = scales.astype(np.float32)[groups] * (values - zero_points[groups]).astype(np.float32)
    return np.ascontiguousarray(weights.T)


def packed_parts(
    method: str, bits: int, parts: tuple[Integers, Integers, NDArray[np.float16]], groups: Integers, *, v2: bool = False
) -> dict[str, NDArray[Any]]:
    values, zero_points, scales = parts
    if method == "awq":
        return {
            "qweight": pack_columns(values, bits, AWQ_ORDER),
            "qzeros": pack_columns(zero_points, bits, AWQ_ORDER),
            "scales": scales,
        }
    return {
        "qweight": pack_rows(values, bits),
        "qzeros": pack_columns(zero_points - (0 if v2 else 1), bits, tuple(range(32 // bits))),
        "scales": scales,
        "g_idx": groups.astype(np.int32),
    }


def write_packed(source: Path, folder: Path, method: str, bits: int, size: int, **options: Any) -> tuple[Path, Path]:
    """A packed checkpoint and its dequantized twin."""
    packed, plain = folder / "packed", folder / "plain"
    for directory in (packed, plain):
        shutil.copytree(source, directory)
    scattered, v2 = options.get("scattered", False), options.get("v2", False)
    tensors = load_file(source / "model.safetensors")
    stored, floats = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if name.split(".")[-2] not in LINEAR:
            continue
        groups = np.arange(weight.shape[1]) // (size if size > 0 else weight.shape[1])
        if scattered:
            groups = np.random.default_rng(0).permutation(groups)
        parts = quantized(weight, bits, size, groups)
        module = name.removesuffix(".weight")
        del stored[name]
        stored |= {
            f"{module}.{part}": array for part, array in packed_parts(method, bits, parts, groups, v2=v2).items()
        }
        floats[name] = dequantized(*parts, groups)
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(floats, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, "bits": bits, "group_size": size} | (
        {"version": "gemm", "zero_point": True} if method == "awq" else {"desc_act": scattered, "sym": False}
    )
    if v2:
        config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (packed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return packed, plain


KINDS = {
    "gptq, 4 bits": ("gptq", 4, 32, {}),
    "gptq, 8 bits": ("gptq", 8, 32, {}),
    "gptq, 2 bits": ("gptq", 2, 32, {}),
    "gptq v2": ("gptq", 4, 32, {"v2": True}),
    "gptq, scattered groups": ("gptq", 4, 32, {"scattered": True}),
    "gptq, one group": ("gptq", 4, -1, {}),
    "awq": ("awq", 4, 32, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_the_textbooks(kind: str, tiny_model: Any, tmp_path: Path) -> None:
    method, bits, size, options = KINDS[kind]
    packed, plain = write_packed(tiny_model("llama"), tmp_path, method, bits, size, **options)
    expected = load_file(plain / "model.safetensors")
    for tensors in open_directory(packed).parts.values():
        for tensor in tensors:
            np.testing.assert_array_equal(tensor.read(), expected[tensor.name])
            if len(tensor.shape) == 2:
                np.testing.assert_array_equal(tensor.read(3, 14), expected[tensor.name][3:14])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_model_computes_what_its_dequantized_twin_does(
    kind: str, tiny_model: Any, tmp_path: Path, check_logits: Any
) -> None:
    method, bits, size, options = KINDS[kind]
    packed, plain = write_packed(tiny_model("llama"), tmp_path, method, bits, size, **options)
    check_logits(packed, plain, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_carried_over_where_they_are_blocks(kind: str, tiny_model: Any, tmp_path: Path) -> None:
    method, bits, size, options = KINDS[kind]
    packed, _ = write_packed(tiny_model("llama"), tmp_path, method, bits, size, **options)
    bundle = edgekit.convert(packed, target="raspberry-pi-5", out=tmp_path / "b", allow_low_quality=True)
    assert bundle.manifest.plan["quant"] == "keep"
    linear = [
        report
        for report in bundle.manifest.programs[0].graph.weights
        if report.role.rpartition(".")[2] in {"qkv", "output", "gate_up", "down"}
    ]
    exact = not options.get("scattered") and size > 0
    assert all((report.bits, report.block_size) == (bits, size) for report in linear) is exact
    assert all(report.relative_error == 0 for report in linear) is exact
    assert all(report.bits == 8 for report in linear) or exact


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    method=st.sampled_from(["gptq", "awq"]),
    columns=st.sampled_from([32, 96]),
    seed=st.integers(0, 2**32 - 1),
    rows=st.tuples(st.integers(0, 31), st.integers(1, 32)),
)
def test_any_rows_of_any_packing(
    bits: int, method: str, columns: int, seed: int, rows: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from edgekit.converters.from_safetensors import read_header
    from edgekit.converters.positional_file import PositionalFile
    from edgekit.converters.prequantized import PackedTensor, packing_of

    bits = 4 if method == "awq" else bits
    random = np.random.default_rng(seed)
    groups = np.arange(columns) // 32
    parts = (
        random.integers(1 << bits, size=(columns, 32)),
        random.integers(1, 1 << bits, size=(columns // 32, 32)),
        random.uniform(0.01, 1, (columns // 32, 32)).astype(np.float16),
    )
    file = tmp_path_factory.mktemp("packed") / "a.safetensors"
    save_file(packed_parts(method, bits, parts, groups), file)
    stored = read_header(PositionalFile(file))
    packing = packing_of({"quant_method": method, "bits": bits, "group_size": 32})
    tensor = PackedTensor("w", packing, stored["qweight"], stored["qzeros"], stored["scales"], None)
    start, stop = min(rows), max(min(rows) + 1, rows[1])
    np.testing.assert_array_equal(tensor.read(start, stop), dequantized(*parts, groups)[start:stop])
    blocks = tensor.read_blocks(start, stop)
    np.testing.assert_array_equal(blocks.values, parts[0].T[start:stop])
    np.testing.assert_array_equal(blocks.zero_points, parts[1].T[start:stop])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quantized with FP8,"),
    "mxfp4": ({"quant_method": "mxfp4"}, "quantized with MXFP4,"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized with bitsandbytes,"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "quantized with compressed-tensors,"),
    "another": ({"quant_method": "aqlm"}, "quantized with aqlm,"),
    "three bits": ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "quantized with GPTQ of 3 bits,"),
    "awq gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "quantized with AWQ (version gemv),"),
    "mixed": ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {}}}, "quantized with GPTQ of several kinds,"),
    "no name": ({"bits": 4}, "quantized with an unnamed method,"),
    "hostile name": ({"quant_method": "a\nb"}, "quantized with an unnamed method,"),
    "a list": (["x"], "quantized with an unnamed method,"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_methods_are_refused_by_name(case: str, tiny_model: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values, said = REFUSED[case]
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": values}), encoding="utf-8")
    with pytest.raises(UnsupportedError) as caught:
        open_directory(folder)
    assert said in caught.value.message
    assert "full-precision" in str(caught.value.hint)


def _drop(part: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(f"model.layers.1.mlp.down_proj.{part}")


def _change(part: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    name = f"model.layers.1.mlp.down_proj.{part}"
    return lambda tensors: tensors.update({name: np.ascontiguousarray(change(tensors[name]))})


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no scales": (_drop("scales"), "down_proj.scales is missing"),
    "no zero points": (_drop("qzeros"), "down_proj.qzeros is missing"),
    "fewer groups": (_change("scales", lambda a: a[:1]), "down_proj.scales is"),
    "integers of another type": (_change("qweight", lambda a: a.astype(np.int64)), "of another type"),
    "scales of another type": (_change("scales", lambda a: a.astype(np.int32)), "of another type"),
    "a vector": (_change("qweight", lambda a: a.ravel()), "are not all matrices"),
    "a group that is not there": (_change("g_idx", lambda a: a + 1000), "beyond the"),
    "a group below zero": (_change("g_idx", lambda a: a - 1), "beyond the"),
    "too few group numbers": (_change("g_idx", lambda a: a[:3]), "g_idx does not name"),
    "fewer inputs": (_change("qweight", lambda a: a[:-1]), "down_proj"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_parts_are_named(case: str, tiny_model: Any, tmp_path: Path) -> None:
    packed, _ = write_packed(tiny_model("llama"), tmp_path, "gptq", 4, 32)
    spoil, said = DAMAGED[case]
    tensors = load_file(packed / "model.safetensors")
    spoil(tensors)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError) as caught:
        open_directory(packed)
    assert said in caught.value.message


@pytest.mark.parametrize("size", [None, "32", 0, -2, True, 1.5])
def test_group_size_is_checked(size: object, tiny_model: Any, tmp_path: Path) -> None:
    packed, _ = write_packed(tiny_model("llama"), tmp_path, "gptq", 4, 32)
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["group_size"] = size
    (packed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SourceError, match="group_size"):
        open_directory(packed)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("model.layers.0.mlp.down_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.down_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.down_proj.weight_packed", "compressed-tensors"),
        ("model.layers.0.mlp.experts.down_proj_blocks", "MXFP4"),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", "FP8"),
    ],
)
def test_method_that_the_config_hides_is_named(name: str, method: str, tiny_model: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "other"))
    tensors = load_file(folder / "model.safetensors") | {name: np.zeros((4, 4), np.int32)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EdgeKitError, match=f"quantized with {method}"):
        open_directory(folder)
