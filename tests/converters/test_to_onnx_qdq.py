"""NPU graphs: run on Qualcomm's emulator of its Hexagon processor with fall-back disabled, against transformers."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edgekit.converters.to_onnx_qdq import export
from edgekit.errors import BundleError, ConversionError, UnsupportedError
from edgekit.graph import EMPTY_UINT8
from edgekit.plan import make_plan
from edgekit.runtime_options import RuntimeOptions
from edgekit.runtimes.backend_onnx_qdq import QdqBackend, QdqDecoder
from edgekit.source import open_source
from edgekit.target import load_target

TARGET = "copilot-snapdragon-x-elite"
CONTEXT, PROMPT, DECODE = 192, 150, 10  # the prompt is longer than a chunk of 128
WINDOW = 24
# Mean KL against float32 in nats. 8-bit weights with 16-bit activations and 8-bit keys and values; 4 bits round tiny random
# matrices coarsely. A wrong mask, rotation or cache costs more than 0.5 here.
BOUNDS = {"int8": 0.02, "int4": 0.4}
TOP1 = {"int8": 0.85, "int4": 0.4}  # the vocabulary is flat: many near ties
# The same whole numbers in other orders and kernels: what rounding of 16-bit activations leaves.
SAME_PROGRAM = 0.01

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [1.5 + 0.7 * index for index in range(8)],
}  # fmt: skip
SMALL = {"num_hidden_layers": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "phi3-partial": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
}
needs_emulator = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed"
)
Floats = NDArray[np.float32]


@pytest.fixture(scope="session")
def program(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`program(case, quant)`: directory, graph and float32 reference of a model as NPU graphs, made once a session."""
    made: dict[tuple[str, str], Any] = {}

    def make(case: str, quant: str = "int8") -> Any:
        if (case, quant) not in made:
            kind, changes = CASES[case]
            directory = tiny_model(kind, **(SMALL | changes))
            out = tmp_path_factory.mktemp(case)
            source = open_source(directory)
            plan = make_plan(source, load_target(TARGET), quant=quant, context=CONTEXT, format="onnx-qdq")
            made[case, quant] = out, export(source, plan, out, texts=_texts(256)), directory
        return made[case, quant]

    return make


def _texts(count: int) -> list[list[int]]:
    random = np.random.default_rng(7)
    return [random.integers(0, count, PROMPT + DECODE).tolist() for _ in range(6)]


def _decoder(made: Any, provider: str = "cpu") -> QdqDecoder:
    out, graph, _ = made
    return QdqBackend(out, graph, context=CONTEXT, options=RuntimeOptions(threads=2), provider=provider).decoder()


def _tokens() -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, 256, PROMPT + DECODE)


def _decoded(decoder: QdqDecoder, tokens: NDArray[np.int64], chunk: int = PROMPT) -> Floats:
    """Logits of every position: the prompt in chunks, the rest token by token."""
    steps = [*range(0, PROMPT, chunk), *range(PROMPT, len(tokens) + 1)]
    return np.concatenate(
        [
            decoder.forward(tokens[start:stop], rows=stop - start, rope_length=len(tokens))
            for start, stop in pairwise(steps)
        ]
    )


def _expected(directory: Path, tokens: NDArray[np.int64]) -> Floats:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: Floats = model(torch.from_numpy(tokens[None])).logits[0].numpy()
    return logits


def _divergence(expected: Floats, found: Floats) -> NDArray[np.float64]:
    """KL of each row in nats."""
    logs = []
    for logits in (expected, found):
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        logs.append(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
    kl: NDArray[np.float64] = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    return kl


@needs_emulator
@pytest.mark.parametrize(
    ("case", "quant"), [*((case, "int8") for case in CASES), ("llama-bias", "int4"), ("qwen3", "int4")]
)
def test_emulated_npu_computes_what_transformers_computes(program: Any, case: str, quant: str) -> None:
    made = program(case, quant)
    tokens = _tokens()
    expected = _expected(made[2], tokens)
    found = _decoded(_decoder(made, "qnn"), tokens)
    kl = _divergence(expected, found)
    assert kl.mean() <= BOUNDS[quant]
    assert kl[PROMPT:].mean() <= 2 * BOUNDS[quant], "the graph for one token"
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= TOP1[quant]


def _without_wide_roundings(path: Path) -> None:
    """Take the pairs of QuantizeLinear and DequantizeLinear of 16 bits out, and with them what they clip: OpenVINO does so."""
    model = onnx.load(path, load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    wide = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and kinds[node.input[2]] == onnx.TensorProto.UINT16
    }
    pairs = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in wide]
    renamed = {node.output[0]: wide[node.input[0]] for node in pairs}
    for node in pairs:
        model.graph.node.remove(node)
    for node in model.graph.node:
        for place in range(len(node.input)):
            while node.input[place] in renamed:
                node.input[place] = renamed[node.input[place]]
    onnx.save(model, path)


def test_programs_compute_the_same_where_nothing_is_clipped(program: Any, tmp_path: Path) -> None:
    """Nor rounded: what is hidden must be so by what is added to its score alone, which needs zeros in empty places."""
    out, graph, directory = program("qwen3")
    shutil.copytree(out, tmp_path / "b")
    for name in ("prefill", "decode"):
        _without_wide_roundings(tmp_path / "b" / "onnx-qdq" / f"{name}.onnx")
    decoder = _decoder((tmp_path / "b", graph, directory))
    found = _decoded(decoder, _tokens())
    assert _divergence(_expected(directory, _tokens()), found).mean() <= BOUNDS["int8"]
    places = {name: array.swapaxes(1, 2) if "key" in name else array for name, array in decoder._cache.items()}
    assert all((array[:, len(found) :] == EMPTY_UINT8).all() for array in places.values())
    zero_points = _zero_points(tmp_path / "b" / "onnx-qdq" / "decode.onnx")
    assert {zero_points[name] for name in places} == {EMPTY_UINT8}


def _zero_points(path: Path) -> dict[str, int]:
    """That of each value which a program reads as whole numbers."""
    model = onnx.load(path, load_external_data=False)
    numbers = {tensor.name: tensor for tensor in model.graph.initializer}
    scalars = {
        node.input[0]: onnx.numpy_helper.to_array(numbers[node.input[2]])
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and not numbers[node.input[2]].external_data
    }
    return {name: int(value) for name, value in scalars.items() if value.size == 1}


@pytest.mark.parametrize("case", ["llama-bias", "gemma2"])
def test_cpu_is_a_fall_back_for_the_same_graphs(program: Any, case: str) -> None:
    made = program(case)
    tokens = _tokens()
    found = _decoded(_decoder(made), tokens)
    assert _divergence(_expected(made[2], tokens), found).mean() <= BOUNDS["int8"]


@pytest.mark.parametrize("chunk", [1, 37, 128])
def test_chunks_of_any_length_give_the_same_logits(program: Any, chunk: int) -> None:
    decoder = _decoder(program("llama-bias"))
    tokens = _tokens()
    whole = _decoded(decoder, tokens)
    decoder.rewind(0)
    np.testing.assert_allclose(_divergence(whole, _decoded(decoder, tokens, chunk)), 0, atol=SAME_PROGRAM)


def test_rows_asked_for_are_the_last_ones(program: Any) -> None:
    decoder = _decoder(program("llama-bias"))
    tokens = _tokens()[:PROMPT]
    every = decoder.forward(tokens, rows=PROMPT, rope_length=PROMPT)
    decoder.rewind(0)
    np.testing.assert_array_equal(decoder.forward(tokens, rows=30, rope_length=PROMPT), every[-30:])


def test_cache_is_read_and_written_back(program: Any) -> None:
    made, tokens = program("llama-bias"), _tokens()
    first, second = _decoder(made), _decoder(made)
    first.forward(tokens[:PROMPT], rows=1, rope_length=PROMPT)
    arrays = first.read_cache()
    assert {array.shape[1:] for array in arrays} == {(PROMPT, arrays[0].shape[2])}
    second.write_cache(arrays)
    assert second.length == PROMPT
    for token in tokens[PROMPT:]:
        step = np.array([token])
        expected = first.forward(step, rows=1, rope_length=PROMPT)
        np.testing.assert_array_equal(second.forward(step, rows=1, rope_length=PROMPT), expected)


def test_rewound_tokens_leave_nothing_behind(program: Any) -> None:
    made, tokens = program("llama-bias"), _tokens()
    fresh, used = _decoder(made), _decoder(made)
    used.forward(tokens[::-1].copy(), rows=1, rope_length=PROMPT)
    used.rewind(20)
    used.rewind(0)
    expected = fresh.forward(tokens[:50], rows=50, rope_length=PROMPT)
    np.testing.assert_array_equal(used.forward(tokens[:50], rows=50, rope_length=PROMPT), expected)


def test_window_that_slides_forgets_what_no_layer_sees(program: Any) -> None:
    """With every layer's window past a token, dropping it changes nothing: positions go on."""
    made, tokens = program("mistral"), _tokens()
    assert made[1].positions == 256
    whole, sliding = _decoder(made), _decoder(made)
    whole.forward(tokens[:PROMPT], rows=1, rope_length=PROMPT)
    sliding.forward(tokens[:PROMPT], rows=1, rope_length=PROMPT)
    sliding.forget(PROMPT - 2 * WINDOW)
    assert sliding.length == 2 * WINDOW
    for token in tokens[PROMPT:]:
        step = np.array([token])
        expected = whole.forward(step, rows=1, rope_length=PROMPT)
        found = sliding.forward(step, rows=1, rope_length=PROMPT)
        np.testing.assert_allclose(_divergence(expected, found), 0, atol=SAME_PROGRAM)


def test_both_graphs_share_one_weight_file(program: Any) -> None:
    out, graph, _ = program("llama-bias")
    import onnx

    places = []
    for name in ("prefill", "decode"):
        model = onnx.load(out / "onnx-qdq" / f"{name}.onnx", load_external_data=False)
        stored = [tensor for tensor in model.graph.initializer if tensor.external_data]
        places.append({(t.name, *((e.key, e.value) for e in t.external_data)) for t in stored})
        assert {dim.dim_value > 0 for value in model.graph.input for dim in value.type.tensor_type.shape.dim} == {True}
    assert places[0] == places[1]
    layers = sum(report.size_bytes for report in graph.weights if report.role.startswith("layers."))
    assert (out / "onnx-qdq" / "layers.data").stat().st_size < layers + 4096 * len(places[0])


@needs_emulator
def test_graph_that_would_need_the_cpu_is_refused(program: Any, tmp_path: Path) -> None:
    """Fall-back is disabled: the emulator runs all of a graph or none of it."""
    import onnx

    out, graph, _ = program("llama-bias")
    model = onnx.load(out / "onnx-qdq" / "decode.onnx", load_external_data=True)
    model.graph.node.append(onnx.helper.make_node("Det", ["square"], ["unheard_of"]))
    model.graph.input.append(onnx.helper.make_tensor_value_info("square", 1, [3, 3]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("unheard_of", 1, []))
    for file in (out / "onnx-qdq").iterdir():
        target = tmp_path / "onnx-qdq" / file.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    onnx.save(model, tmp_path / "onnx-qdq" / "decode.onnx")
    with pytest.raises(BundleError, match=r"decode\.onnx is not taken"):
        _decoder((tmp_path, graph, None), "qnn")


def test_program_that_is_not_the_manifests_is_refused(program: Any) -> None:
    out, graph, _ = program("llama-bias")
    cache = graph.cache
    others = (replace(cache, layers=10**12), replace(cache, dtype="float32"), replace(cache, keys_transposed=False))
    for wrong in (
        replace(graph, vocab_size=7),
        replace(graph, chunk=64),
        replace(graph, chunk=0, files=graph.files[:1]),
        *(replace(graph, cache=one) for one in others),
    ):
        with pytest.raises(BundleError, match="not the program"):
            _decoder((out, wrong, None))


def test_queries_that_grow_are_refused_before_any_work(tiny_model: Any) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    source = open_source(tiny_model("ministral3", head_dim=16, rope_parameters=rope | {"llama_4_scaling_beta": 0.5}))
    target = load_target(TARGET)
    with pytest.raises(UnsupportedError, match="queries grow") as refused:
        make_plan(source, target, quant="int8", format="onnx-qdq")
    assert "--context 32" in str(refused.value.hint)
    assert make_plan(source, target, quant="int8", format="onnx-qdq", context=32).context == 32


@pytest.mark.parametrize("quant", ["fp32", "fp16", "keep", "int4-mixed"])
def test_schemes_that_npus_do_not_take_are_refused(tiny_model: Any, quant: str) -> None:
    with pytest.raises(UnsupportedError, match=quant):
        make_plan(open_source(tiny_model("llama")), load_target(TARGET), quant=quant, format="onnx-qdq")


def test_graphs_are_not_written_without_texts(tiny_model: Any, tmp_path: Path) -> None:
    source = open_source(tiny_model("llama"))
    plan = make_plan(source, load_target(TARGET), quant="int8", format="onnx-qdq")
    with pytest.raises(ConversionError, match="calibrated"):
        export(source, plan, tmp_path)


def test_values_that_overflow_are_named(tiny_model: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    copy = shutil.copytree(tiny_model("llama"), tmp_path / "large")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e25
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e25
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    source = open_source(copy)
    plan = make_plan(source, load_target(TARGET), quant="int8", format="onnx-qdq")
    with pytest.raises(ConversionError, match=r"layers\.1\..* has values that are not finite numbers"):
        export(source, plan, tmp_path / "out", texts=[[1, 2, 3]])
