"""LiteRT: a tiny model converted in LiteRT's own environment, and run; against transformers and the ONNX program's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekit.errors import BundleError, ConversionError, GenerationError
from edgekit.graph import Graph
from edgekit.plan import make_plan
from edgekit.registry import CONVERTERS, load_attribute
from edgekit.runtime_options import RuntimeOptions
from edgekit.runtimes.backend_litert import LitertBackend, LitertDecoder
from edgekit.source import open_source
from edgekit.target import load_target

pytestmark = [
    pytest.mark.slow,  # litert-torch takes most of a minute, its environment another one the first time
    pytest.mark.skipif(find_spec("ai_edge_litert") is None, reason="ai-edge-litert is not installed"),
]

CONTEXT, VOCABULARY = 96, 320
# Activations are rounded to 8 bits: of logits up to 6, about as far as the ONNX program's int8 products are.
TOLERANCE = 0.5
KL_BOUND = 0.02  # edgekit.bounds.BOUND_8_BITS
Tokens = list[int]


class Converted(NamedTuple):
    """A program on disk, its description, and the model that it was made from."""

    directory: Path
    graph: Graph
    model: Any

    def expected(self, tokens: Tokens) -> NDArray[np.float32]:
        """Logits [tokens, vocabulary], by transformers in float32."""
        import torch

        with torch.no_grad():
            logits: NDArray[np.float32] = self.model(torch.tensor([tokens])).logits[0].numpy()
        return logits


@pytest.fixture(scope="module")
def converted(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    from transformers import AutoModelForCausalLM

    source, directory = tiny_model("llama", num_hidden_layers=2), tmp_path_factory.mktemp("litert") / "bundle"
    directory.mkdir()
    opened = open_source(source)
    plan = make_plan(opened, load_target("galaxy-s24"), format="litert", quant="int8", context=CONTEXT)
    try:
        graph = load_attribute(CONVERTERS["litert"])(opened, plan, directory)
    except ConversionError as error:
        if "can't be installed" not in error.message:
            raise
        pytest.skip(error.message)
    return Converted(directory, graph, AutoModelForCausalLM.from_pretrained(source).eval())


@pytest.fixture(scope="module")
def backend(converted: Converted) -> LitertBackend:
    return load(converted)


def load(converted: Converted, *, graph: Graph | None = None, context: int = CONTEXT) -> LitertBackend:
    options = RuntimeOptions(threads=1)
    return LitertBackend(converted.directory, graph or converted.graph, context=context, options=options)


def forward(decoder: LitertDecoder, tokens: Tokens, rows: int = 1) -> NDArray[np.float32]:
    return decoder.forward(np.array(tokens, np.int64), rows=rows, rope_length=0)


def text(seed: int, count: int) -> Tokens:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCABULARY, count)]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def test_program_is_as_near_as_its_numbers_are(converted: Converted, backend: LitertBackend) -> None:
    tokens = text(1, 90)
    expected, decoder = converted.expected(tokens), backend.decoder()
    found = np.concatenate([forward(decoder, tokens[:70], 70), *(forward(decoder, [each]) for each in tokens[70:])])
    wanted, got = log_softmax(expected), log_softmax(found)
    assert (np.exp(wanted) * (wanted - got)).sum(axis=1).mean() < KL_BOUND
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_weights_are_the_quantizers_whole_numbers(converted: Converted) -> None:
    assert converted.graph.weights
    matrices = [report for report in converted.graph.weights if not report.role.endswith("norm")]
    assert {report.bits for report in matrices} == {8}
    size_bytes = (converted.directory / converted.graph.files[0]).stat().st_size
    assert size_bytes < 3 * sum(
        report.size_bytes for report in converted.graph.weights
    )  # floats are four times as large


def test_rows_chunks_and_sessions_agree(converted: Converted, backend: LitertBackend) -> None:
    tokens = text(2, CONTEXT)
    first, second = backend.decoder(), backend.decoder()
    whole = forward(first, tokens, CONTEXT)
    forward(second, tokens[:60])
    second.rewind(50)
    np.testing.assert_allclose(forward(second, tokens[50:93], 3), whole[90:93], atol=TOLERANCE, rtol=0)
    third = backend.decoder()
    third.write_cache(second.read_cache())
    np.testing.assert_array_equal(forward(third, tokens[93:]), forward(second, tokens[93:]))


def test_what_does_not_fit_is_refused(converted: Converted, backend: LitertBackend) -> None:
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
def test_manifest_that_describes_another_program_is_refused(converted: Converted, what: str) -> None:
    with pytest.raises(BundleError, match="is not the program that the manifest describes"):
        load(converted, graph=DISAGREEMENTS[what](converted.graph))


@pytest.mark.parametrize("data", [b"", b"TFL3", b"not a program" * 100])
def test_foreign_file_is_a_clean_error(converted: Converted, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / converted.graph.files[0]
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    with pytest.raises(BundleError) as caught:
        load(converted._replace(directory=tmp_path))
    assert "\n" not in caught.value.message
