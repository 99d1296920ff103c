"""Sensitivities against what they stand for: the KL divergence of a whole model in which one matrix is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekit.converters import sensitivity
from edgekit.converters.calibrate import second_moments
from edgekit.converters.gptq import SHRINKAGE, make_guide, quantize_guided
from edgekit.converters.quantize import dequantize, quantize
from edgekit.converters.scaling import SCALED, scaled_source, shared_channels
from edgekit.converters.sensitivity import PROBE, PROBE_SKIPPED, UNSEEN, Sensitivity, expected_errors, probe_layers
from edgekit.quant import WeightFormat
from edgekit.source import Source, open_source, part_shapes

Floats = NDArray[np.float32]
TEXTS = [list(range(3, 60)), [7, 100, 9, 33, *range(120, 160)], [5] * 40]
# Divergences are sums of small differences of float32 logits that two libraries compute.
RELATIVE_TOLERANCE = 0.03
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "softcap-and-scaled-embedding": ("gemma2", {"head_dim": 32, "tie_word_embeddings": True}),
    "biases": ("qwen2", {}),
}
MODULES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def rounded(weights: Floats, form: WeightFormat) -> Floats:
    return dequantize(quantize(weights, form), form, weights.shape[1])


def matrices(source: Source) -> frozenset[str]:
    kinds = ("embedding", "head", "qkv", "output", "gate_up", "down")
    return frozenset(role for role in part_shapes(source.config) if role.rpartition(".")[2] in kinds)


def modules_of(model: Any, role: str) -> list[Any]:
    if role in ("embedding", "head"):
        return [model.get_input_embeddings() if role == "embedding" else model.get_output_embeddings()]
    _, layer, kind = role.split(".")
    return [model.model.layers[int(layer)].get_submodule(name) for name in MODULES[kind]]


def log_probabilities(model: Any) -> Any:
    import torch

    with torch.no_grad():
        found = [model(torch.tensor([text])).logits[0, PROBE_SKIPPED:].double() for text in TEXTS]
    return torch.log_softmax(torch.cat(found), dim=-1)


@pytest.mark.parametrize("case", CASES)
def test_gain_times_error_is_the_divergence_of_a_model_with_that_matrix_rounded(
    case: str, tiny_model: Any, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model_type, changes = CASES[case]
    directory = tiny_model(model_type, **changes)
    source = open_source(directory)
    found = probe_layers(source, TEXTS, tmp_path, matrices(source))
    assert found.keys() == matrices(source)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    plain = log_probabilities(model)
    for role in sorted(found):
        modules = modules_of(model, role)
        before = [module.weight.detach().clone() for module in modules]
        # Tied embeddings' error is counted where they are the head.
        listened = (
            model.get_output_embeddings() if role == "embedding" and source.config.tied_embeddings else modules[0]
        )
        inputs: list[Any] = []
        hook = listened.register_forward_pre_hook(lambda _, given, seen=inputs: seen.append(given[0][0]))
        with torch.no_grad():
            for module in modules:
                module.weight.copy_(torch.from_numpy(rounded(module.weight.numpy(), PROBE)))
        after = log_probabilities(model)
        hook.remove()
        change = [module.weight.detach() - old for module, old in zip(modules, before, strict=True)]
        with torch.no_grad():
            for module, old in zip(modules, before, strict=True):
                module.weight.copy_(old)
        divergence = float((plain.exp() * (plain - after)).sum(-1).mean())
        error = _squared_error(role, source, inputs, change)
        assert found[role].gain * error == pytest.approx(divergence, rel=RELATIVE_TOLERANCE, abs=1e-7), role


def _squared_error(role: str, source: Source, inputs: list[Any], change: list[Any]) -> float:
    """Of one token's products, over all rows, as the mean of the tokens."""
    if role == "embedding" and not source.config.tied_embeddings:
        rows = [change[0][tokens] for tokens in inputs]
        return float(sum(row.square().sum() for row in rows) / sum(map(len, rows))) * source.config.embedding_scale**2
    kept = [rows[PROBE_SKIPPED:] for rows in inputs] if role in ("embedding", "head") else inputs
    total = sum(float((rows @ part.T).square().sum()) for rows in kept for part in change)
    return total / sum(map(len, kept))


@pytest.mark.parametrize(
    "form", [WeightFormat(4, 32), WeightFormat(8, 16, symmetric=False), WeightFormat(2, 64)], ids=str
)
def test_expected_errors_are_those_of_rounding(form: WeightFormat, tiny_model: Any, tmp_path: Path) -> None:
    source = open_source(tiny_model("llama"))
    role, moments = "layers.1.down", None
    for some in second_moments(source, TEXTS, tmp_path, frozenset({role})):
        moments = some[role] / sum(map(len, TEXTS))
    assert moments is not None
    weights = np.concatenate([tensor.read() for tensor in source.parts[role]])
    for rounding, tolerance in (("nearest", 0.35), ("gptq", 0.5)):
        (found,) = expected_errors(source, TEXTS, tmp_path, {role: [form]}, rounding)[role]  # type: ignore[arg-type]
        counted = moments
        if rounding == "gptq":
            counted = (1 - SHRINKAGE) * moments + SHRINKAGE * np.diag(moments.diagonal())  # as the guide does
            stored = dequantize(quantize_guided(weights, form, make_guide(moments)), form, weights.shape[1])
        else:
            stored = rounded(weights, form)
        change = (stored - weights).astype(np.float64)
        actual = float(np.einsum("ij,jk,ik->", change, counted, change))
        found /= UNSEEN if rounding == "gptq" else 1
        assert abs(np.log(found / actual)) < tolerance  # errors of columns do correlate, in this sample of 64 rows


def test_error_of_rounded_inputs_is_that_of_rounding_them() -> None:
    generator = np.random.default_rng(3)
    inputs, weights = generator.standard_t(5, (400, 100)), generator.normal(size=(60, 100))
    for size in (32, 64):
        padded = np.pad(inputs, ((0, 0), (0, -100 % size))).reshape(400, -1, size)
        largest = np.abs(padded).max(axis=2, keepdims=True)
        steps = largest / 127
        stored = (np.rint(padded / steps) * steps).reshape(400, -1)[:, :100]
        actual = np.square((stored - inputs) @ weights.T).sum() / 400
        found = Sensitivity(1.0, {size: np.square(largest[..., 0]).mean(axis=0)}, np.square(weights).sum(axis=0))
        assert found.input_error(size) == pytest.approx(actual, rel=0.1)


def test_costs_are_lower_for_finer_formats(tiny_model: Any, tmp_path: Path) -> None:
    source = open_source(tiny_model("llama"))
    formats = {role: [WeightFormat(bits, 32) for bits in (2, 4, 8)] for role in matrices(source)}
    costs = sensitivity.measure_costs(source, TEXTS, tmp_path, formats, "gptq", "none", int8_activations=False)
    assert all(some == tuple(sorted(some, reverse=True)) for some in costs.values())
    with_int8 = sensitivity.measure_costs(source, TEXTS, tmp_path, formats, "gptq", "none", int8_activations=True)
    assert all(with_int8[role] > costs[role] for role in costs if role != "embedding")


def test_costs_are_those_after_scaling(tiny_model: Any, tmp_path: Path) -> None:
    """Channels made uneven cost more; with scaling, which makes them even again, about what they cost before."""
    source = open_source(tiny_model("llama"))
    generator = np.random.default_rng(4)
    shapes = part_shapes(source.config)
    roles = [role for role in matrices(source) if role.rpartition(".")[2] in SCALED]
    channels = {role: shared_channels(source.config, role, shapes[role][1]) for role in roles}
    factors = {
        role: np.exp(generator.normal(0, 1.5, some.max() + 1))[some].astype(np.float32)
        for role, some in channels.items()
    }
    uneven = scaled_source(source, factors)
    formats = {role: [WeightFormat(4, 32)] for role in roles}

    def costs(model: Source, scaling: Any) -> float:
        found = sensitivity.measure_costs(model, TEXTS, tmp_path, formats, "nearest", scaling, int8_activations=True)
        return sum(cost for (cost,) in found.values())

    even, plain, scaled = costs(source, "awq"), costs(uneven, "none"), costs(uneven, "awq")
    assert plain > 2 * even
    assert scaled < 1.3 * even


def test_want_of_memory_is_told(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(sensitivity, "make_guide", fail)
    source = open_source(tiny_model("llama"))
    with pytest.raises(Exception, match="not enough memory to measure sensitivities"):
        sensitivity.measure_costs(
            source, TEXTS, tmp_path, {"layers.0.qkv": [PROBE]}, "gptq", "none", int8_activations=False
        )
