"""Qwen 3 dense models: norms on each query and key head."""

from __future__ import annotations

from collections.abc import Mapping

from edgekit.config import ModelConfig

from . import qwen2
from .fields import ConfigFields
from .standard import STANDARD_NAMES, decoder

__all__ = ["DEFAULTS", "NAMES", "describe"]

NAMES = STANDARD_NAMES
DEFAULTS: Mapping[str, object] = {**qwen2.DEFAULTS, "head_dim": 128}


def describe(fields: ConfigFields) -> ModelConfig:
    """Map a `model_type: qwen3` config."""
    fields = fields.with_defaults(DEFAULTS)
    return decoder(fields, layers=qwen2.qwen_layers(fields), attention={"query_key_norm": True})
