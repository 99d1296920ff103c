"""Llama 2, 3, 3.1 and 3.2, SmolLM 1 and 2, TinyLlama, DeepSeek distillations of Llama."""

from __future__ import annotations

from collections.abc import Mapping

from edgekit.config import ModelConfig

from .fields import ConfigFields
from .standard import STANDARD_NAMES, decoder

__all__ = ["DEFAULTS", "NAMES", "describe"]

NAMES = STANDARD_NAMES
DEFAULTS: Mapping[str, object] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
}


def describe(fields: ConfigFields) -> ModelConfig:
    """Map a `model_type: llama` config."""
    fields = fields.with_defaults(DEFAULTS)
    return decoder(fields)
