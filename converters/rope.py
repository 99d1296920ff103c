"""Cosine and sine tables of rotary position embeddings, with every kind of frequency scaling."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgekit.config import RopeConfig

__all__ = ["inverse_frequencies", "rope_tables"]


def rope_tables(rope: RopeConfig, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine for each position, float32 [positions, dim / 2].

    With long factors the tables have twice as many rows: first those of the short factors, then those of the long ones.
    """
    factors = (rope.short_factors, rope.long_factors) if rope.long_factors else (rope.short_factors,)
    angles = np.concatenate(
        [np.outer(np.arange(positions, dtype=np.float32), inverse_frequencies(rope, divisors)) for divisors in factors]
    )
    scale = np.float32(rope.attention_factor)
    return np.cos(angles) * scale, np.sin(angles) * scale


def inverse_frequencies(rope: RopeConfig, divisors: tuple[float, ...] = ()) -> NDArray[np.float32]:
    """Radians per position of each rotated pair, float32 [dim / 2].

    Args:
        divisors: One per frequency, for the kinds that have them.
    """
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    periods = np.power(np.float32(rope.theta), exponents)
    if divisors:
        divided: NDArray[np.float32] = np.float32(1) / (np.asarray(divisors, np.float32) * periods)
        return divided
    base: NDArray[np.float32] = np.float32(1) / periods
    if rope.kind == "linear":
        return np.asarray(base / np.float32(rope.factor))
    if rope.kind == "llama3":
        return _llama3(rope, base)
    if rope.kind == "yarn":
        return _yarn(rope, base)
    return base


def _llama3(rope: RopeConfig, base: NDArray[np.float32]) -> NDArray[np.float32]:
    """Long waves are stretched by the factor, short ones kept, those between interpolated."""
    turns = np.float32(rope.original_context) * base / np.float32(2 * math.pi)  # in the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0, 1).astype(np.float32)
    return np.asarray((1 - blend) * base / np.float32(rope.factor) + blend * base)


def _yarn(rope: RopeConfig, base: NDArray[np.float32]) -> NDArray[np.float32]:
    """Interpolate the frequencies that turn seldom within the original context, keep the fast ones."""

    def dimension_that_turns(times: float) -> float:
        return rope.dim * math.log(rope.original_context / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_that_turns(rope.beta_fast), dimension_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - low) / (high - low or 0.001)
    slow = np.clip(ramp, 0, 1).astype(np.float32)
    return np.asarray(base / np.float32(rope.factor) * slow + base * (1 - slow))
