"""How far from full precision a program may be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edgekit import bounds
from edgekit.bounds import is_suspicious, kl_bound, rounding_bound

SMALL, LARGE = 135_000_000, 3_000_000_000


def _program(format: str, *bits: int, cache: str = "float16") -> Any:
    reports = [SimpleNamespace(bits=each, block_size=16 * (each < 16), relative_error=0.01) for each in bits]
    return SimpleNamespace(format=format, weights=reports, cache=SimpleNamespace(dtype=cache))


@pytest.mark.parametrize(
    ("program", "parameters", "bound"),
    [
        (_program("onnx", 32, 32), SMALL, bounds.BOUND_FLOATS),
        (_program("onnx", 32, 32, cache="int8"), SMALL, bounds.BOUND_8_BITS),
        (_program("onnx", 8, 32), SMALL, bounds.BOUND_8_BITS),
        (_program("executorch", 8, 32), SMALL, bounds.BOUND_8_BIT_ROWS),
        (_program("onnx-qdq", 8, 32), SMALL, bounds.BOUND_8_BIT_NPU),
        (_program("coreml", 6, 16), SMALL, bounds.BOUND_6_BITS_SMALL),
        (_program("coreml", 6, 16), LARGE, bounds.BOUND_6_BITS),
        (_program("coreml", 4, 6), LARGE, bounds.BOUND_4_BITS),
        (_program("onnx-qdq", 4, 8), SMALL, bounds.BOUND_4_BITS_SMALL),
    ],
)
def test_the_fewest_bits_set_the_bound(program: Any, parameters: int, bound: float) -> None:
    assert kl_bound(program, parameters) == bound


@pytest.mark.parametrize(
    ("kl_mean", "bound", "suspicious"),
    [(0.085, 0.1, True), (0.018, 0.1, False), (0.2, 0.1, False), (0.3, 0.6, False), (0.019, 0.02, False)],
)
def test_only_wide_bounds_of_8_bits_can_hide_a_fault(kl_mean: float, bound: float, suspicious: bool) -> None:
    assert is_suspicious(kl_mean, bound) is suspicious


def test_what_rounding_costs_a_token_alone_widens_the_bound_up_to_the_schemes() -> None:
    assert rounding_bound(0.1, 0.0006) == bounds.SUSPICIOUS
    assert rounding_bound(0.1, 0.005) == 0.08
    assert rounding_bound(0.1, 0.0097) == 0.1
