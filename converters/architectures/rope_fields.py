"""Rotary settings of a Hugging Face config: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math

from edgekit.config import RopeConfig
from edgekit.errors import UnsupportedError

from .fields import ConfigFields

__all__ = ["rope_from", "rope_settings"]

_KINDS = ("default", "dynamic", "linear", "llama3", "yarn", "longrope")
_OLD_NAMES = {"su": "longrope"}


def rope_from(
    fields: ConfigFields, head_dim: int, *, theta: float = 10_000.0, scaling: ConfigFields | None = None
) -> RopeConfig:
    """Read the rotary settings.

    Args:
        fields: The model's config.
        head_dim: Of the attention.
        theta: Base where the config names none.
        scaling: The settings where they are not at their usual place (Gemma 3 has one set per kind of layer).

    Raises:
        UnsupportedError: The rope type is not handled.
        SourceError: A value is missing or wrong.
    """
    scaling = rope_settings(fields) if scaling is None else scaling
    theta = scaling.positive("rope_theta", fields.positive("rope_theta", theta))
    if theta <= 1:
        raise scaling.wrong("rope_theta", theta, "a number over 1")
    dim = _rotated(fields, scaling, head_dim)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    kind = _OLD_NAMES.get(kind, kind)
    if kind == "factors":
        return RopeConfig(theta, dim, "factors", short_factors=scaling.numbers("factors", dim // 2))
    if kind not in _KINDS:
        raise UnsupportedError(f"rope type {kind!r} is not supported", hint=f"supported: {', '.join(_KINDS)}")
    if kind == "dynamic":  # it stretches only past max_position_embeddings, and no context is longer
        return RopeConfig(theta, dim)
    if kind == "linear":
        return RopeConfig(theta, dim, "linear", factor=scaling.positive("factor"))
    if kind == "llama3":
        return _llama3(fields, scaling, theta, dim)
    if kind == "yarn":
        return _yarn(fields, scaling, theta, dim)
    if kind == "longrope":
        return _longrope(fields, scaling, theta, dim)
    # Said of a checkpoint that names no scaling: `edgekit.lint` asks whether it got lost.
    return RopeConfig(theta, dim, original_context=_original_context(fields, scaling, default=0))


def rope_settings(fields: ConfigFields) -> ConfigFields:
    """Where the rotary settings stand: `rope_scaling`, if anyone added it, counts before `rope_parameters`."""
    return fields.nested("rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters")


def _rotated(fields: ConfigFields, scaling: ConfigFields, head_dim: int) -> int:
    """Rotated dimensions of a head: pairs, not more than there are."""
    key = "partial_rotary_factor"
    partial = scaling.positive(key, fields.positive(key, 1.0))
    if partial > 1:
        raise scaling.wrong(key, partial, f"at most 1: a head has {head_dim} dimensions")
    dim = int(head_dim * partial)
    if dim < 2 or dim % 2:
        raise scaling.wrong(key, partial, f"whole pairs: {dim} of {head_dim} dimensions would be rotated")
    return dim


def _original_context(fields: ConfigFields, scaling: ConfigFields, *, default: int | None = None) -> int:
    key = "original_max_position_embeddings"
    if fields.has(key):  # Phi-3 keeps it beside the rope settings, and that one counts
        return fields.size(key)
    if scaling.has(key):
        return scaling.size(key)
    return fields.size("max_position_embeddings") if default is None else default


def _llama3(fields: ConfigFields, scaling: ConfigFields, theta: float, dim: int) -> RopeConfig:
    low, high = scaling.positive("low_freq_factor"), scaling.positive("high_freq_factor")
    if low >= high:
        raise scaling.wrong("high_freq_factor", high, f"more than low_freq_factor, which is {low:g}")
    return RopeConfig(
        theta,
        dim,
        "llama3",
        factor=scaling.positive("factor"),
        original_context=_original_context(fields, scaling),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(fields: ConfigFields, scaling: ConfigFields, theta: float, dim: int) -> RopeConfig:
    original = _original_context(fields, scaling)
    factor = scaling.positive("factor", fields.size("max_position_embeddings") / original)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weights = _positive_or(scaling, "mscale", 0.0), _positive_or(scaling, "mscale_all_dim", 0.0)
    inferred = mscale(weights[0]) / mscale(weights[1]) if all(weights) else mscale(1.0)
    return RopeConfig(
        theta,
        dim,
        "yarn",
        factor=factor,
        original_context=original,
        beta_fast=_positive_or(scaling, "beta_fast", 32.0),
        beta_slow=_positive_or(scaling, "beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        attention_factor=scaling.positive("attention_factor", inferred),
    )


def _positive_or(scaling: ConfigFields, key: str, default: float) -> float:
    """As transformers reads these: zero means the default."""
    return scaling.positive(key) if scaling.values.get(key) else default


def _longrope(fields: ConfigFields, scaling: ConfigFields, theta: float, dim: int) -> RopeConfig:
    original = _original_context(fields, scaling)
    factor = scaling.positive("factor", fields.size("max_position_embeddings") / original)
    if original < 2:
        raise scaling.wrong("original_max_position_embeddings", original, "at least 2")
    inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeConfig(
        theta,
        dim,
        "longrope",
        factor=factor,
        original_context=original,
        attention_factor=scaling.positive("attention_factor", inferred),
        short_factors=scaling.numbers("short_factor", dim // 2),
        long_factors=scaling.numbers("long_factor", dim // 2),
    )
