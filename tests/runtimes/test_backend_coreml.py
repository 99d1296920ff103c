"""The Core ML backend on a converted model: rows, chunks, sessions and states, against transformers; and Core ML's own path."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.errors import BundleError, GenerationError
from edgekit.graph import Graph
from edgekit.plan import make_plan
from edgekit.quiet import quieted
from edgekit.registry import CONVERTERS, load_attribute
from edgekit.runtime_options import RuntimeOptions
from edgekit.runtimes.backend_coreml import CoreMLBackend, CoreMLDecoder
from edgekit.runtimes.mil_evaluator import load_functions, new_states
from edgekit.runtimes.mil_package import Package
from edgekit.source import open_source
from edgekit.target import load_target

pytestmark = pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools has no package for this machine")

CONTEXT, VOCABULARY, CHUNK = 128, 320, 64
# Of logits up to 6, computed and stored in float16 through two layers.
TOLERANCE = 0.05
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

    source, directory = tiny_model("llama", num_hidden_layers=2), tmp_path_factory.mktemp("coreml")
    opened = open_source(source)
    plan = make_plan(opened, load_target("iphone-16"), format="coreml", quant="fp16", context=CONTEXT)
    graph = load_attribute(CONVERTERS["coreml"])(opened, plan, directory)
    return Converted(directory, graph, AutoModelForCausalLM.from_pretrained(source).eval())


@pytest.fixture(scope="module")
def backend(converted: Converted) -> CoreMLBackend:
    return load(converted)


def load(converted: Converted, *, graph: Graph | None = None, context: int = CONTEXT) -> CoreMLBackend:
    return CoreMLBackend(
        converted.directory, graph or converted.graph, context=context, options=RuntimeOptions(threads=1)
    )


def forward(decoder: CoreMLDecoder, tokens: Tokens, rows: int = 1) -> NDArray[np.float32]:
    return decoder.forward(np.array(tokens, np.int64), rows=rows, rope_length=0)


def text(seed: int, count: int) -> Tokens:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCABULARY, count)]


@pytest.mark.parametrize(
    ("count", "rows"), [(1, 1), (2, 2), (63, 5), (64, 64), (65, 1), (65, 2), (100, 1), (100, 40), (127, 127), (128, 1)]
)
def test_any_number_of_rows_is_that_of_transformers(converted: Converted, backend: Any, count: int, rows: int) -> None:
    tokens = text(count, count)
    found = forward(backend.decoder(), tokens, rows)
    np.testing.assert_allclose(found, converted.expected(tokens)[-rows:], atol=TOLERANCE, rtol=0)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from("ffrc"), st.integers(1, 70)), min_size=3, max_size=9))
def test_sessions_in_any_order_are_as_alone(
    converted: Converted, backend: Any, steps: list[tuple[int, str, int]]
) -> None:
    """Append, rewind, or take over what the other one has cached."""
    decoders, texts = [backend.decoder() for _ in range(2)], [list[int]() for _ in range(2)]
    for number, (who, what, size) in enumerate(steps):
        other = 1 - who
        if what == "f" and len(texts[who]) + size <= CONTEXT:
            texts[who] += text(number, size)
            found = forward(decoders[who], texts[who][-size:], min(size, 3))
            expected = converted.expected(texts[who])[-min(size, 3) :]
            np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
        elif what == "r":
            del texts[who][size:]
            decoders[who].rewind(len(texts[who]))
        elif what == "c":
            decoders[who].write_cache(decoders[other].read_cache())
            texts[who] = list(texts[other])
        assert [decoder.length for decoder in decoders] == list(map(len, texts))


def test_cache_is_what_it_declares(converted: Converted, backend: CoreMLBackend) -> None:
    decoder, layout = backend.decoder(), converted.graph.cache
    assert decoder.cache_bytes == 0
    forward(decoder, text(0, 9))
    assert decoder.cache_bytes == layout.token_bytes * CONTEXT
    cache = decoder.read_cache()
    assert {(each.shape, each.dtype.name) for each in cache} == {((layout.kv_heads, 9, layout.head_dim), layout.dtype)}
    assert len(cache) == 2 * layout.layers


def test_interrupted_chunks_leave_the_sequence_as_it_was(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, tokens = load(converted), text(3, 100)
    decoder = backend.decoder()
    forward(decoder, tokens[:7])
    run, calls = backend.program.run, iter("ok")  # type: ignore[union-attr]

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == "k":
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(backend.program, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        forward(decoder, tokens[7:])
    monkeypatch.undo()
    assert decoder.length == 7
    found = forward(decoder, tokens[7:])
    np.testing.assert_allclose(found, converted.expected(tokens)[-1:], atol=TOLERANCE, rtol=0)


def test_what_does_not_fit_is_refused(backend: CoreMLBackend) -> None:
    decoder = backend.decoder()
    with pytest.raises(ValueError, match="129 tokens in a context of 128"):
        forward(decoder, text(0, 129))
    with pytest.raises(ValueError, match="rewind to 1 of 0"):
        decoder.rewind(1)
    with pytest.raises(ValueError, match="does not slide"):
        decoder.forget(0)
    decoder.close()
    decoder.close()
    with pytest.raises(GenerationError, match="session is closed"):
        forward(decoder, [1])


def test_closed_model_opens_no_session(converted: Converted) -> None:
    backend = load(converted)
    backend.close()
    with pytest.raises(GenerationError, match="model is closed"):
        backend.decoder()


DISAGREEMENTS: dict[str, Callable[[Graph], Graph]] = {
    "vocabulary": lambda graph: replace(graph, vocab_size=321),
    "chunk": lambda graph: replace(graph, chunk=32),
    "no chunk": lambda graph: replace(graph, chunk=0),
    "layers": lambda graph: replace(graph, cache=replace(graph.cache, layers=3)),
    "heads": lambda graph: replace(graph, cache=replace(graph.cache, kv_heads=1)),
    "cache type": lambda graph: replace(graph, cache=replace(graph.cache, dtype="float32")),
    "states": lambda graph: replace(graph, cache=replace(graph.cache, past_key="k", present_key="k")),
    "input": lambda graph: replace(graph, inputs=graph.inputs | {"tokens": "ids"}),  # type: ignore[operator]
    "no input": lambda graph: replace(graph, inputs={"tokens": graph.inputs["tokens"]}),
    "one more input": lambda graph: replace(graph, inputs=graph.inputs | {"rope_length": "length"}),  # type: ignore[operator]
    "output": lambda graph: replace(graph, outputs={"logits": "scores"}),
    "file": lambda graph: replace(graph, files=graph.files[1:]),
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_manifest_that_describes_another_program_is_refused(converted: Converted, what: str) -> None:
    with pytest.raises(BundleError, match="is not the program that the manifest describes"):
        load(converted, graph=DISAGREEMENTS[what](converted.graph))


def test_another_context_than_the_states_have_is_refused(converted: Converted) -> None:
    with pytest.raises(BundleError, match="is not the program"):
        load(converted, context=64)


def test_evaluator_says_what_it_is(backend: CoreMLBackend) -> None:
    if sys.platform != "darwin":
        assert backend.runtime.name == "mil-evaluator"
        assert backend.runtime.note
        assert backend.runtime.is_slow


class ProxyOfEvaluator:
    """In place of the library that coremltools calls Core ML by: its calls, computed by the MIL evaluator."""

    def __init__(self, path: str, units: str, function: str, hints: dict[str, str], asset: object) -> None:
        assert (units, hints, asset) == ("ALL", {}, None)
        self._function = load_functions(Package(Path(path)))[function]

    @staticmethod
    def compileModel(path: str) -> str:  # noqa: N802 - its name
        if "broken" in path:
            raise RuntimeError("compiler error: Espresso exception\nand more")
        return str(shutil.copytree(path, Path(path).parents[2] / "compiled.mlmodelc"))

    def newState(self) -> Any:  # noqa: N802 - its name
        states = new_states(self._function.signature.states)
        return types.SimpleNamespace(
            states=states,
            read_state=lambda name: states[name].astype(np.float16),
            write_state=lambda name, value: np.copyto(states[name], value),
        )

    def predict(self, inputs: dict[str, Any], state: Any) -> dict[str, Any]:
        return {name: value.astype(np.float16) for name, value in self._function(inputs, state.states).items()}


@pytest.fixture
def on_macos(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """coremltools' own Python on a stand-in of what it calls: Core ML is on macOS alone."""
    with quieted():
        from coremltools.models import _compiled_model, utils
    library = types.ModuleType("coremltools.libcoremlpython")
    monkeypatch.setattr(library, "_MLModelProxy", ProxyOfEvaluator, raising=False)
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setattr(_compiled_model, "_MLModelProxy", ProxyOfEvaluator)
    for module in (_compiled_model, utils):
        monkeypatch.setattr(module, "_macos_version", lambda: (15, 5))
    with monkeypatch.context() as patched:
        patched.setattr("edgekit.runtimes.backend_coreml.sys", types.SimpleNamespace(platform="darwin"))
        yield


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML itself is here")
def test_coreml_is_called_as_coremltools_wants(converted: Converted, on_macos: None, tmp_path: Path) -> None:
    copy = converted._replace(directory=Path(shutil.copytree(converted.directory, tmp_path / "a" / "bundle")))
    backend, tokens = load(copy), text(5, 90)
    assert backend.runtime.name == "coreml"
    first, second = backend.decoder(), backend.decoder()
    forward(first, tokens[:80])
    second.write_cache(first.read_cache())
    found = forward(second, tokens[80:], 3)
    np.testing.assert_allclose(found, converted.expected(tokens)[-3:], atol=TOLERANCE, rtol=0)


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML itself is here")
def test_what_coreml_does_not_compile_is_a_clean_error(converted: Converted, on_macos: None, tmp_path: Path) -> None:
    broken = converted._replace(directory=Path(shutil.copytree(converted.directory, tmp_path / "broken")))
    with pytest.raises(BundleError, match=r"not loaded by Core ML: compiler error: Espresso exception$"):
        load(broken)
