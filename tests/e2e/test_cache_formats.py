"""Caches of half-precision numbers and of 8-bit integers: what they hold, and that everything done to a cache works on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import edgekit
from edgekit.errors import EdgeKitError
from edgekit.quant import CacheFormat

Floats = NDArray[np.float32]

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [1.5 + 0.7 * index for index in range(8)],
}
# Between them: rotation inside and outside of the kernel, norms of query and key, windows, soft caps, heads that are padded.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "padded": ("llama", {"head_dim": 12}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 32, "sliding_window": 16}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "phi3": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40}),
}
ELEMENT_BYTES = {"float32": 4, "float16": 2, "int8": 1}
# Mean KL of what the gate measured; the models are random and their attention sharp: a real one stays under a tenth of it.
KL_BOUND = {"float16": 1e-4, "int8": 0.02}
# Half-precision keys are rotated by half-precision angles: two roundings of 2^-11 each.
HALF_ROUNDING = 2e-3
QUESTION = [{"role": "user", "content": "hello there"}]


@pytest.fixture(params=[(name, cache) for name in MODELS for cache in ("float16", "int8")], ids="-".join)
def narrow(request: pytest.FixtureRequest, converted: Any) -> tuple[Path, Path, str]:
    """A bundle with a narrow cache, the same model's with a float32 one, and the cache's format."""
    name, cache = request.param
    model_type, config = MODELS[name]
    bundle: Path = converted(model_type, cache=cache, **config)
    return bundle, converted(model_type, **config), cache


def scales_of(bundle: Path) -> list[Floats]:
    """The scales in the program, key and value of each layer in turn."""
    program = onnx.load(bundle / "onnx" / "model.onnx")
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in program.graph.initializer}
    nodes = [node for node in program.graph.node if node.op_type == "GroupQueryAttention"]
    return [arrays[name][0] for node in nodes for name in node.input[12:14]]


def read(bundle: Path, tokens: NDArray[np.int64]) -> tuple[list[Any], Floats]:
    with edgekit.load(bundle, threads=1) as model:
        decoder = model.backend.decoder()
        logits = decoder.forward(tokens, rows=len(tokens), rope_length=len(tokens)).copy()
        return [array.copy() for array in decoder.read_cache()], logits


def test_gate_compares_the_cache_with_a_whole_one(narrow: tuple[Path, Path, str]) -> None:
    bundle, _, cache = narrow
    manifest = json.loads((bundle / "edgekit.json").read_text(encoding="utf-8"))
    (program,) = manifest["programs"]
    assert program["cache"]["dtype"] == cache
    assert 0 < program["quality"]["kl_mean"] < KL_BOUND[cache]
    assert manifest["plan"]["memory"]["kv_bytes"] > 0


def test_cache_holds_the_rounded_keys_and_values(narrow: tuple[Path, Path, str]) -> None:
    bundle, whole, cache = narrow
    tokens = np.random.default_rng(0).integers(0, 256, 30)
    found, _ = read(bundle, tokens)
    expected, _ = read(whole, tokens)
    assert {array.dtype.name for array in found} == {cache}
    for index in (0, 1):  # of the first layer: those of later ones follow from what was read of it
        if cache == "float16":
            np.testing.assert_allclose(found[index], expected[index], rtol=HALF_ROUNDING, atol=HALF_ROUNDING)
        else:
            scale = scales_of(bundle)[index]
            held = np.clip(expected[index], -128 * scale, 127 * scale)
            assert (np.abs(found[index] * scale - held) <= 0.501 * scale + 1e-6).all()
            assert (held == expected[index]).mean() > 0.99, "the ranges are those of texts like these"


def test_steps_read_what_a_whole_prompt_wrote(narrow: tuple[Path, Path, str]) -> None:
    bundle, _, cache = narrow
    tokens = np.random.default_rng(1).integers(0, 256, 60)
    _, expected = read(bundle, tokens)
    with edgekit.load(bundle, threads=1) as model:
        decoder = model.backend.decoder()
        decoder.forward(tokens[:40], rows=1, rope_length=60)
        assert decoder.cache_bytes % ELEMENT_BYTES[cache] == 0
        found = [decoder.forward(tokens[at : at + 1], rows=1, rope_length=60)[0].copy() for at in range(40, 60)]
    # A step's keys may be rounded to the neighbouring integer or half: a chunk's are summed in another order.
    difference = np.abs(np.array(found) - expected[40:])
    assert difference.mean() < 0.02 * expected.std()


def test_copies_go_on_as_the_original(narrow: tuple[Path, Path, str], tmp_path: Path) -> None:
    bundle, _, cache = narrow
    with edgekit.load(bundle, threads=1, session_cache_bytes=0) as model:
        session = model.session()
        first = session.generate(QUESTION, max_tokens=12)
        session.save(tmp_path / "a.session")
        forked, restored = session.fork(), model.restore(tmp_path / "a.session")
        length = len(session.tokens) - 4
        session.rewind(length)
        forked.rewind(length)
        restored.rewind(length)
        messages = [*QUESTION, {"role": "assistant", "content": first.text}, {"role": "user", "content": "go on"}]
        replies = [one.generate(messages, max_tokens=24).tokens for one in (session, forked, restored)]
    assert replies[0] == replies[1] == replies[2]
    layout = model.program.graph.cache
    values = 2 * layout.layers * layout.kv_heads * layout.head_dim * len(first.tokens)
    assert (tmp_path / "a.session").stat().st_size > values * ELEMENT_BYTES[cache]


@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_narrow_cache_slides(cache: str, converted: Any) -> None:
    config = {"sliding_window": 12}
    replies = []
    for kind in (cache, None):
        with edgekit.load(converted("mistral", context=32, cache=kind, **config), threads=1) as model:
            model.end_tokens = frozenset()
            reply = model.generate("hello", raw=True, max_tokens=100, context_policy="sliding", speculate=False)
            assert reply.stats.dropped_tokens > 60
            replies.append(reply.tokens)
    same = sum(one == other for one, other in zip(*replies, strict=True))
    assert same > (90 if cache == "float16" else 10)


def test_half_precision_program_keeps_8_bits(converted: Any) -> None:
    bundle = converted("llama", quant="fp16", cache="int8")
    manifest = json.loads((bundle / "edgekit.json").read_text(encoding="utf-8"))
    assert manifest["programs"][0]["cache"]["dtype"] == "int8"
    assert manifest["programs"][0]["quality"]["kl_mean"] < KL_BOUND["int8"]


def test_8_bit_cache_comes_out_the_same_again(tiny_model: Any, tmp_path: Path) -> None:
    for name in "ab":
        edgekit.convert(
            tiny_model("llama"), target="linux-x86-64", cache=CacheFormat.INT8, out=tmp_path / name, verify=False
        )
    files = ["onnx/model.onnx", "onnx/model.onnx.data"]
    assert [(tmp_path / "a" / file).read_bytes() for file in files] == [
        (tmp_path / "b" / file).read_bytes() for file in files
    ]


def test_context_too_short_to_find_ranges_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(EdgeKitError) as caught:
        edgekit.convert(
            tiny_model("llama"), target="linux-x86-64", cache=CacheFormat.INT8, context=4, out=tmp_path / "a"
        )
    assert caught.value.hint is not None
    assert "--cache float16" in caught.value.hint
    assert not (tmp_path / "a").exists()
