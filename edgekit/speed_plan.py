"""Tokens per second: decoding is bound by what a token reads, prefill by what it multiplies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from edgekit.anatomy import Anatomy
from edgekit.efficiency import Efficiency
from edgekit.memory_plan import cache_bytes
from edgekit.quant import CacheFormat
from edgekit.target import Target
from edgekit.weight_plan import WeightGroup

__all__ = ["SpeedPlan", "plan_speed"]

_BASIS = "modelled from the target's bandwidth and int8 rate, with half of the context in use"
_KNOWN_NPU = f"{_BASIS}; no NPU was measured"
_UNKNOWN_NPU = f"{_BASIS}; the NPU's rate is not known, its cores' is taken"


@dataclass(frozen=True, slots=True)
class SpeedPlan:
    """Tokens per second, and what they are based on. Decoding is meant with half of the context in use.

    `bytes_per_token` is what one token reads: active weights, and the cache.
    """

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    bytes_per_token: int
    basis: str


def plan_speed(
    anatomy: Anatomy,
    groups: Iterable[WeightGroup],
    target: Target,
    *,
    context: int,
    cache: CacheFormat,
    efficiency: Efficiency,
) -> SpeedPlan:
    """The speeds of one model, scheme, context and cache on a device."""
    chunk = min(context, efficiency.prefill_chunk)
    read, token_read, chunk_read, multiplied = 0.0, 0.0, 0.0, 0.0
    for group in groups:
        size = (
            group.size_bytes / efficiency.weight_bandwidth[group.format.bits]
        )  # as many bytes take that time at the peak
        token_read += size * group.active
        chunk_read += size * (1 - (1 - group.active) ** chunk)  # tokens pick their experts, and rows, independently
        read += group.size_bytes * group.active
        multiplied += group.multiplied * group.active
    kept = _kept_bytes(anatomy, context, cache)
    int8_ops_per_s, basis = _compute(target, efficiency)
    compute, bandwidth = efficiency.prefill_compute * int8_ops_per_s, target.memory.bandwidth_bytes_per_s
    token_s = (token_read + kept / efficiency.cache_bandwidth) / bandwidth
    token_s += len(anatomy.caches) * efficiency.layer_s
    token_s += 2 * _attended(anatomy, context) / (efficiency.attention_compute * int8_ops_per_s)
    chunk_s = max(2 * multiplied * chunk / compute, chunk_read / bandwidth)
    return SpeedPlan(_rounded(1 / token_s), _rounded(chunk / chunk_s), round(read + kept), basis)


def _compute(target: Target, efficiency: Efficiency) -> tuple[int, str]:
    """The int8 rate of what computes, and what the speeds are based on."""
    if efficiency.unit == "cpu" or target.npu is None:
        return target.cpu.int8_ops_per_s, _BASIS
    known = target.npu.int8_ops_per_s
    return (known, _KNOWN_NPU) if known else (target.cpu.int8_ops_per_s, _UNKNOWN_NPU)


def _kept_bytes(anatomy: Anatomy, context: int, cache: CacheFormat) -> int:
    """What a token reads of keys and values, half of the context being in use."""
    half = max(context // 2, 1)
    layers = Counter(anatomy.caches).items()
    return sum(count * cache_bytes(layer, half, cache, whole_windows=False) for layer, count in layers)


def _attended(anatomy: Anatomy, context: int) -> float:
    """Multiplications of a token's queries with keys and values, half of the context being in use."""
    half = max(context // 2, 1)
    return sum(layer.per_token * layer.tokens(half) * layer.sharing for layer in anatomy.caches)


def _rounded(tokens_per_s: float) -> float:
    """Three figures where one decimal would say nothing."""
    return round(tokens_per_s, 1) if tokens_per_s >= 10 else float(f"{tokens_per_s:.3g}")
