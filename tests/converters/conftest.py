"""Shared by the tests of readers and converters: transformers as the reference, GGUF files as llama.cpp writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edgekit.converters.positional_file import PositionalFile
from edgekit.converters.to_onnx import export
from edgekit.plan import make_plan
from edgekit.runtime_options import RuntimeOptions
from edgekit.runtimes.backend import Decoder
from edgekit.runtimes.backend_onnxruntime import OnnxRuntimeBackend
from edgekit.source import open_source
from edgekit.target import load_target

# Both sides compute in float32 in different orders; logits here are of size 1 to 10.
LOGITS_TOLERANCE = 1e-4
PROMPT, DECODE = 70, 40

Floats = NDArray[np.float32]
LogitsCheck = Callable[..., None]
GgufWriter = Callable[..., Path]
BlockMaker = Callable[..., NDArray[np.uint8]]

ARCHITECTURES = {"gemma3_text": "gemma3"}
TYPE_NORMAL, TYPE_CONTROL, TYPE_UNUSED = 1, 3, 5


@pytest.fixture(scope="session")
def reference_logits() -> Callable[[Path, NDArray[np.int64]], Floats]:
    """`reference_logits(directory, tokens)`: logits [tokens, vocabulary] of one whole forward in transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    def compute(directory: Path, tokens: NDArray[np.int64]) -> Floats:
        multimodal = hasattr(AutoConfig.from_pretrained(directory), "text_config")
        kind = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        model = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits: Floats = model(torch.from_numpy(tokens[None])).logits[0].numpy()
        return logits

    return compute


@pytest.fixture(scope="session")
def check_logits(reference_logits: Any) -> LogitsCheck:
    """`check_logits(model, reference, out)`: the model as emitted in fp32 computes what transformers computes."""

    def check(model: Path, reference: Path, out: Path, *, chunks: tuple[int, ...] = (PROMPT,)) -> None:
        tokens = np.random.default_rng(1).integers(0, 256, PROMPT + DECODE)
        expected = reference_logits(reference, tokens)
        assert np.abs(expected).max() > 1, "a reference with flat logits would prove nothing"
        decoder = _emitted_decoder(model, out)
        for chunk in chunks:
            decoder.rewind(0)
            found = _decoded(decoder, tokens, chunk)
            np.testing.assert_allclose(found, expected, atol=LOGITS_TOLERANCE, rtol=0)

    return check


def _emitted_decoder(model: Path, out: Path) -> Decoder:
    """The model converted without verification, and loaded."""
    source = open_source(model)
    plan = make_plan(source, load_target("linux-x86-64"), quant="fp32")
    graph = export(source, plan, out)
    return OnnxRuntimeBackend(out, graph, context=plan.context, options=RuntimeOptions(threads=2)).decoder()


def _decoded(decoder: Decoder, tokens: NDArray[np.int64], chunk: int) -> Floats:
    """Logits of every position: the prompt in chunks, the rest token by token."""
    steps = [*range(0, PROMPT, chunk), *range(PROMPT, len(tokens) + 1)]
    pieces = [
        decoder.forward(tokens[start:stop], rows=stop - start, rope_length=len(tokens)).copy()
        for start, stop in pairwise(steps)
    ]
    return np.concatenate(pieces)


@pytest.fixture
def log_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[str, int, int]]]:
    """`log_reads()`: file, offset and size of every read from then on."""

    def start() -> list[tuple[str, int, int]]:
        ranges: list[tuple[str, int, int]] = []
        original = PositionalFile.read

        def logged(file: PositionalFile, offset: int, size_bytes: int) -> NDArray[np.uint8]:
            ranges.append((file.path.name, offset, size_bytes))
            return original(file, offset, size_bytes)

        monkeypatch.setattr(PositionalFile, "read", logged)
        return ranges

    return start


# Where a block's half-precision scale and minimum lie, and its six-bit scales (of Q4_K and Q5_K).
_HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


@pytest.fixture(scope="session")
def make_blocks() -> BlockMaker:
    """`make_blocks(kind, rows, columns, seed=0)`: a type's stored rows, uint8 [rows, bytes], of weights around 0.02.

    Quantized from noise where the `gguf` package can do that; else made up: random integers, with scales and minima of like
    sizes as quantizers find them.
    """

    def make(kind: gguf.GGMLQuantizationType, rows: int, columns: int, seed: int = 0) -> NDArray[np.uint8]:
        generator = np.random.default_rng((int(kind), seed))
        if kind.name not in _HALVES:
            noise = generator.normal(0, 0.02, (rows, columns)).astype(np.float32)
            return np.ascontiguousarray(gguf.quants.quantize(noise, kind)).view(np.uint8)
        block, size_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = generator.integers(0, 256, (rows * columns // block, size_bytes), dtype=np.uint8)
        for place in _HALVES[kind.name]:
            halves = generator.uniform(5e-5, 1e-4, len(blocks)).astype(np.float16)
            blocks[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
        return blocks.reshape(rows, -1)

    return make


@pytest.fixture(scope="session")
def write_gguf(make_blocks: BlockMaker) -> GgufWriter:
    """`write_gguf(directory, path, kinds={})`: a Hugging Face model as llama.cpp's converter writes it.

    Weights are float32 but where `kinds` maps a GGUF tensor's name to a quantization type: those that the `gguf` package
    can't quantize to are of `make_blocks`. `extra` sets more metadata.
    """

    def write(directory: Path, path: Path, *, kinds: Any = None, extra: Any = None) -> Path:
        from safetensors.numpy import load_file

        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
        writer = gguf.GGUFWriter(path, architecture)
        _add_metadata(writer, config)
        _add_rope(writer, config)
        _add_tokenizer(writer, directory, config)
        for key, value in (extra or {}).items():
            writer.add_key_value(f"{architecture}.{key}", *value)
        for name, values in _gguf_tensors(config, architecture, load_file(directory / "model.safetensors")):
            kind = (kinds or {}).get(name)
            if kind is None:
                writer.add_tensor(name, values)
            else:
                made = kind.name in _HALVES
                blocks = make_blocks(kind, *values.shape) if made else gguf.quants.quantize(values, kind)
                writer.add_tensor(name, blocks, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_metadata(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] == "phi3":  # zero where there is none
        writer.add_sliding_window(config.get("sliding_window") or 0)
    elif "sliding_attention" in config.get("layer_types", ()):
        writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _add_rope(writer: Any, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    dimensions = int(_head_dim(config) * partial)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(dimensions)
    kind = rope["rope_type"]
    if kind in {"linear", "yarn"}:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(rope, dimensions))
    if kind == "longrope":
        original = config["original_max_position_embeddings"]
        ratio = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0)
        writer.add_rope_scaling_orig_ctx_len(original)
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))


def _llama3_divisors(rope: dict[str, Any], dimensions: int) -> Floats:
    """As llama.cpp's converter computes them."""
    original, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    divisors = []
    for frequency in 1.0 / rope["rope_theta"] ** (np.arange(0, dimensions, 2, dtype=np.float32) / dimensions):
        wave = 2 * math.pi / frequency
        if wave < original / high:
            divisors.append(1.0)
        elif wave > original / low:
            divisors.append(rope["factor"])
        else:
            smooth = (original / wave - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def _add_tokenizer(writer: Any, directory: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    texts = sorted(ids, key=lambda text: int(ids[text]))
    padding = [f"[PAD{index}]" for index in range(len(texts), config["vocab_size"])]
    types = [TYPE_CONTROL if text in special else TYPE_NORMAL for text in texts]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*texts, *padding[:-1], "ab"])
    writer.add_token_types([*types, *[TYPE_UNUSED] * len(padding[:-1]), TYPE_NORMAL])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)


def _gguf_tensors(
    config: dict[str, Any], architecture: str, tensors: dict[str, NDArray[Any]]
) -> list[tuple[str, Floats]]:
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    pairs = []
    for name, values in tensors.items():
        rows = values.astype(np.float32)
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if architecture in {"llama", "smollm3"} and f".{part}." in name:
                rows = rows.reshape(config[heads], 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            rows = rows + np.float32(1)
        pairs.append((names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(rows)))
    return pairs
