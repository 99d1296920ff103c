"""Anatomies from a GGUF's header, for architectures that EdgeKit does not convert yet: its tensors say nearly everything."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, TypeAlias

from edgekit.anatomy import Anatomy, LayerCache, Weight, WeightKind
from edgekit.converters.architectures.fields import ConfigFields
from edgekit.converters.architectures.standard import MOST_LAYERS
from edgekit.converters.from_gguf import GgufTensor
from edgekit.errors import SourceError

__all__ = ["GGUF_ARCHITECTURES", "describe_gguf"]

_Window: TypeAlias = Callable[[ConfigFields, int], int]


def _unlimited(fields: ConfigFields, layer: int) -> int:
    return 0


def _period(period: int) -> _Window:
    """Every `period`-th layer sees all tokens, the others a window (llama.cpp's set_swa_pattern)."""
    return lambda fields, layer: 0 if (layer + 1) % period == 0 else fields.size("attention.sliding_window")


def _listed(fields: ConfigFields, layer: int) -> int:
    """The file says of each layer if it has a window."""
    pattern = fields.items("attention.sliding_window_pattern", layer + 1)
    return fields.size("attention.sliding_window") if pattern[layer] else 0


# The window of a layer, by architecture. What is not here is not understood.
GGUF_ARCHITECTURES: Mapping[str, _Window] = dict.fromkeys(
    (
        *(
            "deepseek2",
            "ernie4_5",
            "ernie4_5-moe",
            "gemma",
            "glm4",
            "glm4moe",
            "granite",
            "granitehybrid",
            "granitemoe",
        ),
        *("lfm2", "lfm2moe", "llama", "minimax-m2", "olmoe", "phimoe", "qwen2moe", "qwen3moe", "qwen3next", "seed_oss"),
    ),
    _unlimited,
) | {"cohere2": _period(4), "gemma3n": _listed, "gpt-oss": _period(2)}

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# Kind and role of a tensor with rows and columns, by its name; what fits none stays in floats.
_CLASSES: tuple[tuple[str, WeightKind, str], ...] = (
    (r"(per_layer_)?token_embd\.weight", "embedding", "embedding"),
    (r"output\.weight", "head", "head"),
    (r"ffn_(gate|up|gate_up)_exps\.weight", "experts", "gate_up"),
    (r"ffn_down_exps\.weight", "experts", "down"),
    (r"ffn_(gate|up)(_shexp)?\.weight", "feed_forward", "gate_up"),
    (r"ffn_down(_shexp)?\.weight", "feed_forward", "down"),
    (r"(attn_output|ssm_out|shortconv\.out_proj)\.weight", "attention", "output"),
    (r"attn_(q|k|v|qkv|gate|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b)\.weight", "attention", "qkv"),
    (r"(ssm_in|ssm_ba|shortconv\.in_proj)\.weight", "attention", "qkv"),
)
_WIDE = ("qkv", "gate_up", "output", "down")  # roles whose outputs are activations


def describe_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], origin: str
) -> tuple[Anatomy, dict[str, tuple[GgufTensor, ...]]]:
    """The anatomy of a file whose architecture is in GGUF_ARCHITECTURES, and the tensor of each of its weights.

    Raises:
        SourceError: The metadata or tensors are incomplete or impossible.
    """
    architecture = str(metadata["general.architecture"])
    prefix = f"{architecture}."
    fields = ConfigFields({k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}, origin)
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise SourceError(f"{origin} has no tensor token_embd.weight", hint="it is not a language model, or incomplete")
    share = 1.0
    if fields.values.get("expert_count"):
        share = min(fields.size("expert_used_count") / fields.size("expert_count"), 1.0)
    tied = "output.weight" not in tensors
    named = {_name(name): tensor for name, tensor in tensors.items()}
    weights = {name: _weight(tensor, share, tied=tied) for name, tensor in named.items()}
    caches = _caches(fields, named, GGUF_ARCHITECTURES[architecture])
    hidden = fields.size("embedding_length")
    widest = max(hidden, *(weight.shape[0] * weight.active for weight in weights.values() if weight.role in _WIDE))
    anatomy = Anatomy(
        architecture,
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        context=fields.size("context_length"),
        widest=round(2 * widest) + 4 * hidden,
        weights=weights,
        caches=caches,
    )
    return anatomy, {name: (replace(tensor, shape=weights[name].shape),) for name, tensor in named.items()}


def _name(tensor: str) -> str:
    match = _BLOCK.fullmatch(tensor)
    if match:
        return f"layers.{int(match[1])}.{match[2].removesuffix('.weight')}"
    return "embedding" if tensor == "token_embd.weight" else tensor.removesuffix(".weight")


def _weight(tensor: GgufTensor, share: float, *, tied: bool) -> Weight:
    match = _BLOCK.fullmatch(tensor.name)
    part = match[2] if match else tensor.name
    found = next(((kind, role) for pattern, kind, role in _CLASSES if re.fullmatch(pattern, part)), None)
    active = share if "_exps." in part else 1.0
    if found is None or len(tensor.shape) < 2:
        return Weight("other", "", tensor.shape, active)
    kind, role = found
    rows = prod(tensor.shape[:-1])
    if kind == "embedding" and not (tied and part == "token_embd.weight"):
        active = 1 / rows
    return Weight(kind, role, (rows, tensor.shape[-1]), active)


def _caches(fields: ConfigFields, tensors: Mapping[str, GgufTensor], window: _Window) -> tuple[LayerCache, ...]:
    count = fields.size("block_count", most=MOST_LAYERS)
    shared = fields.size("attention.shared_kv_layers") if fields.values.get("attention.shared_kv_layers") else 0
    return tuple(
        LayerCache("shared") if layer >= count - shared else _cache(fields, tensors, layer, window)
        for layer in range(count)
    )


def _cache(fields: ConfigFields, tensors: Mapping[str, GgufTensor], layer: int, window: _Window) -> LayerCache:
    """What a layer keeps: a row of key and of value for each token, of their compression, or a state."""

    def tensor(part: str) -> GgufTensor | None:
        return tensors.get(f"layers.{layer}.{part}")

    compressed, key, value = tensor("attn_kv_a_mqa"), tensor("attn_k"), tensor("attn_v")
    if compressed:
        return LayerCache("latent", compressed.shape[0])
    if key and value:
        seen = window(fields, layer)
        query = tensor("attn_q")
        sharing = query.shape[0] / key.shape[0] if query else 1.0
        return LayerCache("sliding" if seen else "full", key.shape[0] + value.shape[0], seen, sharing=sharing)
    short, states = tensor("shortconv.conv"), tensor("ssm_conv1d")
    if short:
        return LayerCache("linear", state=prod(short.shape))
    if states:
        inner = fields.size("ssm.inner_size") * fields.size("ssm.state_size")
        return LayerCache("linear", state=inner + prod(states.shape))
    raise SourceError(f"{fields.origin}: layer {layer} has no attention that is known", hint="the file is incomplete")
