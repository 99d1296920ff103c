"""Gemma 3n and Gemma 4: an embedding for each layer, layers that share others' keys and values, and heads that differ."""

from __future__ import annotations

from edgekit.anatomy import Anatomy, LayerCache, Weight
from edgekit.converters.architectures.fields import ConfigFields
from edgekit.converters.architectures.standard import layer_count, layer_kinds

from .family import assemble
from .parts import Part, dense, experts, vectors

__all__ = ["describe_gemma3n", "describe_gemma4"]


def describe_gemma3n(fields: ConfigFields) -> Anatomy:
    """Gemma 3n (MatFormer with AltUp, arXiv:2301.13310, and LAuReL, arXiv:2411.07501)."""
    count, hidden = layer_count(fields), fields.size("hidden_size")
    sizes = fields.values.get("intermediate_size")
    widths = (
        [int(size) for size in fields.numbers("intermediate_size", count)]
        if isinstance(sizes, list)
        else [fields.size("intermediate_size")] * count
    )
    unshared = count - _shared(fields)
    kinds = _kinds(fields, count, 5)
    layers = []
    for index, kind in enumerate(kinds):
        attention = _attention(fields, kind, fields.size("head_dim"), shared=index >= unshared)
        layers.append((attention, dense(hidden, widths[index]), _alternating_updates(fields), _layer_input(fields)))
    streams = fields.size("altup_num_inputs", 4)
    projections = Weight("other", "", (2 * (streams - 1) * hidden, hidden))
    return assemble(fields, layers, tied=True, beside=_whole(fields, count) | {"stream_projections": projections})


def describe_gemma4(fields: ConfigFields) -> Anatomy:
    """Gemma 4: full layers have heads of their own size and may use keys as values; some sizes add experts to each layer."""
    count, hidden = layer_count(fields), fields.size("hidden_size")
    kinds = _kinds(fields, count, 6)
    kinds = (*kinds[:-1], "full_attention")
    unshared, double = count - _shared(fields), fields.flag("use_double_wide_mlp", False)
    layers = []
    for index, kind in enumerate(kinds):
        size = _own(fields, index, "head_dim") or (
            fields.size("global_head_dim", 512) if kind == "full_attention" else fields.size("head_dim")
        )
        shared, width = index >= unshared, fields.size("intermediate_size")
        parts = [
            _attention(fields, kind, size, shared=shared, kv_heads=_kv_heads(fields, index, kind)),
            dense(hidden, 2 * width if double and shared else width),
            Part({"norms": vectors(4 * hidden)}),
        ]
        if fields.flag("enable_moe_block", False):
            parts.append(_experts(fields))
        if fields.values.get("hidden_size_per_layer_input"):
            parts.append(_layer_input(fields))
        layers.append(parts)
    return assemble(fields, layers, tied=True, beside=_whole(fields, count))


def _kinds(fields: ConfigFields, count: int, period: int) -> tuple[str, ...]:
    default = tuple("sliding_attention" if (index + 1) % period else "full_attention" for index in range(count))
    return layer_kinds(fields, default)


def _shared(fields: ConfigFields) -> int:
    """Layers at the end that read the keys and values of earlier ones."""
    return fields.size("num_kv_shared_layers") if fields.values.get("num_kv_shared_layers") else 0


def _own(fields: ConfigFields, index: int, key: str) -> int:
    """What `per_layer_config` says of one layer, as transformers 5 writes it; 0 where it says nothing."""
    layers = fields.nested("per_layer_config")
    width = len(str(layer_count(fields) - 1))
    own = layers.nested(next((name for name in (str(index), f"{index:0{width}}") if layers.has(name)), str(index)))
    return own.size(key) if own.has(key) else 0


def _kv_heads(fields: ConfigFields, index: int, kind: str) -> int:
    own = _own(fields, index, "num_key_value_heads")
    if own:
        return own
    if kind == "full_attention" and fields.flag("attention_k_eq_v", False) and fields.has("num_global_key_value_heads"):
        return fields.size("num_global_key_value_heads")
    return fields.size("num_key_value_heads")


def _attention(fields: ConfigFields, kind: str, size: int, *, shared: bool, kv_heads: int = 0) -> Part:
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = kv_heads or fields.size("num_key_value_heads")
    keys_are_values = kind == "full_attention" and fields.flag("attention_k_eq_v", False)
    projected = 0 if shared else kv_heads * (1 if keys_are_values else 2)
    rows = (heads + projected) * size
    weights = {
        "qkv": Weight("attention", "qkv", (rows, hidden)),
        "output": Weight("attention", "output", (hidden, heads * size)),
        "attention_vectors": vectors((1 if shared else 2) * size),
    }
    if shared:
        return Part(weights, LayerCache("shared"), rows)
    window = fields.size("sliding_window") if kind == "sliding_attention" else 0
    kept = LayerCache(
        "sliding" if window else "full", 2 * kv_heads * size, window, sharing=heads / kv_heads, heads=heads
    )
    return Part(weights, kept, rows)


def _layer_input(fields: ConfigFields) -> Part:
    """What a layer does with its own embedding of the token."""
    hidden, inner = fields.size("hidden_size"), fields.size("hidden_size_per_layer_input")
    return Part(
        {
            "input_gate": Weight("other", "", (inner, hidden)),
            "input_projection": Weight("other", "", (hidden, inner)),
            "input_norm": vectors(hidden),
        }
    )


def _alternating_updates(fields: ConfigFields) -> Part:
    hidden, rank, streams = fields.size("hidden_size"), fields.size("laurel_rank"), fields.size("altup_num_inputs", 4)
    return Part(
        {
            "laurel": Weight("other", "", (2 * rank, hidden)),
            "router": Weight("other", "", (streams, hidden)),
            "norms": vectors(7 * hidden + streams**2 + streams**3),
        },
        widest=streams * hidden,
    )


def _experts(fields: ConfigFields) -> Part:
    hidden, count = fields.size("hidden_size"), fields.size("num_experts")
    return experts(
        hidden,
        fields.size("moe_intermediate_size"),
        count,
        fields.size("top_k_experts"),
        router_vectors=4 * hidden + count,
    )


def _whole(fields: ConfigFields, count: int) -> dict[str, Weight]:
    """What stands outside the layers: the last norm, and the layers' own embeddings, of which a token reads one row."""
    hidden = fields.size("hidden_size")
    weights = {"final_norm": vectors(hidden)}
    if fields.values.get("hidden_size_per_layer_input"):
        inner, rows = fields.size("hidden_size_per_layer_input"), fields.size("vocab_size_per_layer_input")
        weights["layer_embeddings"] = Weight("embedding", "embedding", (rows, count * inner), 1 / rows)
        weights["layer_projection"] = Weight("other", "", (count * inner, hidden))
        weights["layer_projection_norm"] = vectors(inner)
    return weights
