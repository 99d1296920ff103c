"""A family of decoders: how it departs from llama's layout, and the anatomy of one of its configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from edgekit.anatomy import Anatomy, Weight
from edgekit.converters.architectures.fields import ConfigFields
from edgekit.converters.architectures.standard import layer_count
from edgekit.errors import UnsupportedError

from .parts import Mixer, Part, dense, experts, first_size, grouped_query, vectors
from .rules import KindsRule, SparseRule, every_layer

__all__ = ["Family", "Mixture", "assemble", "describe_family"]

# What configs call the kinds of layers that others have another word for.
_KIND_NAMES = {"mamba": "linear_attention", "attention": "full_attention", "indexed_attention": "full_attention"}
_WINDOWED = ("full_attention", "sliding_attention", "chunked_attention")
Trait: TypeAlias = str | bool  # a text is the config's key that says it


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts of a family (arXiv:2101.03961). The config's keys are tried in turn.

    Attributes:
        sparse: Says of a layer if it has experts.
        shared_size: Width of the experts that every token passes, together; None: there are none.
        shared_gate: These have a gate of their own.
        router_bias: The router adds a bias for each expert that is part of the weights.
        dense_key: Width of the layers without experts.
    """

    count: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts")
    picked: str = "num_experts_per_tok"
    size: str = "moe_intermediate_size"
    sparse: SparseRule = every_layer
    shared_size: Callable[[ConfigFields], int] | None = None
    shared_gate: bool = False
    bias: bool = False
    router_bias: bool = False
    dense_key: str = "intermediate_size"


@dataclass(frozen=True, slots=True)
class Family:
    """How a family departs from llama's layout.

    Attributes:
        norms: Vectors of the hidden size in each layer, and `final_norms` after the last; a bias counts as one.
        norm: Of query and key: as `grouped_query` has it, or the key of a truth that stands for `head`.
        tied: Head and embedding are one where the config does not say.
        mixers: What mixes tokens, by kind of layer; grouped-query attention where it is not named.
        kinds: The layers' kinds where the config has no `layer_types`; None: all full attention.
        dense_size: Width of the feed-forward part where it is not simply a key of the config.
    """

    norms: int = 2
    final_norms: int = 1
    bias: Trait = False
    output_bias: Trait = False
    norm: str = ""
    gated: bool = True
    mlp_bias: Trait = False
    sinks: bool = False
    head_bias: Trait = False
    tied: bool = False
    mixers: Mapping[str, Mixer] = field(default_factory=dict)
    kinds: KindsRule | None = None
    mixture: Mixture | None = None
    dense_size: Callable[[ConfigFields], int] | None = None


def describe_family(fields: ConfigFields, family: Family) -> Anatomy:
    """The anatomy of a config of this family.

    Raises:
        SourceError: A value is missing or impossible.
        UnsupportedError: It has a layer of a kind that is not known.
    """
    hidden = fields.size("hidden_size")
    norms = Part({"norms": vectors(family.norms * hidden)})
    layers = [
        (_mixer(fields, family, kind), _feed_forward(fields, family, index), norms)
        for index, kind in enumerate(_kinds(fields, family))
    ]
    last = family.final_norms * hidden + _said(fields, family.head_bias) * fields.size("vocab_size")
    return assemble(fields, layers, tied=family.tied, beside={"final_norm": vectors(last)})


def assemble(
    fields: ConfigFields, layers: Sequence[Sequence[Part]], *, tied: bool, beside: Mapping[str, Weight]
) -> Anatomy:
    """Put layers, embedding and head together, and the weights `beside` them; `tied` where the config does not say."""
    vocabulary, hidden = fields.size("vocab_size"), fields.size("hidden_size")
    tied = fields.flag("tie_word_embeddings", fields.flag("tie_embedding", tied))
    weights = {"embedding": Weight("embedding", "embedding", (vocabulary, hidden), 1.0 if tied else 1 / vocabulary)}
    if not tied:
        weights["head"] = Weight("head", "head", (vocabulary, hidden))
    for index, parts in enumerate(layers):
        found = {f"layers.{index}.{name}": weight for part in parts for name, weight in part.weights.items()}
        weights |= {name: weight for name, weight in found.items() if weight.parameters}  # no biases: no vector
    return Anatomy(
        model_type=fields.text("model_type"),
        vocab_size=vocabulary,
        hidden_size=hidden,
        context=fields.size("max_position_embeddings"),
        widest=max(part.widest for parts in layers for part in parts) + 4 * hidden,
        weights=weights | dict(beside),
        caches=tuple(part.cache for parts in layers for part in parts if part.cache),
    )


def _kinds(fields: ConfigFields, family: Family) -> tuple[str, ...]:
    count = layer_count(fields)
    if fields.has("layer_types"):
        named = [str(kind) for kind in fields.items("layer_types", count)]
        return tuple(_KIND_NAMES.get(kind, kind) for kind in named)
    return family.kinds(fields, count) if family.kinds else ("full_attention",) * count


def _said(fields: ConfigFields, trait: Trait) -> bool:
    return fields.flag(trait, False) if isinstance(trait, str) else trait


def _mixer(fields: ConfigFields, family: Family, kind: str) -> Part:
    if kind in family.mixers:
        return family.mixers[kind](fields, kind)
    if kind not in _WINDOWED:
        raise UnsupportedError(f"layers of the kind {kind[:40]!r} are not known in a {fields.text('model_type')} model")
    norm = family.norm
    if norm not in ("", "head", "heads"):
        norm = "head" if fields.flag(norm, False) else ""
    bias, output_bias = _said(fields, family.bias), _said(fields, family.output_bias)
    return grouped_query(fields, kind, bias=bias, output_bias=output_bias, norm=norm, sinks=family.sinks)


def _feed_forward(fields: ConfigFields, family: Family, index: int) -> Part:
    hidden, mixture = fields.size("hidden_size"), family.mixture
    if not mixture or not mixture.sparse(fields, index):
        key = mixture.dense_key if mixture else "intermediate_size"
        size = family.dense_size(fields) if family.dense_size else fields.size(key)
        return dense(hidden, size, gated=family.gated, bias=_said(fields, family.mlp_bias))
    count = first_size(fields, mixture.count)
    small = count * mixture.router_bias + hidden * mixture.shared_gate
    size, picked = fields.size(mixture.size), fields.size(mixture.picked)
    routed = experts(hidden, size, count, picked, bias=mixture.bias, router_vectors=small)
    shared = mixture.shared_size(fields) if mixture.shared_size else 0
    if not shared:
        return routed
    beside = dense(hidden, shared, name="shared.")
    return Part({**routed.weights, **beside.weights}, widest=routed.widest + beside.widest)
