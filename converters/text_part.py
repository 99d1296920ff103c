"""Multimodal checkpoints of the described families: their text part, in the names of a text-only checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from edgekit.registry import MULTIMODAL

from .architectures.fields import ConfigFields

__all__ = ["text_part"]

# `language_model.model.layers…` as published and as transformers saves; `model.language_model.layers…` as it calls its modules.
_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
_LEFT_OUT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_HEAD = "lm_head.weight"
_Stored = TypeVar("_Stored")
# What counts for the whole model, and is read from the outer config where both have it.
_SHARED_KEYS = ("bos_token_id", "eos_token_id")


def text_part(
    config: Mapping[str, Any], origin: str, tensors: Mapping[str, _Stored]
) -> tuple[Mapping[str, Any], str, Mapping[str, _Stored], tuple[str, ...]]:
    """The text part of a multimodal checkpoint; any other is returned as it is.

    Args:
        config: Of the checkpoint.
        origin: The file the config came from.
        tensors: By the checkpoint's names.

    Returns:
        The text part's config, where that stands, its tensors by text-only names, and notes on what is left out.

    Raises:
        SourceError: `text_config` is malformed.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MULTIMODAL:
        return config, origin, tensors, ()
    inner = ConfigFields(config, origin).nested("text_config")
    left_out = [name for name in tensors if _LEFT_OUT.match(name)]
    kept = {_text_name(name): tensor for name, tensor in tensors.items() if not _LEFT_OUT.match(name)}
    kind = inner.text("model_type", MULTIMODAL[model_type])
    if kind in MULTIMODAL:
        raise inner.wrong("model_type", kind, "that of a text model")
    values = {**inner.values, "model_type": kind}
    values |= {key: config[key] for key in _SHARED_KEYS if key in config}
    # Published configs say nothing of tying, and the text part's own flag does not count in transformers.
    tied = config.get("tie_word_embeddings")
    values["tie_word_embeddings"] = _HEAD not in kept if tied is None else tied
    counted = f" ({len(left_out)} tensors left out)" if left_out else ""
    return values, inner.origin, kept, (f"the text part of a {model_type} checkpoint: images are not read{counted}",)


def _text_name(name: str) -> str:
    for prefix, plain in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name
