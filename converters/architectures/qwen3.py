"""Qwen 3 dense models: norms on each query and key head."""

from __future__ import annotations

from edgekit.config import ModelConfig

from .fields import ConfigFields
from .qwen2 import qwen_layers
from .standard import STANDARD_NAMES, decoder

__all__ = ["NAMES", "describe"]

NAMES = STANDARD_NAMES
DEFAULT_HEAD_DIM = 128


def describe(fields: ConfigFields) -> ModelConfig:
    """Map a `model_type: qwen3` config."""
    if not fields.has("head_dim"):
        fields = ConfigFields({**fields.values, "head_dim": DEFAULT_HEAD_DIM}, fields.origin)
    return decoder(fields, layers=qwen_layers(fields), attention={"query_key_norm": True})
