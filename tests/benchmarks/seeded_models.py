"""Seeded models of real shapes, written as Hugging Face directories in seconds, for benchmarks that need sizes but no sense.

Not a benchmark itself. Weights are random and repeat; the tokenizer has as many tokens and merges as the vocabulary says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

PIECES = [chr(code) for code in range(ord("a"), ord("z") + 1)]
SEED_WEIGHTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama-like decoder. `tied`: the head is the embedding."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    model_type: str = "llama"


# The shapes of known models, and one each that is small, has an untied head, and keeps a cache for every head.
SHAPES = {
    "tiny-30m": Shape(384, 8, 6, 6, 64, 1024, 32_000, tied=False),
    "smollm2-360m": Shape(960, 32, 15, 5, 64, 2560, 49_152, tied=True),
    "many-heads-400m": Shape(1024, 24, 16, 16, 64, 2816, 32_000, tied=False),
    "qwen3-0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151_936, tied=True, model_type="qwen3"),
    "llama3.2-1b": Shape(2048, 16, 32, 8, 64, 8192, 128_256, tied=True),
}


def write_model(directory: Path, shape: Shape) -> Path:
    """Write config, weights (bfloat16) and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": shape.model_type,
        "architectures": [f"{shape.model_type.capitalize()}ForCausalLM"],
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "tokenizer.json").write_text(json.dumps(_tokenizer(shape.vocab)), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<end>"}', encoding="utf-8")
    _write_weights(directory / "model.safetensors", _tensors(shape))
    return directory


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, head_dim, wide = shape.hidden, shape.head_dim, shape.intermediate
    query, kept = shape.heads * head_dim, shape.kv_heads * head_dim
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not shape.tied:
        tensors["lm_head.weight"] = (shape.vocab, hidden)
    for layer in range(shape.layers):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (kept, hidden),
            "self_attn.v_proj": (kept, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        if shape.model_type == "qwen3":
            parts |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
        tensors |= {f"model.layers.{layer}.{name}.weight": size for name, size in parts.items()}
    return tensors


def _write_weights(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file whose tensors are cut from one random row of bfloat16 numbers, each from another place on.

    ONNX Runtime keeps one packed copy of weights that are the same.
    """
    normal = np.random.default_rng(0).normal(0.0, 0.02, SEED_WEIGHTS).astype(np.float32)
    seed = (normal.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    ones = np.full(SEED_WEIGHTS // 64, 0x3F80, np.uint16).tobytes()
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, shape in enumerate(tensors.values()):
            source, left = (ones if len(shape) == 1 else seed), 2 * int(np.prod(shape))
            start = 2 * (7919 * index) % len(source)
            while left:
                left -= file.write(source[start : start + left])
                start = 0


def _tokenizer(size: int) -> dict[str, Any]:
    """A BPE tokenizer of `size` tokens: letters, then pairs of what is there, each with its merge."""
    vocabulary = {"<begin>": 0, "<end>": 1} | {piece: 2 + index for index, piece in enumerate(PIECES)}
    pairs = ((left, right) for left in _words() for right in PIECES)
    merges = list(islice(pairs, size - len(vocabulary)))
    vocabulary |= {left + right: len(vocabulary) + index for index, (left, right) in enumerate(merges)}
    added = [
        {"id": index, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for index, text in enumerate(("<begin>", "<end>"))
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [list(pair) for pair in merges]},
    }


def _words() -> Any:
    """All words of letters, the shortest first."""
    words = PIECES
    while True:
        yield from words
        words = [word + piece for word in words for piece in PIECES]
