"""Bytes on the device, line by line: weights, cache, activations, runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgekit.anatomy import Anatomy, CacheKind, LayerCache, WeightKind
from edgekit.efficiency import Efficiency
from edgekit.quant import CacheFormat
from edgekit.runtime_options import RuntimeOptions
from edgekit.weight_plan import WeightGroup

__all__ = ["MemoryPlan", "cache_bytes", "plan_memory"]

_STATE_BYTES = 4  # of an element of a linear layer's state, which errors would add up in
_ACTIVATION_BYTES = 4


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one process with one sequence of the whole context.

    `total_bytes`, the peak, is the sum of `weights_bytes`, `packed_bytes`, `kv_bytes`, `activations_bytes`, `runtime_bytes` and
    `loading_bytes`, less `unread_bytes`; `budget_bytes` is what an app may use there.

    Attributes:
        weights_bytes: As stored. Mapped ones count too: all of them are read for each token, but for `unread_bytes`.
        weights_mapped: They are mapped from the file: under pressure the system may drop pages, and read them again.
        packed_bytes: What the kernels' own layout of the weights takes beyond the stored one: of an embedding that is the head
            too all of it, since both are used, the rows of one and the copy of the other.
        loading_bytes: By how much loading, before there is a cache, takes more than running.
        unread_bytes: Of embeddings that are only looked up in the mapped file, what stays there.
        weights_by_kind: `weights_bytes` by class.
        kv_by_kind: `kv_bytes` by kind of layer.
    """

    weights_bytes: int
    packed_bytes: int
    kv_bytes: int
    activations_bytes: int
    runtime_bytes: int
    loading_bytes: int
    unread_bytes: int
    total_bytes: int
    budget_bytes: int
    weights_mapped: bool
    weights_by_kind: Mapping[WeightKind, int]
    kv_by_kind: Mapping[CacheKind, int]


def plan_memory(
    anatomy: Anatomy,
    groups: Iterable[WeightGroup],
    *,
    context: int,
    cache: CacheFormat,
    efficiency: Efficiency,
    options: RuntimeOptions,
    budget_bytes: int,
) -> MemoryPlan:
    """The sums for one model, scheme, context and cache."""
    by_kind: dict[WeightKind, int] = {}
    packed = 0.0
    groups = tuple(groups)
    for group in groups:
        by_kind[group.kind] = by_kind.get(group.kind, 0) + group.size_bytes
        if options.prepacking and not group.is_looked_up:
            packed += group.blocks * efficiency.packed_block_bytes + group.size_bytes * (group.kind == "embedding")
    kv_by_kind: dict[CacheKind, int] = {}
    for layer, count in Counter(anatomy.caches).items():
        size = count * cache_bytes(layer, context, cache, whole_windows=efficiency.whole_windows)
        kv_by_kind[layer.kind] = kv_by_kind.get(layer.kind, 0) + size
    kept = sum(kv_by_kind.values())
    chunk = min(context, efficiency.prefill_chunk)
    activations = _activations_bytes(anatomy, chunk, context, cache, efficiency)
    unread = 0
    if options.mapped_weights:
        looked_up = [group.size_bytes for group in groups if group.is_looked_up]
        unread = max(sum(looked_up) - efficiency.looked_up_bytes * chunk, 0)
    lines = {
        "weights_bytes": sum(by_kind.values()),
        "packed_bytes": round(packed),
        "kv_bytes": kept,
        "activations_bytes": activations,
        "runtime_bytes": efficiency.runtime_bytes + efficiency.token_bytes * anatomy.vocab_size,
        "loading_bytes": max(efficiency.loading_bytes - kept - activations, 0),
    }
    return MemoryPlan(
        **lines,
        unread_bytes=unread,
        total_bytes=sum(lines.values()) - unread,
        budget_bytes=budget_bytes,
        weights_mapped=options.mapped_weights,
        weights_by_kind=by_kind,
        kv_by_kind={kind: size for kind, size in kv_by_kind.items() if size},
    )


def _activations_bytes(anatomy: Anatomy, chunk: int, context: int, cache: CacheFormat, efficiency: Efficiency) -> int:
    """What lies between operators, when `chunk` tokens are computed at the end of the context."""
    elements = chunk * anatomy.widest + 2 * anatomy.vocab_size
    elements += efficiency.scores * max((layer.heads for layer in anatomy.caches), default=0) * chunk * context
    if cache is CacheFormat.FLOAT16:
        elements += efficiency.widened_layers * max((layer.per_token for layer in anatomy.caches), default=0) * context
    return _ACTIVATION_BYTES * elements


def cache_bytes(layer: LayerCache, context: int, cache: CacheFormat, *, whole_windows: bool) -> int:
    """What one layer keeps of a sequence of `context` tokens; with `whole_windows` also what its window has left behind."""
    tokens = context if whole_windows else layer.tokens(context)
    kept = layer.per_token * tokens * cache.element_bytes + cache.scale_bytes(layer.per_token)
    return kept + layer.state * _STATE_BYTES
