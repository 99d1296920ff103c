"""Multimodal checkpoints: the text part alone, against transformers' whole model on the same text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.config import ModelConfig
from edgekit.converters.architectures import gemma3
from edgekit.converters.architectures.fields import ConfigFields
from edgekit.errors import SourceError, UnsupportedError
from edgekit.plan import make_plan
from edgekit.source import open_source
from edgekit.target import load_target

VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA3 = {
    "text_config": {
        "head_dim": 32,
        "sliding_window": 24,
        "query_pre_attn_scalar": 24,
        "num_hidden_layers": 6,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
    },
    "vision_config": VISION,
    "mm_tokens_per_image": 4,
    "image_token_index": 319,
}
MISTRAL3 = {
    "text_config": {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16},
    "image_token_index": 319,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3", GEMMA3),
    "mistral3": ("mistral3", MISTRAL3 | {"tie_word_embeddings": False}),
    "ministral3": ("mistral3", MISTRAL3 | {"text_config": {"model_type": "ministral3", "head_dim": 16}}),
    "mistral3-tied": ("mistral3", MISTRAL3 | {"tie_word_embeddings": True}),
}
NOTE = "the text part of a {} checkpoint: images are not read ({} tensors left out)"


def tensors_in(directory: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    tensors: dict[str, Any] = load_file(directory / "model.safetensors")
    return tensors


def rewritten(original: Path, directory: Path, rename: Any, **config: Any) -> Path:
    """A copy with other tensor names and config values; ... drops a key."""
    from safetensors.numpy import save_file

    shutil.copytree(original, directory)
    tensors = {rename(name): values for name, values in tensors_in(original).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((directory / "config.json").read_text(encoding="utf-8")) | config
    kept = {key: value for key, value in values.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return directory


def as_modules_are_called(name: str) -> str:
    """`model.language_model.layers…`, as some checkpoints were saved."""
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    text = name.removeprefix("language_model.model.")
    return f"model.language_model.{text}" if text != name else f"model.{name}"


@pytest.mark.parametrize("case", CASES)
def test_text_logits_equal_transformers(case: str, tiny_model: Any, check_logits: Any, tmp_path: Path) -> None:
    model_type, config = CASES[case]
    directory = tiny_model(model_type, **config)
    check_logits(directory, directory, tmp_path, chunks=(70, 16))


@pytest.mark.parametrize("case", CASES)
def test_other_names_and_an_unsaid_tie_read_the_same(case: str, tiny_model: Any, tmp_path: Path) -> None:
    model_type, config = CASES[case]
    directory = tiny_model(model_type, **config)
    renamed = rewritten(directory, tmp_path / "renamed", as_modules_are_called, tie_word_embeddings=...)
    expected, found = open_source(directory), open_source(renamed)
    assert found.config == expected.config
    for role, tensors in expected.parts.items():
        for tensor, other in zip(tensors, found.parts[role], strict=True):
            np.testing.assert_array_equal(other.read(), tensor.read())


def test_tie_of_null_counts_as_unsaid(tiny_model: Any, tmp_path: Path) -> None:
    for number, tied in enumerate((True, False)):
        directory = tiny_model("mistral3", **MISTRAL3, tie_word_embeddings=tied)
        unsaid = rewritten(directory, tmp_path / str(number), str, tie_word_embeddings=None)
        assert open_source(unsaid).config.tied_embeddings == tied


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_out_is_noted(case: str, tiny_model: Any) -> None:
    model_type, config = CASES[case]
    directory = tiny_model(model_type, **config)
    source = open_source(directory)
    left_out = [name for name in tensors_in(directory) if not name.startswith("language_model.")]
    assert source.notes == (NOTE.format(model_type, len(left_out)),)
    assert source.notes[0] in make_plan(source, load_target("linux-x86-64"), quant="fp32").notes


def test_tensor_of_no_known_part_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    def rename(name: str) -> str:
        return name.replace("vision_tower", "audio_tower")

    with pytest.raises(UnsupportedError, match=r"audio_tower.* has no place in a gemma3_text decoder"):
        open_source(rewritten(tiny_model("gemma3", **GEMMA3), tmp_path / "audio", rename))


@pytest.mark.parametrize(
    ("text_config", "message"),
    [
        (7, "text_config is 7, expected an object"),
        ({"hidden_size": 0}, "text_config: hidden_size is 0"),
        ({"model_type": "mistral3"}, "text_config: model_type is 'mistral3', expected that of a text model"),
        ({"model_type": ["x"]}, r"text_config: model_type is .*, expected a text"),
        (..., "the config asks for"),
    ],
)
def test_malformed_text_config_is_refused(text_config: Any, message: str, tiny_model: Any, tmp_path: Path) -> None:
    directory = rewritten(tiny_model("gemma3", **GEMMA3), tmp_path / "bad", str, text_config=text_config)
    with pytest.raises(SourceError, match=message):
        open_source(directory)


# ---- The published Gemma 3 configs: text_config says only what is not a default ----

SIGLIP = {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model"}
LINEAR = {"factor": 8.0, "rope_type": "linear"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-3-4b-it": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": LINEAR,
        "sliding_window": 1024,
    },
    "gemma-3-27b-it": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": LINEAR,
        "sliding_window": 1024,
    },
}


def described(text_config: dict[str, Any]) -> ModelConfig:
    return gemma3.describe(ConfigFields(text_config, "config.json"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_text_config_is_read_as_transformers_reads_it(name: str) -> None:
    from transformers import Gemma3Config

    parsed = Gemma3Config(text_config=PUBLISHED[name] | {}, vision_config=SIGLIP)
    assert described(PUBLISHED[name]) == described(parsed.text_config.to_dict())


def test_defaults_of_the_4b_model() -> None:
    config = described(PUBLISHED["gemma-3-4b-it"])
    attention = config.attention
    assert (config.vocab_size, config.context, config.tied_embeddings) == (262_208, 131_072, True)
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.scale) == (8, 4, 256, 256**-0.5)
    assert [layer.window for layer in config.layers[:6]] == [1024] * 5 + [0]
    rotations = [layer.rope for layer in config.layers[4:6] if layer.rope]
    assert [(rope.theta, rope.kind, rope.factor) for rope in rotations] == [(1e4, "default", 1), (1e6, "linear", 8)]
