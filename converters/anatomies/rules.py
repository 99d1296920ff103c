"""Rules of a config that say something layer by layer: which kind of attention, and whether there are experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from edgekit.converters.architectures.fields import ConfigFields

__all__ = [
    "KindsRule",
    "SparseRule",
    "after_dense",
    "alternating",
    "ernie_sparse",
    "every_layer",
    "granite_sparse",
    "lfm2_kinds",
    "lfm2_sparse",
    "linear_intervals",
    "llama4_kinds",
    "llama4_sparse",
    "qwen_sparse",
    "sliding_everywhere",
    "sliding_intervals",
]

KindsRule: TypeAlias = Callable[[ConfigFields, int], tuple[str, ...]]
SparseRule: TypeAlias = Callable[[ConfigFields, int], bool]


def _periodic(count: int, period: int, other: str) -> tuple[str, ...]:
    """Every `period`-th layer has full attention."""
    return tuple("full_attention" if (index + 1) % period == 0 else other for index in range(count))


def _sliding(fields: ConfigFields) -> str:
    return "sliding_attention" if fields.has("sliding_window") else "full_attention"


def alternating(fields: ConfigFields, count: int) -> tuple[str, ...]:
    """Sliding and full attention in turn (gpt-oss)."""
    return _periodic(count, 2, _sliding(fields))


def sliding_intervals(key: str, default: int) -> KindsRule:
    """Full attention in each layer whose number is a multiple of the config's `key`."""
    return lambda fields, count: _periodic(count, fields.size(key, default), _sliding(fields))


def sliding_everywhere(fields: ConfigFields, count: int) -> tuple[str, ...]:
    """The config's window, if it has one, in every layer."""
    return (_sliding(fields),) * count


def linear_intervals(fields: ConfigFields, count: int) -> tuple[str, ...]:
    """Full attention every so many layers, else linear (Qwen3-Next)."""
    return _periodic(count, fields.size("full_attention_interval", 4), "linear_attention")


def llama4_kinds(fields: ConfigFields, count: int) -> tuple[str, ...]:
    """Layers with a rotation see chunks, those without see all."""
    if _listed(fields, "no_rope_layers"):
        rotated = fields.items("no_rope_layers", count)
        return tuple("chunked_attention" if flag else "full_attention" for flag in rotated)
    return _periodic(count, fields.size("no_rope_layer_interval", 4), "chunked_attention")


def lfm2_kinds(fields: ConfigFields, count: int) -> tuple[str, ...]:
    """The layers in `full_attn_idxs` have attention, the others a short convolution."""
    full = _listed(fields, "full_attn_idxs") if fields.has("full_attn_idxs") else tuple(range(count))
    return tuple("full_attention" if index in full else "conv" for index in range(count))


def every_layer(fields: ConfigFields, index: int) -> bool:
    """All layers have experts."""
    return True


def after_dense(default: int) -> SparseRule:
    """The first `first_k_dense_replace` layers are dense; `mlp_layer_types`, where it is there, says it of each layer."""

    def sparse(fields: ConfigFields, index: int) -> bool:
        if fields.has("mlp_layer_types"):
            return fields.items("mlp_layer_types", index + 1)[index] == "sparse"
        return index >= _count(fields, "first_k_dense_replace", default)

    return sparse


def qwen_sparse(fields: ConfigFields, index: int) -> bool:
    """Every `decoder_sparse_step`-th layer but those in `mlp_only_layers`."""
    return index not in _listed(fields, "mlp_only_layers") and not (index + 1) % fields.size("decoder_sparse_step", 1)


def llama4_sparse(fields: ConfigFields, index: int) -> bool:
    """The layers in `moe_layers`, or every `interleave_moe_layer_step`-th."""
    if fields.has("moe_layers"):
        return index in _listed(fields, "moe_layers")
    return not (index + 1) % fields.size("interleave_moe_layer_step", 1)


def lfm2_sparse(fields: ConfigFields, index: int) -> bool:
    """All but the first `num_dense_layers`."""
    return index >= _count(fields, "num_dense_layers", 0)


def ernie_sparse(fields: ConfigFields, index: int) -> bool:
    """Every `moe_layer_interval`-th layer from a first to a last one; a last one of -1 is the model's."""
    last = fields.values.get("moe_layer_end_index", -1)
    inside = index >= _count(fields, "moe_layer_start_index", 1) and (
        last == -1 or index <= _count(fields, "moe_layer_end_index", 0)
    )
    return inside and not (index + 1) % fields.size("moe_layer_interval", 1)


def granite_sparse(fields: ConfigFields, index: int) -> bool:
    """Granite 4's dense models say that they have no experts."""
    return _count(fields, "num_local_experts", 0) > 0


def _count(fields: ConfigFields, key: str, default: int) -> int:
    """A whole number, also zero."""
    return 0 if fields.values.get(key, default) == 0 else fields.size(key, default)


def _listed(fields: ConfigFields, key: str) -> tuple[object, ...]:
    """A list of any length; empty where there is none."""
    value = fields.values.get(key)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise fields.wrong(key, value, "a list")
    return tuple(value)
