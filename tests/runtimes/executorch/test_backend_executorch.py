"""The ExecuTorch backend against plain PyTorch: any rows, any order of sessions, one copy of the weights."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import BundleError, GenerationError
from edgekit.graph import Graph
from edgekit.runtime_options import RuntimeOptions
from edgekit.runtimes import executorch_runtime
from edgekit.runtimes.backend_executorch import ExecuTorchBackend, ExecuTorchDecoder, _parts

# float32 in another order of additions; logits are of size 1
TOLERANCE = 2e-5
CONTEXT, VOCABULARY = 64, 128
Tokens = list[int]


@pytest.fixture(scope="module")
def backend(exported: Any) -> ExecuTorchBackend:
    return load(exported)


def load(exported: Any, *, graph: Graph | None = None, context: int = CONTEXT, **options: Any) -> ExecuTorchBackend:
    settings = RuntimeOptions(**{"threads": 1} | options)
    return ExecuTorchBackend(exported.directory, graph or exported.graph, context=context, options=settings, tried=True)


def forward(decoder: ExecuTorchDecoder, tokens: Tokens, rows: int = 1) -> Any:
    return decoder.forward(np.array(tokens, np.int64), rows=rows, rope_length=0)


def text(seed: int, count: int) -> Tokens:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCABULARY, count)]


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (2, 2), (9, 9), (24, 1), (40, 1), (61, 17), (64, 64)])
def test_any_number_of_rows_is_that_of_pytorch(exported: Any, backend: Any, count: int, rows: int) -> None:
    """Also more tokens, and more rows, than the program takes at once."""
    tokens = text(count, count)
    found = forward(backend.decoder(), tokens, rows)
    np.testing.assert_allclose(found, exported.module.whole(tokens)[-rows:], atol=TOLERANCE, rtol=0)


@given(total=st.integers(1, 300), most_tokens=st.integers(1, 40), most_rows=st.integers(1, 20), data=st.data())
def test_parts_give_every_row_once(total: int, most_tokens: int, most_rows: int, data: Any) -> None:
    rows = data.draw(st.integers(1, total))
    parts = _parts(total, rows, most_tokens, most_rows)
    assert sum(new for new, _ in parts) == total
    assert sum(wanted for _, wanted in parts) == rows
    assert all(1 <= new <= most_tokens and wanted <= min(new, most_rows) for new, wanted in parts)
    wanted_after = [wanted == new for new, wanted in parts if wanted][1:]
    assert all(wanted_after), "rows are of the last tokens, without a gap"


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.sampled_from("frwc"), st.integers(1, 9)), min_size=4, max_size=20)
)
def test_sessions_in_any_order_are_as_alone(exported: Any, backend: Any, steps: list[tuple[int, str, int]]) -> None:
    """Append, rewind, copy from the next session, or close and open anew."""
    decoders, texts = [backend.decoder() for _ in range(3)], [list[int]() for _ in range(3)]
    for number, (who, what, size) in enumerate(steps):
        if what == "f" and len(texts[who]) + size <= CONTEXT:
            texts[who] += text(number, size)
            found = forward(decoders[who], texts[who][-size:], min(size, 5))
            expected = exported.module.whole(texts[who])[-min(size, 5) :]
            np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
        elif what == "r":
            del texts[who][size:]
            decoders[who].rewind(len(texts[who]))
        elif what == "w":
            other = (who + 1) % 3
            decoders[who].write_cache(decoders[other].read_cache())
            texts[who] = list(texts[other])
        elif what == "c":
            decoders[who].close()
            decoders[who], texts[who] = backend.decoder(), []
        assert [decoder.length for decoder in decoders] == [len(tokens) for tokens in texts]


def test_a_turn_changes_nothing(backend: Any) -> None:
    """Not one bit: what comes back is what was there."""
    tokens, alone, turns = text(0, 30), backend.decoder(), backend.decoder()
    expected = [forward(alone, tokens[start : start + 10]).copy() for start in (0, 10, 20)]
    for start, row in zip((0, 10, 20), expected, strict=True):
        assert np.array_equal(forward(turns, tokens[start : start + 10]), row)
        forward(backend.decoder(), text(start, 40))


def test_rewind_waits_while_another_session_saves_this_one(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is a length and as many tokens: a rewind in between would be undone."""
    backend = load(exported)
    first, second = backend.decoder(), backend.decoder()
    forward(first, text(1, 12))
    reserve, rewinding = first._reserve, threading.Thread(target=first.rewind, args=(5,))

    def reserve_slowly(length: int) -> None:
        rewinding.start()
        rewinding.join(0.2)  # time enough to get between, if nothing keeps it from that
        reserve(length)

    monkeypatch.setattr(first, "_reserve", reserve_slowly)
    forward(second, text(2, 3))
    rewinding.join()
    assert first.length == 5


def test_cache_is_as_declared(backend: Any) -> None:
    decoder, other = backend.decoder(), backend.decoder()
    assert [array.shape for array in decoder.read_cache()] == [(2, 0, 16)] * 4
    forward(decoder, text(1, 12))
    kept = [array.copy() for array in decoder.read_cache()]
    assert [array.shape for array in kept] == [(2, 12, 16)] * 4
    assert decoder.cache_bytes >= sum(array.nbytes for array in kept)
    forward(other, text(2, 20))
    for array, expected in zip(decoder.read_cache(), kept, strict=True):
        assert np.array_equal(array, expected)
    with pytest.raises(ValueError, match="starts at position 3"):
        other.write_cache(kept, 3)
    with pytest.raises(ValueError, match="does not slide"):
        other.forget(1)


def test_sessions_share_one_method(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are packed once."""
    loaded: list[str] = []
    load_method = executorch_runtime.ProgramFile.load_method

    def counted(file: executorch_runtime.ProgramFile, name: str) -> Any:
        loaded.append(name)
        return load_method(file, name)

    monkeypatch.setattr(executorch_runtime.ProgramFile, "load_method", counted)
    backend = load(exported)
    for decoder in [backend.decoder() for _ in range(5)]:
        forward(decoder, text(3, 4))
    assert loaded == ["forward"]


def test_what_would_end_the_process_is_refused(backend: Any) -> None:
    decoder = backend.decoder()
    for token in (-1, VOCABULARY):
        with pytest.raises(ValueError, match="outside of a vocabulary of 128"):
            forward(decoder, [1, token])
    forward(decoder, text(4, CONTEXT))
    with pytest.raises(ValueError, match="65 tokens in a context of 64"):
        forward(decoder, [1])
    with pytest.raises(ValueError, match="rewind to 65 of 64"):
        decoder.rewind(65)
    assert decoder.length == CONTEXT


def test_closing(exported: Any) -> None:
    backend = load(exported)
    open_, closed = backend.decoder(), backend.decoder()
    forward(closed, text(5, 6))
    closed.close()
    closed.close()
    with pytest.raises(GenerationError, match="the session is closed"):
        forward(closed, [1])
    backend.close()
    with pytest.raises(GenerationError, match="the model is closed"):
        backend.decoder()
    tokens = text(6, 8)
    np.testing.assert_allclose(forward(open_, tokens)[0], exported.module.whole(tokens)[-1], atol=TOLERANCE, rtol=0)


def test_session_that_nobody_closed_leaves_the_buffers(exported: Any, backend: Any) -> None:
    forward(backend.decoder(), text(7, 20))
    gc.collect()
    decoder, tokens = backend.decoder(), text(8, 9)
    np.testing.assert_allclose(forward(decoder, tokens)[0], exported.module.whole(tokens)[-1], atol=TOLERANCE, rtol=0)


def test_models_share_a_pool_and_keep_their_threads(exported: Any) -> None:
    count = executorch_runtime._bindings()._threadpool_get_thread_count
    models = {threads: load(exported, threads=threads) for threads in (1, 2)}
    before = torch.get_num_threads()
    for threads in (1, 2, 1):
        forward(models[threads].decoder(), text(9, 5))
        assert count() == threads
        assert torch.get_num_threads() == before, "PyTorch's own threads are its user's"


def test_weights_may_be_read_rather_than_mapped(exported: Any) -> None:
    tokens = text(10, 7)
    found = forward(load(exported, mapped_weights=False).decoder(), tokens)
    np.testing.assert_allclose(found[0], exported.module.whole(tokens)[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "changed",
    [
        {"vocab_size": 127},
        {"cache": {"layers": 3}},
        {"cache": {"kv_heads": 1}},
        {"cache": {"head_dim": 8}},
        {"cache": {"dtype": "float16"}},
        {"cache": {"dtype": "int8"}},
        {"cache": {"past_value": "layers.{}.values"}},
    ],
    ids=str,
)
def test_other_program_than_the_manifest_says(exported: Any, changed: dict[str, Any]) -> None:
    graph: Graph = exported.graph
    if "cache" in changed:
        changed = {"cache": replace(graph.cache, **changed["cache"])}
    with pytest.raises(BundleError, match="not the program that the manifest describes"):
        load(exported, graph=replace(graph, **changed))


@pytest.mark.parametrize("context", [63, 65])
def test_other_context_than_the_fixed_one(exported: Any, context: int) -> None:
    with pytest.raises(BundleError, match="not the program that the manifest describes"):
        load(exported, context=context)
