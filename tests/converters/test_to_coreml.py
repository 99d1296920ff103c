"""Core ML packages, run by the MIL evaluator, against transformers and against the weights that they should hold."""

from __future__ import annotations

import gc
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.converters.quantize import QuantizedRows, dequantize, quantize
from edgekit.converters.stored_weights import StoredMatrix, stored_weights
from edgekit.converters.to_coreml import CHUNK, PACKAGE, export
from edgekit.errors import ConversionError
from edgekit.graph import Graph, TensorReport
from edgekit.plan import Plan, WeightPlan, make_plan
from edgekit.quant import WeightFormat
from edgekit.quiet import quieted
from edgekit.runtime_options import RuntimeOptions
from edgekit.runtimes.backend_coreml import CoreMLBackend
from edgekit.source import open_source
from edgekit.target import load_target

# Only the cache is in half precision, which keeps 11 bits of each key and value; logits are of size 1 to 10.
FP32_TOLERANCE = 0.02
# The whole program is in half precision: mean KL divergence from the same numbers in float32 (0.00002 at most was seen).
FP16_KL = 2e-4
HALF_MAX = float(np.finfo(np.float16).max)
CONTEXT, PROMPT, TOKENS = 128, 70, 110  # a whole chunk, a part of one, then token by token far past half of the context

Floats = NDArray[np.float32]
pytestmark = pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools has no package for this machine")


def _converted(model: Path, out: Path, quant: str) -> tuple[Plan, Graph]:
    source = open_source(model)
    plan = make_plan(source, load_target("iphone-16"), quant=quant, format="coreml", context=CONTEXT)
    out.mkdir()
    return plan, export(source, plan, out)


def _logits(out: Path, graph: Graph, tokens: NDArray[np.int64]) -> Floats:
    backend = CoreMLBackend(out, graph, context=CONTEXT, options=RuntimeOptions())
    decoder = backend.decoder()
    steps = [(0, PROMPT), *((start, start + 1) for start in range(PROMPT, len(tokens)))]
    pieces = [
        decoder.forward(tokens[start:stop], rows=stop - start, rope_length=len(tokens)).copy() for start, stop in steps
    ]
    backend.close()
    return np.concatenate(pieces)


def _tokens() -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, 256, TOKENS)


def _mean_kl(expected: Floats, found: Floats) -> float:
    first, second = (_log_softmax(logits.astype(np.float64)) for logits in (expected, found))
    return float((np.exp(first) * (first - second)).sum(-1).mean())


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    log_softmax: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_softmax


def test_logits_equal_transformers(family: Any, tiny_model: Any, reference_logits: Any, tmp_path: Path) -> None:
    model_type, changes = family
    directory = tiny_model(model_type, **changes)
    _, graph = _converted(directory, tmp_path / "out", "fp32")
    found, expected = _logits(tmp_path / "out", graph, _tokens()), reference_logits(directory, _tokens())
    np.testing.assert_allclose(found, expected, atol=FP32_TOLERANCE, rtol=0)


def _dequantized_logits(model: Path, plan: Plan, place: Path) -> Floats:
    """Of the PyTorch decoder in float32 with the plan's stored weights as floats."""
    import torch

    from edgekit.converters.torch_attention import PlainAttention
    from edgekit.converters.torch_decoder import TorchDecoder
    from edgekit.converters.torch_weights import DecoderParts, load_weights

    source = open_source(model)
    weights = load_weights(stored_weights(source, plan, place), source.config, DecoderParts())
    attention = PlainAttention(source.config, CONTEXT)
    decoder = TorchDecoder(source.config, weights, attention, context=CONTEXT, last_row=False)
    with torch.no_grad():
        logits: Floats = decoder(torch.from_numpy(_tokens()[None]), torch.tensor([0]))[0].numpy()
    return logits


RECIPES = {
    "two": "bits = 2\nblock_size = 32\nsymmetric = false\n",
    "two-symmetric": "bits = 2\nblock_size = 16\nsymmetric = true\n",
    "mixed": 'bits = 4\nblock_size = 32\n[[overrides]]\nroles = ["embedding", "down"]\nbits = 8\nsymmetric = true\n',
}


@pytest.mark.parametrize("quant", ["fp16", "int8", "int4", "int4-symmetric", "palette4", "palette6", *RECIPES])
def test_programs_compute_with_the_quantizer_s_own_numbers(quant: str, tiny_model: Any, tmp_path: Path) -> None:
    directory = tiny_model("qwen3", head_dim=32, tie_word_embeddings=True)
    if quant in RECIPES:
        (tmp_path / f"{quant}.toml").write_text(RECIPES[quant], encoding="utf-8")
        quant = str(tmp_path / f"{quant}.toml")
    plan, graph = _converted(directory, tmp_path / "out", quant)
    expected = _dequantized_logits(directory, plan, tmp_path)
    assert _mean_kl(expected, _logits(tmp_path / "out", graph, _tokens())) < FP16_KL


def _outgrown(directory: Path, copy: Path) -> Path:
    """A copy of a Gemma whose post-norms, w + 1, are 20,000 times larger; one token is all zeros, so that epsilon matters."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(directory, copy)
    tensors = load_file(copy / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            tensors[name] = 20_000 * (1 + weight) - 1
    tensors["model.embed_tokens.weight"][_tokens()[3]] = 0
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_a_residual_over_half_precision_is_computed_in_half_precision(
    model_type: str, tiny_model: Any, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = tiny_model(model_type, head_dim=32, sliding_window=24, tie_word_embeddings=True)
    directory = _outgrown(model, tmp_path / "model")
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = reference(torch.from_numpy(_tokens()[None]), output_hidden_states=True)
    assert max(float(stream.abs().max()) for stream in expected.hidden_states[1:-1]) > HALF_MAX
    _, graph = _converted(directory, tmp_path / "out", "fp16")
    assert _mean_kl(expected.logits[0].numpy(), _logits(tmp_path / "out", graph, _tokens())) < FP16_KL


def _widened(directory: Path, copy: Path) -> Path:
    """A copy of a Gemma in which what each post-norm takes is up to so large that half precision has not got it."""
    import torch
    from safetensors.numpy import load_file, save_file
    from transformers import AutoModelForCausalLM

    shutil.copytree(directory, copy)
    tensors = load_file(copy / "model.safetensors")
    model, pairs = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        {"o_proj": "v_proj", "down_proj": "up_proj"},
    )
    found = dict[str, float]()
    for name, module in model.named_modules():
        if name.endswith(tuple(pairs)):
            module.register_forward_hook(lambda _, __, out, name=name: found.update({name: float(out.abs().max())}))
    with torch.no_grad():
        model(torch.from_numpy(_tokens()[None]))
    for name, most in found.items():
        for part in (name, name.replace(*next(pair for pair in pairs.items() if name.endswith(pair[0])))):
            tensors[f"{part}.weight"] *= (2.4 * HALF_MAX / most) ** 0.5
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(("model_type", "quant"), [("gemma2", "int8"), ("gemma3_text", "fp16")])
def test_products_over_half_precision_are_computed_in_half_precision(
    model_type: str, quant: str, tiny_model: Any, reference_logits: Any, tmp_path: Path
) -> None:
    model = tiny_model(model_type, head_dim=32, sliding_window=24, tie_word_embeddings=True)
    directory = _widened(model, tmp_path / "model")
    plan, graph = _converted(directory, tmp_path / "out", quant)
    expected = (
        reference_logits(directory, _tokens()) if quant == "fp16" else _dequantized_logits(directory, plan, tmp_path)
    )
    assert _mean_kl(expected, _logits(tmp_path / "out", graph, _tokens())) < FP16_KL


def test_a_gguf_s_blocks_are_carried_over(tiny_model: Any, write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    kinds = gguf.GGMLQuantizationType
    stored = {
        "token_embd.weight": kinds.Q8_0,
        "blk.0.attn_q.weight": kinds.Q4_1,  # a packed projection in two matrices
        "blk.0.attn_k.weight": kinds.Q4_1,
        "blk.0.attn_v.weight": kinds.Q5_1,
        "blk.0.ffn_down.weight": kinds.Q4_0,
    }
    path = write_gguf(tiny_model("llama"), tmp_path / "model.gguf", kinds=stored)
    plan, graph = _converted(path, tmp_path / "out", "keep")
    assert [report.role for report in graph.weights].count("layers.0.qkv") == 2
    expected = _dequantized_logits(path, plan, tmp_path)
    assert _mean_kl(expected, _logits(tmp_path / "out", graph, _tokens())) < FP16_KL


@pytest.fixture(scope="module")
def int4_package(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Graph]:
    out = tmp_path_factory.mktemp("coreml") / "out"
    return out, _converted(tiny_model("llama", tie_word_embeddings=True), out, "int4")[1]


def _specification(out: Path) -> Any:
    with quieted():
        from coremltools.proto import Model_pb2
    model = Model_pb2.Model()
    model.ParseFromString((out / "coreml" / PACKAGE / "Data/com.apple.CoreML/model.mlmodel").read_bytes())
    return model


def test_the_same_model_gives_the_same_bytes(int4_package: tuple[Path, Graph], tiny_model: Any, tmp_path: Path) -> None:
    out, graph = int4_package
    _, again = _converted(tiny_model("llama", tie_word_embeddings=True), tmp_path / "again", "int4")
    assert again == graph
    for name in graph.files:
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_the_weight_file_is_complete_when_the_converter_returns(tiny_model: Any, tmp_path: Path) -> None:
    _, graph = _converted(tiny_model("llama"), tmp_path / "out", "int8")
    before = (tmp_path / "out" / graph.files[2]).read_bytes()
    gc.collect()
    assert (tmp_path / "out" / graph.files[2]).read_bytes() == before
    assert int.from_bytes(before[:4], "little") == len(re.findall(re.escape(b"\xef\xbe\xad\xde"), before))


def test_functions_share_one_copy_of_each_weight(int4_package: tuple[Path, Graph]) -> None:
    out, graph = int4_package
    weights_bytes = (out / graph.files[2]).stat().st_size
    stored_bytes = sum(report.size_bytes for report in graph.weights)
    functions = _specification(out).mlProgram.functions
    # Four products in each of three layers, and the head.
    assert {name: counts["linear"] for name, counts in graph.operators.items()} == dict.fromkeys(functions, 13)
    blobs = {name: _blobs(function) for name, function in functions.items()}
    assert blobs["prefill"] >= blobs["decode"]
    # Rotary tables, doubled norms and masks besides, and each blob starts at a multiple of 64 bytes.
    assert stored_bytes < weights_bytes < stored_bytes + 60_000


def _blobs(function: Any) -> set[int]:
    """Places of the compressed weights that a function uses."""
    operations = function.block_specializations[function.opset].operations
    return {
        argument.value.blobFileValue.offset
        for operation in operations
        if operation.type == "constexpr_blockwise_shift_scale"
        for value in operation.inputs.values()
        for argument in value.arguments
    }


def test_coremltools_reads_the_package_back(int4_package: tuple[Path, Graph], tiny_model: Any) -> None:
    out, graph = int4_package
    directory = tiny_model("llama", tie_word_embeddings=True)
    with quieted():
        from coremltools.converters.mil.frontend.milproto.load import load
    program = load(_specification(out), 9, str((out / graph.files[2]).parent))  # infers every type again
    assert set(program.functions) == {"decode", "prefill", "score"}
    for function in program.functions.values():
        names = [value.name for operation in function.operations for value in operation.outputs]
        assert len(names) == len(set(names))
    linear = next(one for one in program.functions["decode"].operations if one.op_type == "linear")
    found = linear.weight.op.materialized_val_inference()
    exact = np.concatenate([tensor.read() for tensor in open_source(directory).parts["layers.0.qkv"]])
    np.testing.assert_allclose(
        found, exact, atol=0.6 * np.ptp(exact) / 15, rtol=0
    )  # within half a step of the widest block


def test_an_app_s_developer_finds_what_the_package_is(int4_package: tuple[Path, Graph]) -> None:
    description = _specification(int4_package[0]).description
    assert description.metadata.shortDescription.startswith("llama")
    user = description.metadata.userDefined
    assert (user["context"], user["chunk"], user["eos_token_ids"]) == (str(CONTEXT), str(CHUNK), "257")
    shapes = {
        function.name: {
            item.name: tuple(item.type.multiArrayType.shape) for item in (*function.input, *function.output)
        }
        for function in description.functions
    }
    assert shapes["decode"] == {"tokens": (1, 1), "start": (1,), "logits": (1, 1, 320)}
    assert shapes["prefill"] == {"tokens": (1, CHUNK), "start": (1,), "row": (1,), "logits": (1, 1, 320)}
    assert shapes["score"] == {"tokens": (1, CHUNK), "start": (1,), "logits": (1, CHUNK, 320)}


def _stored(weights: Floats, form: WeightFormat, offset: float) -> StoredMatrix:
    rows = quantize(weights, replace(form, offset=False))
    if form.offset:
        rows = replace(rows, zero_points=None, offsets=np.full(rows.scales.shape, offset, np.float32))
    report = TensorReport("head", "F32", form.bits, form.block_size, 0, weights.nbytes, 0.0)
    return StoredMatrix("head", WeightPlan(weights.shape, form), rows, report)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]), symmetric=st.booleans(), offset=st.booleans(), shift=st.floats(-4, 4),
    seed=st.integers(0, 9999), blocks=st.integers(1, 3), flat=st.booleans(),
)  # fmt: skip
def test_scale_times_value_less_offset_is_the_stored_weight(
    bits: int, symmetric: bool, offset: bool, shift: float, seed: int, blocks: int, flat: bool
) -> None:
    with quieted():
        from edgekit.converters.coreml_weights import shifted
    form = WeightFormat(bits, 16, symmetric=symmetric or offset, offset=offset)
    weights = np.random.default_rng(seed).normal(0, 1, (3, 16 * blocks)).astype(np.float32)
    if flat:
        weights[0] = 0
    stored = _stored(weights, form, shift)
    assert isinstance(stored.rows, QuantizedRows)
    values, scales, offsets = shifted(stored.rows, bits)
    found = scales[..., None] * (values.astype(np.float32) - (0 if offsets is None else offsets[..., None]))
    expected = dequantize(stored.rows, form, weights.shape[1]).reshape(found.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if offsets is None else (0, (1 << bits) - 1)
    assert low <= values.min()
    assert values.max() <= high


def test_blocks_that_do_not_divide_a_row_are_refused(tmp_path: Path) -> None:
    with quieted():
        from edgekit.converters.coreml_weights import WeightFile
    weights = np.ones((2, 24), np.float32)
    with pytest.raises(ConversionError, match="head: blocks of 16 do not divide its rows of 24"):
        WeightFile(tmp_path / "w", np.float16).add(_stored(weights, WeightFormat(8, 16), 0))


def test_weights_over_half_precision_are_refused(tmp_path: Path) -> None:
    with quieted():
        from edgekit.converters.coreml_weights import WeightFile
    weights = np.full((2, 16), 3e6, np.float32)
    with pytest.raises(ConversionError, match="head holds values over 65,504"):
        WeightFile(tmp_path / "w", np.float16).add(_stored(weights * 7, WeightFormat(8, 16), 0))


def test_a_full_disk_is_told(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ConversionError, match="no space left: the weights need"):
        _converted(tiny_model("llama"), tmp_path / "known", "int8")
    monkeypatch.undo()
    resource = pytest.importorskip("resource", reason="Windows has no limit on files")
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ConversionError, match=r"weight.bin can't be written"):
            _converted(tiny_model("llama"), tmp_path / "found", "int8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
