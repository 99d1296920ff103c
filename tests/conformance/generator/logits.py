"""Rows of logits that are exact in float32 and short in decimal: integers over a power of two, each value once."""

from __future__ import annotations

from collections.abc import Mapping

DIVISOR = 16


def row(size: int, multiplier: int, modulus: int, *, divisor: int = DIVISOR) -> list[float]:
    """`size` logits ((i * multiplier) mod modulus - modulus // 2) / divisor, i from 1. The modulus is a prime over the size."""
    return [((index * multiplier) % modulus - modulus // 2) / divisor for index in range(1, size + 1)]


def from_formula(formula: Mapping[str, int]) -> list[float]:
    """The logits of a case's `logits_formula`, as README.md has it."""
    size, multiplier, modulus, offset, divisor = (
        formula[key] for key in ("size", "multiplier", "modulus", "offset", "divisor")
    )
    return [((index * multiplier) % modulus - offset) / divisor for index in range(size)]
