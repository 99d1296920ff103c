"""LiteRT: tiny models converted in LiteRT's own environment, and run; against transformers and the ONNX program's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekit.errors import BundleError, GenerationError
from edgekit.graph import Graph
from edgekit.runtimes.backend_litert import LitertBackend, LitertDecoder

pytestmark = [
    pytest.mark.slow,  # litert-torch takes seconds a layer, its environment a minute the first time
    pytest.mark.skipif(find_spec("ai_edge_litert") is None, reason="ai-edge-litert is not installed"),
]

CONTEXT, VOCABULARY, WINDOW = 96, 320, 24
# Activations are rounded to 8 bits: of logits up to 6, about as far as the ONNX program's int8 products are.
TOLERANCE = 0.5
FLOAT_TOLERANCE = 1e-4  # both sides compute in float32 in different orders; logits here are of size 1 to 10
KL_BOUND = 0.02  # edgekit.bounds.BOUND_8_BITS
Tokens = list[int]

# Tied, and with biases: what the whole numbers are put into.
MODEL: tuple[str, dict[str, Any]] = (
    "llama",
    {"num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
)
# Between them every feature of the ten architectures that a llama lacks, in few layers: each takes five seconds to convert.
FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "windows, two rotations, head norms, norms after": (
        "gemma3_text",
        {
            "num_hidden_layers": 2,
            "head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
            "tie_word_embeddings": True,
        },
    ),
    "soft caps": ("gemma2", {"num_hidden_layers": 1, "head_dim": 32, "sliding_window": WINDOW}),
    "long rotary factors, part of a head": (
        "phi3",
        {
            "num_hidden_layers": 1,
            "hidden_size": 84,
            "num_attention_heads": 6,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
                "long_factor": [1.5, 2.2, 2.9, 3.6, 4.3],
            },
            "original_max_position_embeddings": 32,
        },
    ),
    "queries that grow": (
        "ministral3",
        {
            "num_hidden_layers": 1,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
}


@pytest.fixture(scope="module")
def converted(convert_litert: Any) -> Any:
    return convert_litert(MODEL[0], "int8", **MODEL[1])


@pytest.fixture(scope="module")
def backend(converted: Any) -> LitertBackend:
    found: LitertBackend = converted.load()
    return found


def forward(decoder: LitertDecoder, tokens: Tokens, rows: int = 1) -> NDArray[np.float32]:
    return decoder.forward(np.array(tokens, np.int64), rows=rows, rope_length=CONTEXT)


def text(seed: int, count: int) -> Tokens:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCABULARY, count)]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def test_program_is_as_near_as_its_numbers_are(converted: Any, backend: LitertBackend) -> None:
    tokens = text(1, 90)
    expected, decoder = converted.expected(tokens), backend.decoder()
    found = np.concatenate([forward(decoder, tokens[:70], 70), *(forward(decoder, [each]) for each in tokens[70:])])
    wanted, got = log_softmax(expected), log_softmax(found)
    assert (np.exp(wanted) * (wanted - got)).sum(axis=1).mean() < KL_BOUND
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_computes_what_transformers_computes(convert_litert: Any, name: str) -> None:
    """In float32: in chunks that are not full, then token by token, past the windows and the original context."""
    model_type, changes = FEATURES[name]
    converted, tokens = convert_litert(model_type, "fp32", **changes), text(1, CONTEXT)
    expected, decoder = converted.expected(tokens), converted.load().decoder()
    assert np.abs(expected).max() > 1, "a reference with flat logits would prove nothing"
    found = [forward(decoder, tokens[:70], 70), forward(decoder, tokens[70:80], 10)]
    found += [forward(decoder, [each]) for each in tokens[80:]]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=FLOAT_TOLERANCE, rtol=0)


# The version that runtimes of 2023 have of each operator (tensorflow/lite/core/kernels/register.cc); tflite-runtime 2.14 is one.
OLD_OPERATORS = {
    "ADD": 5, "MUL": 7, "SUB": 5, "MINIMUM": 4, "EMBEDDING_LOOKUP": 3, "RESHAPE": 1, "CONCATENATION": 4, "LESS": 3,
    "GREATER": 2, "GREATER_EQUAL": 2, "LESS_EQUAL": 2, "LOGICAL_AND": 1, "SELECT_V2": 2, "SELECT": 4, "MEAN": 3,
    "RSQRT": 2, "FULLY_CONNECTED": 10, "SLICE": 6, "TRANSPOSE": 6, "BATCH_MATMUL": 4, "SOFTMAX": 3, "LOGISTIC": 3,
    "REDUCE_ALL": 1, "GATHER_ND": 4,
}  # fmt: skip


def test_old_runtimes_have_all_that_a_program_needs(converted: Any) -> None:
    """They have the operators, and read one scale of a tensor: of more they would compute zeros, and not say so."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(converted.directory / converted.graph.files[0]))
    needed = {
        flatbuffer_utils.opcode_to_name(model, index): code.version for index, code in enumerate(model.operatorCodes)
    }
    assert {name: version for name, version in needed.items() if version > OLD_OPERATORS.get(name, 0)} == {}
    tensors = [tensor for subgraph in model.subgraphs for tensor in subgraph.tensors]
    whole = [tensor for tensor in tensors if tensor.type == schema.TensorType.INT8]
    assert {tuple(tensor.quantization.scale) for tensor in whole} == {(1.0,)}
    matrices = [report for report in converted.graph.weights if not report.role.endswith(("norm", "bias"))]
    assert {report.bits for report in matrices} == {8}
    assert len({tensor.buffer for tensor in whole}) == len(matrices), "each is there once, the tied head too"


def test_rows_chunks_and_sessions_agree(converted: Any, backend: LitertBackend) -> None:
    tokens = text(2, CONTEXT)
    first, second = backend.decoder(), backend.decoder()
    whole = forward(first, tokens, CONTEXT)
    forward(second, tokens[:60])
    second.rewind(50)
    np.testing.assert_allclose(forward(second, tokens[50:93], 3), whole[90:93], atol=TOLERANCE, rtol=0)
    third = backend.decoder()
    third.write_cache(second.read_cache())
    np.testing.assert_array_equal(forward(third, tokens[93:]), forward(second, tokens[93:]))


def test_what_does_not_fit_is_refused(converted: Any, backend: LitertBackend) -> None:
    decoder = backend.decoder()
    with pytest.raises(ValueError, match="97 tokens in a context of 96"):
        forward(decoder, text(0, 97))
    decoder.close()
    with pytest.raises(GenerationError, match="session is closed"):
        forward(decoder, [1])


DISAGREEMENTS: dict[str, Callable[[Graph], Graph]] = {
    "vocabulary": lambda graph: replace(graph, vocab_size=321),
    "chunk": lambda graph: replace(graph, chunk=32),
    "layers": lambda graph: replace(graph, cache=replace(graph.cache, layers=3)),
    "cache names": lambda graph: replace(graph, cache=replace(graph.cache, past_key="k{}")),
    "no input": lambda graph: replace(graph, inputs={"tokens": "tokens"}),
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_manifest_that_describes_another_program_is_refused(converted: Any, what: str) -> None:
    with pytest.raises(BundleError, match="is not the program that the manifest describes"):
        converted.load(graph=DISAGREEMENTS[what](converted.graph))
