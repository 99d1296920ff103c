"""What rounding by texts that the model writes costs on the machine that converts, from shapes alone.

The work is counted step by step; the rates are those of the two threads that calibration computes with, measured on a
2-core x86-64 machine with SmolLM2-135M. Other machines differ by their rates: a forecast of the order, not a promise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CalibrationCost", "calibration_cost"]

TEXTS, NEW_TOKENS, TOKENS = 20, 128, 3100  # written, each of so many tokens; all tokens with their prompts
BYTES_PER_S = 11e9  # that decoding reads its 8-bit weights with
FLOPS = 1e11  # of products in float32
FLOPS_64 = 3e10  # of a Cholesky factor and its inverse in float64
ELEMENTS_PER_S = 4e7  # that are rounded one column after the other, besides their products


@dataclass(frozen=True, slots=True)
class CalibrationCost:
    """Seconds, those of them that one layer takes on average, and the most memory in bytes at any time."""

    seconds: float
    layer_seconds: float
    peak_bytes: int

    def __str__(self) -> str:
        time = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} min"
        return f"about {time} ({self.layer_seconds:.2g} s a layer) and {self.peak_bytes / 1e9:.1f} GB"


def calibration_cost(shapes: Mapping[str, tuple[int, ...]], rounded: frozenset[str]) -> CalibrationCost:
    """The cost of GPTQ for the roles that are rounded by it.

    Args:
        shapes: Of all weights of the model by role, rows first; norms and other vectors are of no account.
        rounded: Roles of matrices.
    """
    matrices = {role: (shape[0], shape[1]) for role, shape in shapes.items() if len(shape) == 2}
    parameters = sum(rows * columns for rows, columns in matrices.values())
    writing = TEXTS * NEW_TOKENS * parameters / BYTES_PER_S
    inside = sum(rows * columns for role, (rows, columns) in matrices.items() if role.startswith("layers."))
    running = 2 * inside * TOKENS / FLOPS
    seconds = writing + running + sum(_seconds(*matrices[role]) for role in rounded)
    of_layers = running + sum(_seconds(*matrices[role]) for role in rounded if role.startswith("layers."))
    layers = len({role.rpartition(".")[0] for role in matrices if role.startswith("layers.")})
    return CalibrationCost(seconds, of_layers / max(layers, 1), _peak_bytes(matrices, rounded))


def _seconds(rows: int, columns: int) -> float:
    """Second moments, their factor and its inverse, and rounding, of one matrix."""
    moments = 2 * TOKENS * columns**2 / FLOPS
    guide = (
        columns**3 / FLOPS_64
    )  # a third for the factor, a third for its inverse, a third for what is slower than products
    return moments + guide + rows * columns * (columns / FLOPS + 1 / ELEMENTS_PER_S)


def _peak_bytes(matrices: Mapping[str, tuple[int, int]], rounded: frozenset[str]) -> int:
    """Hidden states before and after a layer, and the largest layer in float32 with its second moments, or the guide of its
    widest matrix being made.
    """
    hidden = matrices["embedding"][1]
    layers: dict[str, list[tuple[str, tuple[int, int]]]] = {}
    for role, shape in matrices.items():
        layers.setdefault(role.rpartition(".")[0], []).append((role, shape))
    peaks = []
    for layer, members in layers.items():
        floats = sum(4 * rows * columns for _, (rows, columns) in members) if layer else 0
        sizes = [8 * columns**2 for role, (_, columns) in members if role in rounded]
        peaks.append(max(floats + sum(sizes), sum(sizes) + 2 * max(sizes, default=0)))
    return 3 * 4 * TOKENS * hidden + max(peaks)
