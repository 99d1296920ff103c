"""The Core AI backend: sequences, caches that grow, and programs that are none."""

from __future__ import annotations

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.errors import BundleError, GenerationError
from edgekit.graph import Graph
from edgekit.plan import make_plan
from edgekit.runtime_options import RuntimeOptions
from edgekit.source import open_source
from edgekit.target import load_target

pytest.importorskip("coreai", reason="the extra coreai is not installed")

from edgekit.converters import to_coreai
from edgekit.runtimes import coreai_program
from edgekit.runtimes.backend_coreai import CoreAIBackend, CoreAIDecoder

CONTEXT = 400  # more than a cache has at first
OPTIONS = RuntimeOptions(threads=1)
PROGRAM = "coreai/model.aimodel/main.mlirb"


@pytest.fixture(scope="module")
def converted(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Graph]:
    """A program, and where it is."""
    source = open_source(tiny_model("llama", max_position_embeddings=512, num_hidden_layers=2))
    plan = make_plan(source, load_target("iphone-16"), format="coreai", quant="int8", context=CONTEXT)
    out = tmp_path_factory.mktemp("coreai")
    return out, to_coreai.export(source, plan, out)


@pytest.fixture(scope="module")
def backend(converted: tuple[Path, Graph]) -> CoreAIBackend:
    directory, graph = converted
    return CoreAIBackend(directory, graph, context=CONTEXT, options=OPTIONS)


TOKENS = np.random.default_rng(2).integers(0, 256, CONTEXT)


def _forward(decoder: CoreAIDecoder, tokens: Any, rows: int = 1) -> Any:
    return decoder.forward(np.asarray(tokens), rows=rows, rope_length=decoder.length + len(tokens))


def test_says_what_it_is(backend: CoreAIBackend) -> None:
    assert backend.runtime.name in {"coreai", "coreai-linux"}
    assert backend.runtime.is_slow == (backend.runtime.name == "coreai-linux")
    assert not backend.runtime.is_slow or "interpreter" in backend.runtime.note


def test_cache_grows_up_to_the_context(backend: CoreAIBackend) -> None:
    decoder, whole = backend.decoder(), backend.decoder()
    sizes = []
    for start in range(0, CONTEXT, 100):
        found = _forward(decoder, TOKENS[start : start + 100])
        sizes.append(decoder.cache_bytes)
    token_bytes = 2 * 2 * 2 * 16 * 2  # keys and values, layers, kv_heads, head_dim, half precision
    assert [size // token_bytes for size in sizes] == [256, 256, CONTEXT, CONTEXT]
    np.testing.assert_array_equal(found, _forward(whole, TOKENS))
    with pytest.raises(ValueError, match="context of 400"):
        _forward(decoder, [1])


def test_sequences_are_apart_and_rewind(backend: CoreAIBackend) -> None:
    one, other = backend.decoder(), backend.decoder()
    first = _forward(one, TOKENS[:20], rows=5)
    assert first.shape == (5, 320)
    assert first.dtype == np.float32
    _forward(other, TOKENS[50:90])
    following = _forward(one, TOKENS[20:21])
    one.rewind(15)
    np.testing.assert_array_equal(_forward(one, TOKENS[15:20], rows=5), first)
    np.testing.assert_array_equal(_forward(one, TOKENS[20:21]), following)
    with pytest.raises(ValueError, match="rewind to 99"):
        one.rewind(99)


def test_cache_can_be_saved_and_put_back(backend: CoreAIBackend) -> None:
    one, other = backend.decoder(), backend.decoder()
    _forward(one, TOKENS[:30])
    saved = [array.copy() for array in one.read_cache()]
    assert [array.shape for array in saved] == [(2, 30, 16)] * 4
    other.write_cache(saved)
    np.testing.assert_array_equal(_forward(other, TOKENS[30:40], rows=3), _forward(one, TOKENS[30:40], rows=3))


def test_sequences_in_threads_do_not_meet(backend: CoreAIBackend) -> None:
    def generate(first: int) -> list[int]:
        decoder, tokens = backend.decoder(), [first]
        for _ in range(12):
            tokens.append(int(_forward(decoder, tokens[-1:])[0].argmax()))
        return tokens

    alone = [generate(first) for first in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(generate, range(4))) == alone


def test_works_inside_of_a_running_loop(backend: CoreAIBackend) -> None:
    async def inside() -> float:
        return float(_forward(backend.decoder(), TOKENS[:4])[0, 0])

    assert asyncio.run(inside()) == float(_forward(backend.decoder(), TOKENS[:4])[0, 0])


def test_closed_sequence_says_so(backend: CoreAIBackend) -> None:
    decoder = backend.decoder()
    decoder.close()
    decoder.close()
    with pytest.raises(GenerationError, match="session is closed"):
        _forward(decoder, [1])


BROKEN = {"empty": b"", "foreign": b"a text, and no program\n" * 20, "zeros": bytes(5000)}


@pytest.mark.parametrize("kind", [*BROKEN, "truncated", "no folder"])
def test_broken_program_is_an_error(kind: str, converted: tuple[Path, Graph], tmp_path: Path) -> None:
    """coreai-core itself ends the process on most of these."""
    directory, graph = converted
    shutil.copytree(directory, tmp_path / "copy")
    program = tmp_path / "copy" / PROGRAM
    if kind == "no folder":
        shutil.rmtree(program.parent)
    else:
        program.write_bytes(BROKEN.get(kind, program.read_bytes()[:-50]))
    with pytest.raises(BundleError, match=r"model\.aimodel is not a program that Core AI takes"):
        CoreAIBackend(tmp_path / "copy", graph, context=CONTEXT, options=OPTIONS)


@pytest.mark.skipif(coreai_program.USES_SYSTEM, reason="the operating system's runtime compiles by itself")
def test_compiler_that_hangs_is_no_broken_program(
    converted: tuple[Path, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coreai_program, "COMPILE_TIMEOUT_S", 0.01)
    with pytest.raises(BundleError, match=r"compiler was not done with model\.aimodel after 0\.01 s"):
        CoreAIBackend(*converted, context=CONTEXT, options=OPTIONS)


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError, KeyError, RuntimeError])
def test_whatever_core_ai_raises_is_one_line(
    error: type[Exception], converted: tuple[Path, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: Any) -> None:
        raise error("no such function\nand much more")

    for opening in ("_open_on_system", "_open_in_interpreter"):
        monkeypatch.setattr(coreai_program, opening, fails)
    with pytest.raises(BundleError, match="is not a program that Core AI takes: ") as caught:
        CoreAIBackend(*converted, context=CONTEXT, options=OPTIONS)
    assert "much more" not in caught.value.message or error is KeyError  # which shows its argument as it is written


def test_program_of_another_model_is_an_error(converted: tuple[Path, Graph]) -> None:
    directory, graph = converted
    for other in (replace(graph, vocab_size=99), replace(graph, cache=replace(graph.cache, layers=3))):
        with pytest.raises(BundleError, match="not the program that the manifest describes"):
            CoreAIBackend(directory, other, context=CONTEXT, options=OPTIONS)
