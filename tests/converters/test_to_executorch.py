"""ExecuTorch programs: run by ExecuTorch's own runtime against transformers and against the same weights in floats."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgekit.converters.stored_weights import stored_weights
from edgekit.converters.torch_attention import PlainAttention
from edgekit.converters.torch_decoder import TorchDecoder
from edgekit.converters.torch_weights import DecoderParts, load_weights
from edgekit.errors import ConversionError
from edgekit.graph import Graph
from edgekit.plan import Plan, make_plan
from edgekit.quiet import quieted
from edgekit.source import open_source
from edgekit.target import load_target

pytest.importorskip("executorch", reason="executorch is not installed")
from edgekit.converters import to_executorch

# Both sides compute in float32 in different orders; logits here are of size 1 to 10.
LOGITS_TOLERANCE = 1e-4
# Inputs of each product have 8 bits, with a scale for each token: a few steps in a hundred, over two layers.
ROUNDED_INPUTS = 0.05
CONTEXT, TOKENS = 120, 110
# (new tokens, rows of logits): prompts in pieces, one token at a time, and pieces past half of the context.
CALLS = ((40, to_executorch.ROWS), (28, 1), *[(1, 1)] * 6, (16, to_executorch.ROWS), (20, 9))


def _exported(directory: Path, out: Path, quant: str) -> tuple[Graph, Plan]:
    source = open_source(directory)
    plan = make_plan(source, load_target("linux-x86-64"), format="executorch", quant=quant, context=CONTEXT)
    return to_executorch.export(source, plan, out), plan


def _logits(graph: Graph, out: Path, tokens: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(position of the first row, rows) of each call."""
    from executorch.runtime import Runtime

    with quieted():
        method = Runtime.get().load_program(out / graph.files[0]).load_method("forward")
    start = 0
    for new, rows in CALLS:
        piece = torch.from_numpy(tokens[start : start + new]).expand(rows, new).contiguous()
        rest = [torch.tensor([TOKENS])] if "rope_length" in graph.inputs else []
        found = method.execute([piece, torch.tensor([start]), *rest])[0]
        start += new
        yield start - rows, found[0].clone().numpy()


def test_float_programs_equal_transformers(family: Any, tiny_model: Any, reference_logits: Any, tmp_path: Path) -> None:
    model_type, changes = family
    if not any(isinstance(value, list) for value in changes.values()):  # which say something of each layer
        changes = changes | {"num_hidden_layers": 2}
    directory = tiny_model(model_type, **changes)
    tokens = np.random.default_rng(1).integers(0, 256, TOKENS)
    expected = reference_logits(directory, tokens)
    graph, _ = _exported(directory, tmp_path, "fp32")
    for first, found in _logits(graph, tmp_path, tokens):
        np.testing.assert_allclose(found, expected[first : first + len(found)], atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("quant", "changes"), [("int8", {}), ("int4", {"tie_word_embeddings": True})])
def test_integer_programs_compute_with_the_stored_weights(
    quant: str, changes: dict[str, Any], tiny_model: Any, tmp_path: Path
) -> None:
    directory = tiny_model("qwen2", num_hidden_layers=2, **changes)
    tokens = np.random.default_rng(1).integers(0, 256, TOKENS)
    graph, plan = _exported(directory, tmp_path, quant)
    expected = _in_floats(directory, plan, tokens, tmp_path)
    for first, found in _logits(graph, tmp_path, tokens):
        error = found - expected[first : first + len(found)]
        assert np.sqrt(np.square(error).mean()) < ROUNDED_INPUTS * expected.std()
    assert {report.bits for report in graph.weights if report.block_size} == ({8} if quant == "int8" else {4, 8})
    assert graph.operators["forward"]["call xnnpack"] <= 2 + 2, (
        "one piece before each attention, one after the last, the head"
    )


def _in_floats(directory: Path, plan: Plan, tokens: NDArray[np.int64], place: Path) -> NDArray[np.float32]:
    """Logits of the weights that the plan stores, computed in floats."""
    source = open_source(directory)
    weights = load_weights(stored_weights(source, plan, place), source.config, DecoderParts())
    attention = PlainAttention(source.config, CONTEXT)
    decoder = TorchDecoder(source.config, weights, attention, context=CONTEXT, last_row=False)
    with torch.no_grad():
        logits: NDArray[np.float32] = decoder(torch.from_numpy(tokens[None]), torch.tensor([0]))[0].numpy()
    return logits


def test_metadata_is_what_the_runners_ask_for(tiny_model: Any, tmp_path: Path) -> None:
    from executorch.runtime import Runtime

    directory = tiny_model("llama", num_hidden_layers=1)
    graph, _ = _exported(directory, tmp_path, "fp32")
    with quieted():
        program = Runtime.get().load_program(tmp_path / graph.files[0])
        found = {name: program.load_method(name).execute([]) for name in program.method_names - {"forward"}}
    assert found == {
        "get_bos_id": [256],
        "get_eos_ids": [257],
        "get_max_context_len": [CONTEXT],
        "get_max_seq_len": [CONTEXT],
        "get_n_layers": [1],
        "get_vocab_size": [320],
        "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [True],
        "enable_dynamic_shape": [True],
    }


def test_a_disk_that_fills_up_is_not_the_tools_fault(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fills(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(to_executorch, "lower", fills)
    with pytest.raises(ConversionError, match=r"^model.pte can't be written: the disk is full$"):
        _exported(tiny_model("llama"), tmp_path, "fp32")


def test_a_tool_that_fails_is_an_error_of_one_line(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr(to_executorch, "lower", fails)
    with pytest.raises(ConversionError, match=r"^ExecuTorch's tools failed: no such operator$"):
        _exported(tiny_model("llama", num_hidden_layers=1), tmp_path, "fp32")
