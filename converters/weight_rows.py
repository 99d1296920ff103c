"""Rows of a checkpoint's weights in the form that a plan keeps them in, a few at a time, on as many threads as there are
processors: memory does not grow with the model. Every converter packs the same numbers its own way.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import SourceError
from edgekit.graph import TensorReport
from edgekit.plan import WeightPlan
from edgekit.quant import Rounding
from edgekit.source import Tensor

from .gptq import RoundingGuide, quantize_guided
from .quantize import QuantizedRows, carry_over, quantize

__all__ = [
    "CHUNK_ELEMENTS",
    "MOST_THREADS",
    "Chunk",
    "ChunkFigures",
    "StoredRows",
    "chunks_of",
    "in_parallel",
    "read_chunk",
    "read_floats",
    "report_on",
    "tensors_by_matrix",
]

CHUNK_ELEMENTS = 1 << 21  # 8 MiB of float32 on each thread
MOST_THREADS = 4  # more only multiply the memory: reading and writing are shared

StoredRows: TypeAlias = QuantizedRows | NDArray[np.float32] | NDArray[np.float16]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows [start, stop) of one stored tensor, which become rows `first_row` and on of a matrix of a role's weight."""

    role: str
    matrix: int
    tensor: Tensor
    start: int
    stop: int
    first_row: int

    @property
    def stored_bytes(self) -> int:
        """What it takes in the checkpoint."""
        return self.tensor.size_bytes * (self.stop - self.start) // self.tensor.shape[0]


@dataclass(frozen=True, slots=True)
class ChunkFigures:
    """What storing a chunk costs; `largest`: magnitude, 0 where the weights themselves were not seen."""

    role: str
    matrix: int
    squared_error: float
    squared_weight: float
    largest: float
    stored_bytes: int


def chunks_of(role: str, plan: WeightPlan, tensors: tuple[Tensor, ...]) -> Iterator[Chunk]:
    """All rows of a role's weight, those of each matrix in order."""
    for matrix, parts in enumerate(tensors_by_matrix(plan, tensors)):
        together = plan.matrices[matrix].format.block_size if plan.matrices[matrix].format.palette else 1
        first_row = 0
        for tensor in parts:
            rows = tensor.shape[0]
            columns = int(np.prod(tensor.shape[1:], dtype=np.int64))
            step = max(CHUNK_ELEMENTS // columns // together, 1) * together
            for start in range(0, rows, step):
                yield Chunk(role, matrix, tensor, start, min(start + step, rows), first_row + start)
            first_row += rows


def tensors_by_matrix(plan: WeightPlan, tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """The stored tensors of each matrix that a weight is kept as."""
    rest = iter(tensors)
    for matrix in plan.matrices:
        mine: list[Tensor] = []
        while sum(tensor.shape[0] for tensor in mine) < matrix.shape[0]:
            mine.append(next(rest))
        yield tuple(mine)


def read_chunk(
    chunk: Chunk, plan: WeightPlan, guide: RoundingGuide | None, *, rounding: Rounding, norm_offset: float
) -> tuple[StoredRows, ChunkFigures]:
    """A chunk as its matrix keeps it: whole numbers in blocks, or floats of the format's width.

    Args:
        plan: Of the chunk's matrix.
        guide: How to round it; None rounds as `rounding` says.
        norm_offset: Added to norms.

    Raises:
        SourceError: A weight is not a finite number, or is too large to quantize.
    """
    if plan.form_is_blocks:
        rows, largest = _quantized(chunk, plan, guide, rounding)
        return rows, _figures(chunk, rows.squared_error, rows.squared_weight, largest)
    floats = read_floats(chunk.tensor, chunk.start, chunk.stop)
    if chunk.role.endswith("_norm"):
        floats = floats + np.float32(norm_offset)
    stored = floats.astype(np.float16) if plan.format.bits == 16 else floats
    difference = stored.astype(np.float32) - floats if stored.dtype != floats.dtype else np.zeros(1, np.float32)
    squared_error, squared_weight = (float(np.vdot(values, values)) for values in (difference, floats))
    return stored, _figures(chunk, squared_error, squared_weight, _largest(floats))


def _figures(chunk: Chunk, squared_error: float, squared_weight: float, largest: float) -> ChunkFigures:
    return ChunkFigures(chunk.role, chunk.matrix, squared_error, squared_weight, largest, chunk.stored_bytes)


def _quantized(
    chunk: Chunk, plan: WeightPlan, guide: RoundingGuide | None, rounding: Rounding
) -> tuple[QuantizedRows, float]:
    """The rows, and the largest magnitude among the weights."""
    if plan.carried:
        rows = carry_over(chunk.tensor.read_blocks(chunk.start, chunk.stop))
        if not np.isfinite(rows.squared_weight):
            raise _not_finite(chunk.tensor)
        return rows, 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        floats = read_floats(chunk.tensor, chunk.start, chunk.stop)
        form = plan.format
        rows = quantize_guided(floats, form, guide) if guide else quantize(floats, form, rounding=rounding)
    if not np.isfinite(rows.squared_weight + rows.squared_error):
        raise SourceError(
            f"tensor {chunk.tensor.name} holds values too large to quantize",
            hint="the checkpoint is damaged; use fp32 to keep it",
        )
    return rows, _largest(floats)


def _largest(weights: NDArray[np.float32]) -> float:
    return float(max(weights.max(), -weights.min()))


def read_floats(tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
    """Rows of a stored tensor.

    Raises:
        SourceError: A weight is not a finite number.
    """
    weights = tensor.read(start, stop)
    # The sum is not finite if any weight is not; where it is only too large, each weight is looked at.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not np.isfinite(weights.sum())
    if suspicious and not np.isfinite(weights).all():
        raise _not_finite(tensor)
    return weights


def _not_finite(tensor: Tensor) -> SourceError:
    return SourceError(
        f"tensor {tensor.name} holds values that are not finite numbers",
        hint="the checkpoint is damaged; fetch it again",
    )


def in_parallel(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Results in the order of the items; at most one waits for each thread, so that an error or Ctrl-C ends it at once."""
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    pool = ThreadPoolExecutor(threads)
    running: deque[Future[_Result]] = deque()
    try:
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) >= 2 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def report_on(
    role: str, plan: WeightPlan, tensors: tuple[Tensor, ...], figures: Sequence[ChunkFigures], size_bytes: int
) -> TensorReport:
    """How one matrix was stored.

    Args:
        plan: Of the matrix.
        tensors: What it was read from.
        figures: Of all its chunks.
        size_bytes: What it takes in the program.
    """
    sums = sorted((part.squared_error, part.squared_weight) for part in figures)
    error, weight = (sum(column) for column in zip(*sums, strict=True))
    largest, elements = max(part.largest for part in figures), sum(prod(tensor.shape) for tensor in tensors)
    form = plan.format
    return TensorReport(
        role=role,
        stored=" + ".join(dict.fromkeys(tensor.dtype for tensor in tensors)),
        bits=form.bits,
        block_size=form.block_size or (prod(plan.shape[1:]) if form.row_scaled else 0),
        size_bytes=size_bytes,
        source_bytes=sum(tensor.size_bytes for tensor in tensors),
        relative_error=_four_digits((error / weight) ** 0.5 if weight else 0.0),
        peak=_four_digits(largest / (weight / elements) ** 0.5 if weight else 0.0),
    )


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")
