"""Which scheme a plan takes: what was asked for, what a checkpoint or a device's profile suggests, or the rule of `auto`."""

from __future__ import annotations

from dataclasses import replace

from edgekit.plan_frame import Frame
from edgekit.quant import RECIPES, Override, QuantScheme, load_scheme
from edgekit.weight_plan import plan_weights

__all__ = ["AUTO_MEMORY_PART", "AUTO_TOKENS_PER_S", "choose_scheme"]

# The `auto` rule (design): 8 bits where their weights take at most this part of what an app may use, and decode is fast enough.
AUTO_MEMORY_PART = 0.25
AUTO_TOKENS_PER_S = 15.0


def choose_scheme(frame: Frame, asked: QuantScheme | None, notes: list[str]) -> QuantScheme:
    """The asked scheme (None: a suitable one) as the format's programs have it; departures are noted."""
    scheme = asked or _automatic_scheme(frame, notes)
    return _row_scaled(scheme, notes) if frame.capability.quantized_activations else scheme


def _row_scaled(scheme: QuantScheme, notes: list[str]) -> QuantScheme:
    """The scheme with row-scaled layers; the embedding and the head, which the CPU computes, stay at 8 bits."""
    ends = RECIPES["int8"].format
    if scheme.format != ends:
        notes.append(f"{scheme.name}: the embedding and the head, which run on the CPU, are kept at 8 bits")
    return replace(scheme, row_scaled=True, overrides=(*scheme.overrides, Override(("embedding", "head"), ends)))


def _automatic_scheme(frame: Frame, notes: list[str]) -> QuantScheme:
    """Quantized checkpoints keep their blocks, profiles have a default, and else the rule of `auto` decides."""
    if frame.outline.quantized and frame.capability.keeps:
        scheme = RECIPES["keep"]
    else:
        scheme = _rule_of_auto(frame, notes) if frame.target.quant == "auto" else load_scheme(frame.target.quant)
    if frame.outline.quantized and not scheme.keep:
        notes.append(f"the checkpoint's own blocks can't be carried over: {scheme.name} rounds them again")
    allowed = frame.capability.schemes
    if not allowed or scheme.name in allowed:
        return scheme
    smaller = allowed[0] if scheme.keep or scheme.format.bits >= 8 else allowed[-1]
    notes.append(f"{frame.format} is not written with {scheme.name}: {smaller} instead")
    return RECIPES[smaller]


def _rule_of_auto(frame: Frame, notes: list[str]) -> QuantScheme:
    scheme = RECIPES["int8"]
    planned = plan_weights(frame.outline, scheme, frame.format)
    context, cache = frame.default_context, frame.caches(scheme, None)[0]
    size_bytes, speed = planned.size_bytes, frame.speed(planned, context, cache).decode_tokens_per_s
    if size_bytes <= AUTO_MEMORY_PART * frame.budget_bytes and speed > AUTO_TOKENS_PER_S:
        return scheme
    notes.append(
        f"auto: int4-mixed, since 8 bits would take {size_bytes / 1e6:,.0f} MB and decode about {speed:.3g} tokens/s"
    )
    return RECIPES["int4-mixed"]
