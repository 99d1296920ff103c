"""Configs of well-known checkpoints: the decoder that they are read as is the one that transformers builds from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from edgekit.config import RopeConfig
from edgekit.converters.architectures.fields import ConfigFields
from edgekit.converters.assemble import assemble_source
from edgekit.converters.rope import inverse_frequencies
from edgekit.registry import ARCHITECTURES, load_attribute
from edgekit.source import Provenance, Source, TokenizerFiles

from .published_configs import PUBLISHED

FREQUENCY_TOLERANCE = 1e-6  # relative: both sides compute in float32


@dataclass(frozen=True)
class NamedTensor:
    """As much of a tensor as opening looks at."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"

    def read(self, start: int, stop: int) -> Any:
        return np.zeros((stop - start, 1), np.float32)


def assembled(values: dict[str, Any], tensors: dict[str, Any]) -> Source:
    tokenizer, provenance = TokenizerFiles("{}", None, (), None), Provenance("safetensors", "published", None, None)
    return assemble_source(values, "config.json", tensors, tokenizer, provenance=provenance, weight_files=())


def transformers_config(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**values)


def empty_model(config: Any) -> Any:
    """The first layers of the model, without memory for the weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_are_those_of_transformers(name: str) -> None:
    values = PUBLISHED[name]
    found = load_attribute(ARCHITECTURES[values["model_type"]]).describe(ConfigFields(values, "config.json"))
    config = transformers_config(values)
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    assert [layer.window for layer in found.layers] == [window if kind == "sliding_attention" else 0 for kind in kinds]
    rotated = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    assert [layer.rope is not None for layer in found.layers] == [bool(flag) for flag in rotated]
    assert found.context == config.max_position_embeddings
    assert found.tied_embeddings == config.tie_word_embeddings
    assert found.norm_eps == config.rms_norm_eps


@pytest.mark.parametrize("name", PUBLISHED)
def test_rotation_is_that_of_transformers(name: str) -> None:
    values = PUBLISHED[name]
    found = load_attribute(ARCHITECTURES[values["model_type"]]).describe(ConfigFields(values, "config.json"))
    config = transformers_config(values)
    rotary = rotary_embedding(config)
    for index, layer in enumerate(found.layers):
        if layer.rope:
            prefix = f"{config.layer_types[index]}_" if values["model_type"] == "gemma3_text" else ""
            check_rotation(layer.rope, rotary, prefix)


def rotary_embedding(config: Any) -> Any:
    """Computed for real: on the meta device it would have no values."""
    config = type(config).from_dict(config.to_dict() | {"num_hidden_layers": 6, "layer_types": None})
    return type(empty_model(config).model.rotary_emb)(config)


def check_rotation(rope: RopeConfig, rotary: Any, prefix: str) -> None:
    expected = getattr(rotary, f"{prefix}inv_freq").numpy()
    found = inverse_frequencies(rope, rope.short_factors)
    np.testing.assert_allclose(found, expected, rtol=FREQUENCY_TOLERANCE)
    assert rope.attention_factor == pytest.approx(getattr(rotary, f"{prefix}attention_scaling"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_are_those_of_transformers(name: str) -> None:
    cut = {"num_hidden_layers": 2}
    cut |= {key: PUBLISHED[name][key][:2] for key in ("layer_types", "no_rope_layers") if key in PUBLISHED[name]}
    values = PUBLISHED[name] | cut
    model = empty_model(transformers_config(values))
    source = assembled(values, {key: NamedTensor(key, tuple(value.shape)) for key, value in model.state_dict().items()})
    attention = model.model.layers[0].self_attn
    assert source.config.attention.scale == pytest.approx(attention.scaling)
    assert source.config.attention.softcap == (getattr(attention, "attn_logit_softcapping", None) or 0)
