"""What keeps Gemma, whose values outgrow half precision, within it: exact divisions by powers of two that its norms undo.

The residual stream passes 65,504, the most that there is, in published checkpoints. What is added to it (embedding, post-norms)
is 64 times smaller; what reads it are RMS norms, which give the same for any scale once eps is divided by its square. 64 gives
room up to 4 million. The stream, of size 1 and more, stays far above the least normal number, which is 64 * 2^-14 = 0.004 of it.

What the post-norms take is 4 times smaller too: the matrices before them are, and so that the feed-forward's own product has
the same room, its second factor is in place of the matrix behind it. Reports of Gemma 3 in half precision name the stream and,
less sure, these products; clamping the stream alone is told to be enough for the 4B and 12B. More than 4 would take eps, 1e-6
there, below half precision's least number, and these values may be small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from edgekit.config import ModelConfig

from .quantize import QuantizedRows
from .stored_weights import StoredMatrix, StoredWeight

__all__ = ["PRODUCT_DIVISOR", "STREAM_DIVISOR", "STREAM_READERS", "STREAM_WRITERS", "lessened"]

STREAM_DIVISOR, PRODUCT_DIVISOR = 64, 4
STREAM_WRITERS = ("post_attention_norm", "post_mlp_norm")
STREAM_READERS = ("attention_norm", "mlp_norm", "final_norm")


def lessened(stored: Iterable[StoredWeight], config: ModelConfig) -> Iterator[StoredWeight]:
    """The weights, with those that make what a post-norm takes divided by PRODUCT_DIVISOR."""
    first_rows = dict.fromkeys(("output", "output_bias", "down_bias"), 0)
    first_rows |= dict.fromkeys(("gate_up", "gate_up_bias"), config.intermediate_size)
    for weight in stored:
        kind = weight.role.rpartition(".")[2]
        yield _divided(weight, first_rows[kind]) if kind in first_rows else weight


def _divided(weight: StoredWeight, first_row: int) -> StoredWeight:
    """From a row on."""
    matrices, before = [], 0
    for matrix in weight.matrices:
        count = matrix.plan.shape[0]
        factors = np.where(np.arange(before, before + count) < first_row, 1, 1 / PRODUCT_DIVISOR)
        matrices.append(_multiplied(matrix, factors))
        before += count
    return StoredWeight(weight.role, tuple(matrices))


def _multiplied(matrix: StoredMatrix, factors: Any) -> StoredMatrix:
    rows = matrix.rows
    if not isinstance(rows, QuantizedRows):
        shaped = factors.reshape(-1, *[1] * (rows.ndim - 1)).astype(rows.dtype)
        return replace(matrix, rows=rows * shaped)
    of_rows = factors[:, None].astype(np.float32)
    offsets = None if rows.offsets is None else rows.offsets * of_rows
    return replace(matrix, rows=replace(rows, scales=rows.scales * of_rows, offsets=offsets))
