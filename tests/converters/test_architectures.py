"""Every architecture as emitted, in float32, against transformers' own modelling code on the same seeded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekit.converters.to_onnx import export
from edgekit.plan import make_plan
from edgekit.runtimes.backend import Decoder
from edgekit.runtimes.backend_onnxruntime import OnnxRuntimeBackend
from edgekit.source import open_source
from edgekit.target import load_target

# Both sides compute in float32 in different orders; logits here are of size 1 to 10.
LOGITS_TOLERANCE = 1e-4
PROMPT, DECODE = 70, 40

WINDOW = 24  # shorter than the prompt: the sequence runs past it
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [1.5 + 0.7 * index for index in range(8)],
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3-partial": ("phi3", {"partial_rotary_factor": 0.5, "head_dim": 32, "num_attention_heads": 2}),
    "phi3-longrope-short": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
    ),
    "phi3-longrope-long": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": GEMMA3_ROPE,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
}


def reference_logits(directory: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [tokens, vocabulary] of one whole forward in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(tokens[None])).logits[0].numpy()
    return logits


def emitted_decoder(directory: Path, out: Path, quant: str = "fp32") -> Decoder:
    """The model converted without verification, and loaded."""
    source = open_source(directory)
    plan = make_plan(source, load_target("linux-x86-64"), quant=quant)
    graph = export(source, plan, out)
    return OnnxRuntimeBackend(out, graph, context=plan.context, threads=2).decoder()


def decoded(decoder: Decoder, tokens: NDArray[np.int64], chunk: int) -> NDArray[np.float32]:
    """Logits of every position: the prompt in chunks, the rest token by token."""
    steps = [*range(0, PROMPT, chunk), *range(PROMPT, len(tokens)), len(tokens)]
    steps = sorted({min(step, PROMPT) if step < PROMPT else step for step in steps})
    pieces = [
        decoder.forward(tokens[start:stop], rows=stop - start, rope_length=len(tokens)).copy()
        for start, stop in zip(steps, [*steps[1:]], strict=False)
    ]
    return np.concatenate(pieces)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tiny_model: Any, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    directory = tiny_model(model_type, **changes)
    tokens = np.random.default_rng(1).integers(0, 256, PROMPT + DECODE)
    expected = reference_logits(directory, tokens)
    assert np.abs(expected).max() > 1, "a reference with flat logits would prove nothing"
    decoder = emitted_decoder(directory, tmp_path)
    for chunk in (PROMPT, 16):
        found = decoded(decoder, tokens, chunk)
        np.testing.assert_allclose(found, expected, atol=LOGITS_TOLERANCE, rtol=0)
        decoder.rewind(0)
