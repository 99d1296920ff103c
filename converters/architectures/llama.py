"""Llama 2, 3, 3.1 and 3.2, SmolLM 1 and 2, TinyLlama, DeepSeek distillations of Llama."""

from __future__ import annotations

from edgekit.config import ModelConfig

from .fields import ConfigFields
from .standard import STANDARD_NAMES, decoder

__all__ = ["NAMES", "describe"]

NAMES = STANDARD_NAMES


def describe(fields: ConfigFields) -> ModelConfig:
    """Map a `model_type: llama` config."""
    return decoder(fields)
