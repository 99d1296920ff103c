"""The parts that decoders are built of: each gives the weights of one layer's part and, for those that mix tokens, its cache.

Parameter counts are those of transformers' own models (tests/converters/test_anatomies.py compares them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from edgekit.anatomy import LayerCache, Weight
from edgekit.converters.architectures.fields import ConfigFields
from edgekit.converters.architectures.standard import head_size

__all__ = [
    "Mixer",
    "Part",
    "dense",
    "experts",
    "first_size",
    "gated_delta",
    "grouped_query",
    "latent",
    "mamba2",
    "short_convolution",
    "vectors",
]


@dataclass(frozen=True, slots=True)
class Part:
    """Weights by their name in the layer, the cache of a part that mixes tokens, and the widest activation."""

    weights: Mapping[str, Weight]
    cache: LayerCache | None = None
    widest: int = 0


Mixer: TypeAlias = Callable[[ConfigFields, str], Part]


def first_size(fields: ConfigFields, keys: tuple[str, ...]) -> int:
    """The first of several keys that is there: publishers and versions of transformers differ."""
    return fields.size(next((key for key in keys if fields.has(key)), keys[0]))


def vectors(count: int) -> Weight:
    """Norms, biases and the like, together."""
    return Weight("other", "", (count,))


def grouped_query(
    fields: ConfigFields,
    kind: str,
    *,
    bias: bool = False,
    output_bias: bool = False,
    norm: str = "",
    gated: bool = False,
    sinks: bool = False,
) -> Part:
    """Grouped-query attention (arXiv:2305.13245).

    Args:
        kind: `full_attention`, `sliding_attention` or `chunked_attention`.
        norm: Of query and key: over each `head`, over all `heads` together, or none.
        gated: The query's projection also gives a gate for the output.
        sinks: A logit for each head that takes attention from the tokens.
    """
    hidden, heads, size = fields.size("hidden_size"), fields.size("num_attention_heads"), head_size(fields)
    kv_heads = fields.size("num_key_value_heads", heads)
    rows = (heads * (2 if gated else 1) + 2 * kv_heads) * size
    small = rows * bias + hidden * output_bias + heads * sinks
    small += {"": 0, "head": 2 * size, "heads": (heads + kv_heads) * size}[norm]
    windows = {"full_attention": "", "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    window = fields.size(windows[kind]) if windows[kind] else 0
    weights = {
        "qkv": Weight("attention", "qkv", (rows, hidden)),
        "output": Weight("attention", "output", (hidden, heads * size)),
        "attention_vectors": vectors(small),
    }
    kept = LayerCache(
        "sliding" if window else "full", 2 * kv_heads * size, window, sharing=heads / kv_heads, heads=heads
    )
    return Part(weights, kept, rows)


def latent(fields: ConfigFields, kind: str, *, indexed: bool = False) -> Part:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): what is kept is one compressed vector and one rotated key.

    Args:
        indexed: A small second attention picks the tokens (DeepSeek-V3.2), and keeps a key of its own for each.
    """
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    rank, rotated = fields.size("kv_lora_rank"), fields.size("qk_rope_head_dim")
    plain, value = fields.size("qk_nope_head_dim"), fields.size("v_head_dim")
    query_rows, small = heads * (plain + rotated), rank
    weights = {
        "kv_down": Weight("attention", "qkv", (rank + rotated, hidden)),
        "kv_up": Weight("attention", "qkv", (heads * (plain + value), rank)),
        "output": Weight("attention", "output", (hidden, heads * value)),
    }
    query_inputs = hidden
    if fields.has("q_lora_rank"):
        query_inputs = fields.size("q_lora_rank")
        weights["query_down"] = Weight("attention", "qkv", (query_inputs, hidden))
        small += query_inputs
    weights["query_up"] = Weight("attention", "qkv", (query_rows, query_inputs))
    per_token = rank + rotated
    if indexed:
        index_heads, index_size = fields.size("index_n_heads"), fields.size("index_head_dim")
        weights["index"] = Weight("attention", "qkv", (index_heads * index_size, query_inputs))
        weights["index_key"] = Weight("attention", "qkv", (index_size + index_heads, hidden))
        small += 2 * index_size
        per_token += index_size
    return Part(
        weights | {"attention_vectors": vectors(small)},
        LayerCache("latent", per_token, sharing=heads),
        query_rows + 2 * heads * value,
    )


def gated_delta(fields: ConfigFields, kind: str) -> Part:
    """Gated delta rule (arXiv:2412.06464), as in Qwen3-Next: a matrix for each head, and the inputs of a short convolution."""
    hidden, kernel = fields.size("hidden_size"), fields.size("linear_conv_kernel_dim")
    key_heads, value_heads = fields.size("linear_num_key_heads"), fields.size("linear_num_value_heads")
    key_size, value_size = fields.size("linear_key_head_dim"), fields.size("linear_value_head_dim")
    values, mixed = value_heads * value_size, 2 * key_heads * key_size + value_heads * value_size
    weights = {
        "qkv": Weight("attention", "qkv", (mixed + values + 2 * value_heads, hidden)),
        "output": Weight("attention", "output", (hidden, values)),
        "convolution": Weight("other", "", (mixed, kernel)),
        "attention_vectors": vectors(2 * value_heads + value_size),
    }
    state = value_heads * key_size * value_size + mixed * kernel
    return Part(weights, LayerCache("linear", state=state), mixed + values)


def mamba2(fields: ConfigFields, kind: str) -> Part:
    """A state-space layer (Mamba-2, arXiv:2405.21060), in the keys of Granite 4."""
    hidden, kernel = fields.size("hidden_size"), fields.size("mamba_d_conv")
    heads, groups, state_size = (fields.size(f"mamba_{name}") for name in ("n_heads", "n_groups", "d_state"))
    inner = fields.size("mamba_expand") * hidden
    mixed = inner + 2 * groups * state_size
    projection = inner + mixed + heads
    small = 3 * heads + inner + mixed * fields.flag("mamba_conv_bias", True)
    small += (projection + hidden) * fields.flag("mamba_proj_bias", False)
    weights = {
        "qkv": Weight("attention", "qkv", (projection, hidden)),
        "output": Weight("attention", "output", (hidden, inner)),
        "convolution": Weight("other", "", (mixed, kernel)),
        "attention_vectors": vectors(small),
    }
    return Part(weights, LayerCache("linear", state=inner * state_size + mixed * kernel), projection)


def short_convolution(fields: ConfigFields, kind: str) -> Part:
    """A gated convolution over the last few tokens (LFM2)."""
    hidden, kernel = fields.size("hidden_size"), fields.size("conv_L_cache")
    small = (3 * hidden + hidden + hidden) * fields.flag("conv_bias", False)
    weights = {
        "qkv": Weight("attention", "qkv", (3 * hidden, hidden)),
        "output": Weight("attention", "output", (hidden, hidden)),
        "convolution": Weight("other", "", (hidden, kernel)),
        "attention_vectors": vectors(small),
    }
    return Part(weights, LayerCache("linear", state=hidden * kernel), 3 * hidden)


def dense(hidden: int, size: int, *, gated: bool = True, bias: bool = False, name: str = "") -> Part:
    """A feed-forward part: two projections up and one down, or one of each."""
    ups = (2 if gated else 1) * size
    weights = {
        f"{name}gate_up": Weight("feed_forward", "gate_up", (ups, hidden)),
        f"{name}down": Weight("feed_forward", "down", (hidden, size)),
    }
    if bias:
        weights[f"{name}feed_forward_vectors"] = vectors(ups + hidden)
    return Part(weights, widest=ups)


def experts(hidden: int, size: int, count: int, picked: int, *, bias: bool = False, router_vectors: int = 0) -> Part:
    """Routed experts, of which a token uses `picked`, and their router, which stays in floats."""
    share = min(picked / count, 1.0)
    weights = {
        "experts.gate_up": Weight("experts", "gate_up", (count * 2 * size, hidden), share),
        "experts.down": Weight("experts", "down", (count * hidden, size), share),
        "router": Weight("other", "", (count, hidden)),
        "router_vectors": vectors(router_vectors),
    }
    if bias:
        weights["experts.vectors"] = Weight("other", "", (count, 2 * size + hidden), share)
    return Part(weights, widest=2 * size * picked)
