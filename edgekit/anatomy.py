"""Anatomy: what a decoder costs, from its config alone: its weights by class, and what each layer remembers of a text.

It says less than a ModelConfig (nothing of norms' kinds or rotations) and so it exists for more models: those that EdgeKit
converts, and many that it can only plan for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal, TypeAlias

from edgekit.config import ModelConfig
from edgekit.source import part_shapes

__all__ = ["Anatomy", "CacheKind", "LayerCache", "Weight", "WeightKind", "anatomy_of"]

WeightKind: TypeAlias = Literal["embedding", "head", "attention", "feed_forward", "experts", "other"]
CacheKind: TypeAlias = Literal["full", "sliding", "latent", "linear", "shared"]
_KINDS: Mapping[str, WeightKind] = {
    "embedding": "embedding",
    "head": "head",
    "qkv": "attention",
    "output": "attention",
    "gate_up": "feed_forward",
    "down": "feed_forward",
}


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight of a model.

    Attributes:
        kind: The class that it is counted in.
        role: What a quantization scheme calls it (`qkv`, `down`, …); empty for what always stays in floats.
        shape: Rows first; several experts lie one below the other.
        active: The share of it that computing one token reads: of experts those that the router picks.
    """

    kind: WeightKind
    role: str
    shape: tuple[int, ...]
    active: float = 1.0

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer remembers.

    Attributes:
        kind: `full` and `sliding` keep keys and values, `latent` their common compression (DeepSeek-V2, arXiv:2405.04434),
            `linear` a state of fixed size (Mamba-2, gated delta, short convolutions), `shared` reads another layer's.
        per_token: Elements for each token that is kept.
        window: Most tokens that are kept; 0: all.
        state: Elements that are there whatever the length; always float32.
        sharing: Query heads that each key and value serves.
        heads: Query heads; 0 where they are not known.
    """

    kind: CacheKind
    per_token: int = 0
    window: int = 0
    state: int = 0
    sharing: float = field(default=1.0, compare=False)  # a GGUF header does not always tell
    heads: int = field(default=0, compare=False)

    def tokens(self, context: int) -> int:
        """Tokens that this layer needs of the last `context`."""
        return min(context, self.window) if self.window else context


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The sizes of a decoder.

    Attributes:
        context: Tokens that it was trained for.
        widest: Most elements that one token's activations take at once, inside a layer.
        weights: By name: `embedding`, `layers.0.qkv`, ….
        caches: One for each layer.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    context: int
    widest: int
    weights: Mapping[str, Weight]
    caches: tuple[LayerCache, ...]

    @property
    def parameters(self) -> int:
        """All weights' elements."""
        return sum(weight.parameters for weight in self.weights.values())

    @property
    def active_parameters(self) -> int:
        """Those that one token's computation reads."""
        return round(sum(weight.parameters * weight.active for weight in self.weights.values()))

    def parameters_by_kind(self) -> dict[WeightKind, int]:
        """Elements of each class that the model has."""
        found: dict[WeightKind, int] = {}
        for weight in self.weights.values():
            found[weight.kind] = found.get(weight.kind, 0) + weight.parameters
        return found


def anatomy_of(config: ModelConfig) -> Anatomy:
    """The anatomy of a model that EdgeKit converts."""
    attention = config.attention
    weights = {}
    for name, shape in part_shapes(config).items():
        part = name.rpartition(".")[2]
        kind = _KINDS.get(part, "other")
        looked_up = name == "embedding" and not config.tied_embeddings
        weights[name] = Weight(kind, part if part in _KINDS else "", shape, 1 / shape[0] if looked_up else 1.0)
    per_token = 2 * attention.kv_heads * attention.stored_head_dim
    return Anatomy(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        context=config.context,
        widest=max(2 * config.intermediate_size, attention.qkv_rows) + 4 * config.hidden_size,
        weights=weights,
        caches=tuple(
            LayerCache(
                "sliding" if layer.window else "full",
                per_token,
                layer.window,
                sharing=attention.heads / attention.kv_heads,
                heads=attention.heads,
            )
            for layer in config.layers
        ),
    )
