"""Tokens per second: decoding is bound by what a token reads, prefill by what it multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgekit.anatomy import Anatomy
from edgekit.efficiency import Efficiency
from edgekit.memory_plan import cache_bytes
from edgekit.quant import CacheFormat
from edgekit.target import Target
from edgekit.weight_plan import WeightPlan

__all__ = ["SpeedPlan", "plan_speed"]

_BASIS = "modelled from the target's bandwidth and int8 rate"


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
    weights: Mapping[str, WeightPlan],
    target: Target,
    *,
    context: int,
    cache: CacheFormat,
    efficiency: Efficiency,
) -> SpeedPlan:
    """The speeds of one model, scheme, context and cache on a device."""
    chunk = min(context, efficiency.prefill_chunk)
    token_read, chunk_read, multiplied = 0.0, 0.0, 0.0  # bytes at full bandwidth, and multiplications of one token
    for name, plan in weights.items():
        weight = anatomy.weights[name]
        size = plan.size_bytes / efficiency.weight_bandwidth[plan.format.bits]
        token_read += size * weight.active
        chunk_read += size * (1 - (1 - weight.active) ** chunk)  # tokens pick their experts, and rows, independently
        if weight.role and weight.kind not in ("embedding", "head"):
            multiplied += weight.parameters * weight.active
    kept = sum(cache_bytes(layer, max(context // 2, 1), cache, whole_windows=False) for layer in anatomy.caches)
    bandwidth, compute = target.memory.bandwidth_bytes_per_s, efficiency.prefill_compute * target.cpu.int8_ops_per_s
    token_s = (token_read + kept / efficiency.cache_bandwidth) / bandwidth
    token_s += len(anatomy.caches) * efficiency.layer_s
    chunk_s = max(2 * multiplied * chunk / compute, chunk_read / bandwidth)
    return SpeedPlan(
        decode_tokens_per_s=_rounded(1 / token_s),
        prefill_tokens_per_s=_rounded(chunk / chunk_s),
        bytes_per_token=kept
        + round(sum(plan.size_bytes * anatomy.weights[name].active for name, plan in weights.items())),
        basis=_BASIS,
    )


def _rounded(tokens_per_s: float) -> float:
    """Three figures where one decimal would say nothing."""
    return round(tokens_per_s, 1) if tokens_per_s >= 10 else float(f"{tokens_per_s:.3g}")
