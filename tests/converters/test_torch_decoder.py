"""The PyTorch decoder against transformers' own modelling code on the same seeded weights, and as it is exported."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
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
from edgekit.plan import make_plan
from edgekit.quant import WeightFormat
from edgekit.source import open_source
from edgekit.target import load_target

# Both sides compute in float32 in different orders; logits here are of size 1 to 10.
LOGITS_TOLERANCE = 1e-4
CONTEXT, PROMPT, TOKENS = 120, 70, 110  # far past half of the context


def _decoder(directory: Path, place: Path, *, packed: bool = True, quant: str = "fp32", **options: Any) -> TorchDecoder:
    source = open_source(directory)
    plan = make_plan(source, load_target("linux-x86-64"), quant=quant)
    weights = load_weights(stored_weights(source, plan, place), source.config, DecoderParts(packed=packed))
    return TorchDecoder(source.config, weights, PlainAttention(source.config, CONTEXT), context=CONTEXT, **options)


def _run(decoder: Any, tokens: NDArray[np.int64], chunk: int) -> NDArray[np.float32]:
    steps = [*range(0, PROMPT, chunk), *range(PROMPT, len(tokens) + 1)]
    length = torch.tensor([len(tokens)])
    with torch.no_grad():
        pieces = [
            decoder(torch.from_numpy(tokens[None, start:stop]), torch.tensor([start]), length)[0]
            for start, stop in pairwise(steps)
        ]
    return torch.cat(pieces).numpy()


def test_logits_equal_transformers(architecture: Any, tiny_model: Any, reference_logits: Any, tmp_path: Path) -> None:
    model_type, changes = architecture
    directory = tiny_model(model_type, **changes)
    tokens = np.random.default_rng(1).integers(0, 256, TOKENS)
    expected = reference_logits(directory, tokens)
    for packed, chunk in ((True, PROMPT), (False, 16)):
        found = _run(_decoder(directory, tmp_path, packed=packed, last_row=False), tokens, chunk)
        np.testing.assert_allclose(found, expected, atol=LOGITS_TOLERANCE, rtol=0)


def _exported(decoder: TorchDecoder, example: tuple[Any, ...], dynamic: Any = None) -> Any:
    return torch.export.export(decoder, example, dynamic_shapes=dynamic).module()


def test_exports_with_a_dynamic_number_of_tokens(family: Any, tiny_model: Any, tmp_path: Path) -> None:
    model_type, changes = family
    decoder = _decoder(tiny_model(model_type, **changes), tmp_path, last_row=False)
    example = torch.zeros(1, 5, dtype=torch.int64), torch.tensor([3]), torch.tensor([8])
    new = torch.export.Dim("new", min=1, max=CONTEXT - 1)
    exported = _exported(decoder, example, {"tokens": {1: new}, "start": None, "rope_length": None})
    tokens = np.random.default_rng(1).integers(0, 256, TOKENS)
    np.testing.assert_allclose(_run(exported, tokens, PROMPT), _run(decoder, tokens, PROMPT), atol=1e-5, rtol=0)


@pytest.mark.parametrize("new", [1, 8])
def test_exports_with_static_shapes_and_chosen_rows(new: int, tiny_model: Any, tmp_path: Path) -> None:
    decoder = _decoder(tiny_model("llama"), tmp_path, last_row=False)
    tokens = torch.arange(new)[None]
    rows = torch.tensor([new - 1])
    exported = _exported(decoder, (tokens, torch.tensor(3), None, rows))
    with torch.no_grad():
        found, whole = exported(tokens, torch.tensor(3), None, rows), decoder(tokens, torch.tensor(3))
    torch.testing.assert_close(found[0, 0], whole[0, new - 1], atol=1e-5, rtol=0)
    decoder.last_row = True
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens, torch.tensor([3])), found, atol=1e-5, rtol=0)


def test_a_tied_head_may_be_stored_apart(tiny_model: Any, tmp_path: Path) -> None:
    source = open_source(tiny_model("llama", tie_word_embeddings=True))
    plan = make_plan(source, load_target("linux-x86-64"), quant="int4-mixed")
    head = replace(plan.weights["embedding"], format=WeightFormat(8, 32))
    plan = replace(plan, weights={**plan.weights, "head": head})
    assert "head" in plan.calibrated
    texts = [list(range(40))]
    weights = load_weights(stored_weights(source, plan, tmp_path, texts=texts), source.config, DecoderParts())
    embedding, stored = weights.embedding.get_parameter("weight"), weights.head.get_parameter("weight")
    exact = torch.from_numpy(source.parts["embedding"][0].read())
    assert 0 < (stored - exact).norm() < 0.2 * (embedding - exact).norm()
    assert [report.role for report in weights.reports][-1] == "head"
