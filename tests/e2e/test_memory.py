"""Memory stays flat: over many sessions, many tokens, and all that they leave behind."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.runtimes.engine import LoadedModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the memory in use from /proc"),
]
ALLOWED_BYTES = 6_000_000  # a session of this model takes some 100 kB, a cache of 10,000 tokens 8 MB


@pytest.fixture(autouse=True, scope="module")
def usual_collector() -> Iterator[None]:
    """Garbage is collected as often as in users' processes."""
    tests = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*tests)


def memory() -> int:
    """Resident memory of this process, in bytes."""
    gc.collect()
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS")


@pytest.fixture(params=[0, None], ids=["shares nothing", "shares"])
def model(request: pytest.FixtureRequest, converted: Any) -> Iterator[LoadedModel]:
    bundle = converted("llama", max_position_embeddings=4096)
    with edgekit.load(bundle, threads=1, session_cache_bytes=request.param) as loaded:
        yield loaded


def test_a_thousand_sessions(model: LoadedModel) -> None:
    def one(number: int) -> None:
        session = model.session()
        session.generate(f"prompt number {number} of a thousand", max_tokens=4)
        other = session.fork()
        other.generate(f"prompt number {number} of a thousand, and more", max_tokens=2)
        session.close()
        if number % 2:
            other.close()
        model.generate(f"once, and never again: {number}", max_tokens=2)

    for number in range(300):
        one(number)
    before = memory()
    for number in range(1000):
        one(number)
    assert memory() - before < ALLOWED_BYTES
    assert model.store.kept_bytes <= model.program.graph.cache.token_bytes * model.context


def test_ten_thousand_tokens(model: LoadedModel) -> None:
    model.end_tokens = frozenset()
    session = model.session()

    def reply(speculate: bool) -> None:
        assert session.generate("hello", max_tokens=2000, speculate=speculate).stats.new_tokens == 2000

    for speculate in (True, False):
        reply(speculate)
    before = memory()
    for number in range(5):
        reply(bool(number % 2))
    assert memory() - before < ALLOWED_BYTES


def test_structures_and_streams_that_are_left(model: LoadedModel) -> None:
    def leave() -> None:
        structure = edgekit.JsonSchema({"type": "array", "items": {"type": "integer"}})
        for _ in model.stream("hello", max_tokens=50, structure=structure):
            break
        for _ in model.stream("hello", max_tokens=50):
            break

    for _ in range(100):
        leave()
    before = memory()
    for _ in range(300):
        leave()
    assert memory() - before < ALLOWED_BYTES
