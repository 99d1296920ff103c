"""Converted tiny models, and transformers' own answer to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.quant import CacheFormat
from edgekit.runtimes.engine import LoadedModel

Converted = Callable[..., Path]


@pytest.fixture(scope="session")
def converted(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """`converted(model_type, quant="fp32", context=None, cache=None, **config)`: the bundle, made once a session."""
    made: dict[str, Path] = {}

    def make(
        model_type: str, *, quant: str = "fp32", context: int | None = None, cache: str | None = None, **config: Any
    ) -> Path:
        key = repr((model_type, quant, context, cache, sorted(config.items(), key=str)))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundles") / f"{model_type}.edgekit"
            source = tiny_model(model_type, **config)
            kind = CacheFormat(cache) if cache else None
            edgekit.convert(source, target="linux-x86-64", quant=quant, context=context, cache=kind, out=made[key])
        return made[key]

    return make


@pytest.fixture
def llama(converted: Converted) -> Any:
    """A loaded tiny llama in full precision, context 256; it shares nothing between sessions."""
    with edgekit.load(converted("llama"), threads=2, session_cache_bytes=0) as model:
        assert isinstance(model, LoadedModel)
        yield model


@pytest.fixture
def transformers_greedy() -> Callable[[Path, list[int], int], list[int]]:
    """`transformers_greedy(directory, prompt, count)`: the tokens that transformers' generate() adds, no end token."""

    def generate(directory: Path, prompt: list[int], count: int) -> list[int]:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
        settings = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=257, pad_token_id=257)
        ids = torch.tensor([prompt])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return [int(token) for token in found[0, len(prompt) :] if token != 257]

    return generate


@pytest.fixture(scope="session")
def long_rope_bundle(converted: Any) -> Path:
    """A phi3 whose rotation changes past 32 tokens."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * index for index in range(8)],
        "long_factor": [1.5 + 0.7 * index for index in range(8)],
    }
    bundle: Path = converted("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    return bundle
