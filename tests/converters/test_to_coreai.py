"""Core AI programs, run by Core AI's own interpreter, against transformers and against the plan's weights as floats."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgekit.plan import Plan, make_plan
from edgekit.quant import WeightFormat
from edgekit.quiet import quieted
from edgekit.runtime_options import RuntimeOptions
from edgekit.source import Source, open_source
from edgekit.target import load_target

pytest.importorskip("coreai", reason="the extra coreai is not installed")

from edgekit.converters import to_coreai
from edgekit.converters.coreai_parts import Blocks, Product
from edgekit.converters.quantize import quantize
from edgekit.converters.stored_weights import stored_weights
from edgekit.converters.torch_attention import PlainAttention
from edgekit.converters.torch_decoder import TorchDecoder
from edgekit.converters.torch_weights import DecoderParts, load_weights
from edgekit.runtimes.backend_coreai import CoreAIBackend

# Both sides compute in float32 in different orders; logits here are of size 1 to 10.
LOGITS_TOLERANCE = 1e-4
# Programs of quantized weights compute in half precision, whose numbers have 11 bits: logits of 6, after three layers.
HALF_TOLERANCE = 0.15
TOKENS = np.random.default_rng(1).integers(0, 256, 80)
PROMPT = 70
PROGRAM_BYTES = 60_000  # of operators
OPTIONS = RuntimeOptions(threads=1)


def _plan(source: Source, quant: str) -> Plan:
    return make_plan(source, load_target("iphone-16"), format="coreai", quant=quant)


def _coreai(source: Source, plan: Plan, out: Path) -> CoreAIBackend:
    graph = to_coreai.export(source, plan, out)
    return CoreAIBackend(out, graph, context=plan.context, options=OPTIONS)


def _logits(backend: Any) -> NDArray[np.float32]:
    """Of every position: the prompt at once, the rest token by token."""
    decoder = backend.decoder()
    pieces = [
        decoder.forward(TOKENS[start:stop], rows=stop - start, rope_length=len(TOKENS))
        for start, stop in pairwise([0, *range(PROMPT, len(TOKENS) + 1)])
    ]
    return np.concatenate(pieces)


def test_logits_equal_transformers(family: Any, tiny_model: Any, reference_logits: Any, tmp_path: Path) -> None:
    model_type, changes = family
    directory = tiny_model(model_type, **changes)
    source = open_source(directory)
    expected = reference_logits(directory, TOKENS)
    found = _logits(_coreai(source, _plan(source, "fp32"), tmp_path))
    np.testing.assert_allclose(found, expected, atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("context", [32, 64])
def test_rotary_switch_is_told_where_the_program_has_one(context: int, tiny_model: Any, tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 8, "long_factor": [2.0] * 8}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 32, "num_hidden_layers": 1}
    source = open_source(tiny_model("phi3", **changes))
    graph = to_coreai.export(source, replace(_plan(source, "fp32"), context=context), tmp_path)
    assert graph.rope_switch == (32 if context > 32 else 0)
    assert ("rope_length" in graph.inputs) == (context > 32)


QUANTIZED = [("llama", "int8"), ("qwen2", "int4"), ("gemma3_text", "int4-symmetric"), ("llama", "fp16")]


@pytest.mark.parametrize(("model_type", "quant"), QUANTIZED)
def test_computes_with_the_stored_weights(model_type: str, quant: str, tiny_model: Any, tmp_path: Path) -> None:
    """What is left beside the same weights as floats in PyTorch is the rounding of half precision."""
    source = open_source(tiny_model(model_type, tie_word_embeddings=model_type != "qwen2"))
    plan = _plan(source, quant)
    expected = _with_floats(source, plan, tmp_path)
    backend = _coreai(source, plan, tmp_path)
    assert np.abs(_logits(backend) - expected).max() < HALF_TOLERANCE
    weights_bytes = sum(report.size_bytes for report in backend.graph.weights)
    program_bytes = (tmp_path / backend.graph.files[0]).stat().st_size
    kinds = {layer.rope for layer in source.config.layers}
    tables_bytes = 2 * 2 * len(kinds) * plan.context * source.config.attention.head_dim
    assert 0 <= program_bytes - weights_bytes - tables_bytes < PROGRAM_BYTES


def _with_floats(source: Source, plan: Plan, place: Path) -> NDArray[np.float32]:
    """Logits of the plan's weights, as floats, in PyTorch."""
    weights = load_weights(stored_weights(source, plan, place), source.config, DecoderParts())
    attention = PlainAttention(source.config, plan.context)
    decoder = TorchDecoder(source.config, weights, attention, context=plan.context, last_row=False)
    with torch.no_grad():
        logits: NDArray[np.float32] = decoder(torch.from_numpy(TOKENS[None]), torch.tensor([0]))[0].numpy()
    return logits


def test_blocks_are_emitted_as_coreai_opt_emits_them() -> None:
    with quieted():
        optimizer = pytest.importorskip("coreai_opt", reason="coreai-opt is not installed")
        quantization = importlib.import_module("coreai_opt.quantization")
    weight = np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)
    with quieted():
        config = quantization.QuantizerConfig.from_dict({"quantization_config": OPTIMIZER_CONFIG})
        quantizer = quantization.Quantizer(torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False)).eval(), config)
        prepared = quantizer.prepare((torch.zeros(1, 5, 64),))
        expected = _operators(quantizer.finalize(prepared, backend=optimizer.ExportBackend.CoreAI))
        rows = quantize(weight, WeightFormat(4, 32))
        found = _operators(torch.nn.Sequential(Product(Blocks(rows, 4, torch.float32), 64, None)))
    assert "blockwise_shift_scale" in expected
    assert found == expected


LINEAR = {
    "op_state_spec": {
        "weight": {
            "dtype": "int4",
            "qscheme": "symmetric",
            "granularity": {"type": "per_block", "block_size": 32, "axis": 1},
        }
    },
    "op_input_spec": None,
    "op_output_spec": None,
}
OPTIMIZER_CONFIG = {
    "execution_mode": "eager",
    "global_config": None,
    "module_type_configs": {"torch.nn.modules.linear.Linear": LINEAR},
}


def _operators(module: torch.nn.Module) -> str:
    """The Core AI program of a module, without the values of its constants."""
    from coreai_torch import TorchConverter, get_decomp_table  # what it warns of is kept quiet where it is converted

    exported = torch.export.export(module, (torch.zeros(1, 5, 64),)).run_decompositions(get_decomp_table())
    program = str(TorchConverter(mode=TorchConverter.Mode.RELEASE).add_exported_program(exported).to_coreai())
    return re.sub(r'dense(_resource)?<[^>]*>|name = "[^"]*"', "", program.partition("{-#")[0])


def test_two_builds_are_the_same_bytes(tiny_model: Any, tmp_path: Path) -> None:
    """One here, one in a process of its own: hashes, time zones and what was imported before differ."""
    directory, (here, there) = tiny_model("llama"), (tmp_path / name for name in ("here", "there"))
    source = open_source(directory)
    to_coreai.export(source, _plan(source, "int4"), here)
    there.mkdir()
    command = [sys.executable, "-c", BUILD, str(directory), str(there)]
    subprocess.run(command, check=True, env=os.environ | {"TZ": "Asia/Tokyo"}, capture_output=True)
    builds = [
        {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}
        for out in (here, there)
    ]
    assert builds[0] == builds[1]
    assert set(builds[0]) == {f"coreai/model.aimodel/{name}" for name in FILES}


FILES = ("main.mlirb", "main.hash", "metadata.json")
BUILD = """
import sys
from pathlib import Path
from edgekit.converters.to_coreai import export
from edgekit.plan import make_plan
from edgekit.source import open_source
from edgekit.target import load_target
source = open_source(Path(sys.argv[1]))
export(source, make_plan(source, load_target("iphone-16"), format="coreai", quant="int4"), Path(sys.argv[2]))
"""
