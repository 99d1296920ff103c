"""AWQ-style scaling: the function stays, against transformers; the factors, against a search over the inputs themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekit.converters.calibrate import second_moments
from edgekit.converters.quantize import dequantize, quantize
from edgekit.converters.scaling import POWERS, find_scales, scaled_source, search_scales
from edgekit.converters.to_onnx import export
from edgekit.plan import make_plan
from edgekit.quant import QuantScheme, WeightFormat
from edgekit.runtimes.backend_onnxruntime import OnnxRuntimeBackend
from edgekit.source import Source, open_source, part_shapes
from edgekit.target import load_target

# Logits of size about 1; factors of up to 4 are multiplied in and divided out in float32.
LOGIT_TOLERANCE = 2e-4
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "grouped-heads": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "qkv-biases": ("qwen2", {}),
    "fused-parts": ("phi3", {}),
    "offset-and-sandwich-norms": ("gemma2", {"head_dim": 32, "tie_word_embeddings": True}),
    "query-key-norms": ("qwen3", {"head_dim": 32}),
}


def factors_for(source: Source) -> dict[str, NDArray[np.float32]]:
    """Random factors for everything that can be scaled; heads that read the same value share theirs."""
    generator, attention = np.random.default_rng(4), source.config.attention
    found = {}
    for role, shape in part_shapes(source.config).items():
        if role.endswith((".qkv", ".gate_up", ".down")):
            found[role] = np.exp(generator.normal(0, 0.5, shape[1])).astype(np.float32)
        elif role.endswith(".output"):
            by_value = np.exp(generator.normal(0, 0.5, (attention.kv_heads, 1, attention.head_dim)))
            repeated = np.repeat(by_value, attention.heads // attention.kv_heads, axis=1)
            found[role] = repeated.reshape(-1).astype(np.float32)
    return found


def logits(source: Source, folder: Path, scheme: QuantScheme | str = "fp32") -> NDArray[np.float32]:
    plan = make_plan(source, load_target("linux-x86-64"), quant=scheme)
    graph = export(source, plan, folder, texts=[list(range(1, 40)), [5, 9, 200, 31]])
    backend = OnnxRuntimeBackend(folder, graph, context=plan.context, options=plan.runtime)
    found: NDArray[np.float32] = backend.decoder().forward(np.arange(3, 35, dtype=np.int64), rows=32, rope_length=0)
    return found.reshape(32, -1).copy()


@pytest.mark.parametrize("case", CASES)
def test_scaled_model_computes_what_transformers_does(case: str, tiny_model: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model_type, changes = CASES[case]
    directory = tiny_model(model_type, **changes)
    source = open_source(directory)
    found = logits(scaled_source(source, factors_for(source)), tmp_path / "scaled")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.arange(3, 35)[None]).logits[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize(
    "form", [WeightFormat(4, 32), WeightFormat(4, 32, symmetric=False), WeightFormat(2, 32)], ids=str
)
def test_factors_are_those_of_a_search_over_the_inputs(form: WeightFormat) -> None:
    generator = np.random.default_rng(6)
    inputs = generator.normal(size=(300, 64)) * np.exp(generator.normal(0, 1.5, 64))
    weights = generator.normal(size=(48, 64)).astype(np.float32)
    found = search_scales(weights, inputs.T @ inputs, form, np.arange(64))

    def loss(factors: NDArray[np.float64]) -> float:
        scaled = (weights * factors).astype(np.float32)
        stored = dequantize(quantize(scaled, form), form, 64) / factors
        return float(np.square(inputs @ (stored - weights).T).sum())

    size = np.sqrt(np.square(inputs).mean(axis=0))
    tried = [size**power / np.sqrt((size**power).max() * (size**power).min()) for power in POWERS]
    assert loss(found.astype(np.float64)) == pytest.approx(min(map(loss, tried)), rel=1e-3)
    assert loss(found.astype(np.float64)) < 0.9 * loss(np.ones(64))


def test_columns_of_one_channel_share_their_factor() -> None:
    generator = np.random.default_rng(7)
    inputs = generator.normal(size=(300, 64)) * np.exp(generator.normal(0, 1.5, 64))
    channels = np.tile(np.arange(32), 2)
    found = search_scales(
        generator.normal(size=(16, 64)).astype(np.float32), inputs.T @ inputs, WeightFormat(4, 16), channels
    )
    np.testing.assert_array_equal(found[:32], found[32:])
    assert len(set(found.tolist())) > 16


def test_inputs_that_never_occur_leave_finite_factors() -> None:
    for moments in (np.zeros((32, 32)), np.diag([0.0] * 31 + [1.0])):
        found = search_scales(np.ones((4, 32), np.float32), moments, WeightFormat(4, 16), np.arange(32))
        assert np.isfinite(found).all()
        assert (found > 0).all()


def test_recipe_with_scaling_is_nearer_to_the_model(tiny_model: Any, tmp_path: Path) -> None:
    directory = tiny_model("llama")
    source = open_source(directory)
    factors = {role: np.exp(3 * np.log(some)).astype(np.float32) for role, some in factors_for(source).items()}
    uneven = scaled_source(source, factors)  # large and small channels, which scaling makes even again
    exact = logits(source, tmp_path / "exact")
    plain, scaled = (
        np.square(
            logits(uneven, tmp_path / scaling, QuantScheme("x", WeightFormat(4, 32), scaling=scaling)) - exact
        ).mean()
        for scaling in ("none", "awq")
    )
    assert scaled < 0.8 * plain


def test_factors_are_found_for_every_matrix_of_the_layers(tiny_model: Any, tmp_path: Path) -> None:
    source = open_source(tiny_model("llama"))
    plan = make_plan(source, load_target("linux-x86-64"), quant=QuantScheme("x", WeightFormat(4, 32), scaling="awq"))
    found = find_scales(
        source, plan.weights, second_moments(source, [[1, 2, 3, 4]], tmp_path, plan.scaled), int8_activations=True
    )
    assert found.keys() == plan.scaled
    assert {role.rpartition(".")[2] for role in found} == {"qkv", "output", "gate_up", "down"}
    assert {role: len(some) for role, some in found.items()} == {role: plan.weights[role].shape[1] for role in found}
