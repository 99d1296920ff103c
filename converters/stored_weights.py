"""A plan's weights as numbers, for any format: the same whole numbers and scales that the ONNX program of that plan has.

Quantizing happens once, here; a converter only packs what it is given. So formats differ from each other by their kernels alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from edgekit.calibration import THREADS
from edgekit.graph import TensorReport
from edgekit.plan import INT8_LEVEL, Plan, WeightPlan
from edgekit.progress import Progress, ProgressFn
from edgekit.source import Source, Tensor

from .calibrate import rounding_guides, second_moments
from .gptq import RoundingGuide
from .quantize import QuantizedRows, dequantize
from .scaling import find_scales, scaled_source
from .weight_rows import (
    Chunk,
    ChunkFigures,
    StoredRows,
    chunks_of,
    in_parallel,
    read_chunk,
    report_on,
    tensors_by_matrix,
)

__all__ = ["StoredMatrix", "StoredWeight", "stored_weights", "tuned_source"]

_Number = TypeVar("_Number", bound=np.generic)
Floats = NDArray[np.float32]
Guides = Iterable[Mapping[str, RoundingGuide]]


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One matrix of a weight, or a vector.

    Attributes:
        role: Of the weight: `embedding`, `layers.0.qkv`, …
        plan: Its shape and format.
        rows: Whole numbers in blocks, or floats [rows, columns] of 32 or 16 bits; norms have their offset added.
        report: How it was stored; `size_bytes` is what its numbers take when packed without gaps.
    """

    role: str
    plan: WeightPlan
    rows: StoredRows
    report: TensorReport

    def floats(self) -> Floats:
        """The weights that are stored, float32 of the plan's shape."""
        if isinstance(self.rows, QuantizedRows):
            return dequantize(self.rows, self.plan.format, self.plan.shape[1])
        return self.rows.astype(np.float32, copy=False)

    def part(self, start: int, stop: int) -> StoredMatrix:
        """Rows [start, stop). The report, and the errors among the rows, stay those of the whole."""
        plan = replace(self.plan, shape=(stop - start, *self.plan.shape[1:]))
        rows = self.rows
        if not isinstance(rows, QuantizedRows):
            return replace(self, plan=plan, rows=rows[start:stop])
        cut = replace(
            rows,
            values=rows.values[start:stop],
            scales=rows.scales[start:stop],
            zero_points=None if rows.zero_points is None else rows.zero_points[start:stop],
            offsets=None if rows.offsets is None else rows.offsets[start:stop],
        )
        return replace(self, plan=plan, rows=cut)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A role's weight: one matrix, or several of some rows each (see `WeightPlan.pieces`)."""

    role: str
    matrices: tuple[StoredMatrix, ...]

    @property
    def rows(self) -> int:
        """Of all matrices."""
        return sum(matrix.plan.shape[0] for matrix in self.matrices)

    def floats(self) -> Floats:
        """The weights that are stored, float32 [rows, columns] (a vector: [size])."""
        return np.concatenate([matrix.floats() for matrix in self.matrices])

    def part(self, start: int, stop: int) -> StoredWeight:
        """Rows [start, stop), as the query projection is of a packed one."""
        found, first = [], 0
        for matrix in self.matrices:
            size = matrix.plan.shape[0]
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                found.append(matrix if (low, high) == (0, size) else matrix.part(low, high))
            first += size
        return StoredWeight(self.role, tuple(found))


def stored_weights(
    source: Source,
    plan: Plan,
    place: Path,
    *,
    texts: Sequence[Sequence[int]] = (),
    on_progress: ProgressFn | None = None,
) -> Iterator[StoredWeight]:
    """Every weight of the plan, one at a time: vectors first, then matrices in the order that they are rounded in.

    Args:
        source: The checkpoint.
        plan: Formats, rounding and scaling.
        place: A folder; what is written aside there is removed.
        texts: Token ids to calibrate on, where the plan needs them.

    Raises:
        SourceError: A weight can't be read or is not a finite number.
        ConversionError: Calibration fails.
    """
    source, guides = tuned_source(source, plan, texts, place, on_progress=on_progress)
    total_bytes, done = sum(tensor.size_bytes for role in plan.weights for tensor in _tensors(source, role)), 0
    # numpy's own threads would only wait for each other inside of ours, and guides must not depend on their number
    with threadpool_limits(1, user_api="blas") if guides else nullcontext():
        for weight, source_bytes in _read_all(source, plan, guides):
            done += source_bytes
            if on_progress:
                on_progress(Progress("quantize", done, total_bytes, "bytes"))
            yield weight


def tuned_source(
    source: Source, plan: Plan, texts: Sequence[Sequence[int]], place: Path, *, on_progress: ProgressFn | None = None
) -> tuple[Source, Guides]:
    """The source with its columns scaled where the plan says so, and how to round what is rounded by texts."""
    if plan.scaled:
        moments = second_moments(source, texts, place, plan.scaled, stage="scale", on_progress=on_progress)
        with threadpool_limits(THREADS, user_api="blas"):
            scales = find_scales(source, plan.weights, moments, int8_activations=plan.accuracy_level == INT8_LEVEL)
        source = scaled_source(source, scales)
    return source, rounding_guides(source, texts, place, plan.calibrated) if plan.calibrated else ()


def _read_all(source: Source, plan: Plan, guides: Guides) -> Iterator[tuple[StoredWeight, int]]:
    """Vectors, what guides are for as they come, and all else; with each what it takes in the checkpoint."""

    def read(item: tuple[Chunk, RoundingGuide | None]) -> tuple[StoredRows, ChunkFigures]:
        chunk, guide = item
        matrix = plan.weights[chunk.role].matrices[chunk.matrix]
        return read_chunk(chunk, matrix, guide, rounding=plan.scheme.rounding, norm_offset=source.config.norm_offset)

    def chunks(roles: Iterable[str]) -> Iterator[Chunk]:
        return (chunk for role in roles for chunk in chunks_of(role, plan.weights[role], _tensors(source, role)))

    vectors = [role for role, weight in plan.weights.items() if len(weight.shape) == 1]
    yield from _assembled(source, plan, in_parallel(read, ((chunk, None) for chunk in chunks(vectors))))
    waiting = {role: None for role in plan.weights if role not in vectors}
    for some in guides:
        yield from _assembled(source, plan, in_parallel(read, ((chunk, some[chunk.role]) for chunk in chunks(some))))
        for role in some:
            del waiting[role]
        del some  # gone before the next are made: they take memory
    yield from _assembled(source, plan, in_parallel(read, ((chunk, None) for chunk in chunks(waiting))))


def _tensors(source: Source, role: str) -> tuple[Tensor, ...]:
    """Of a role's weight; a plan may store a head that is tied to the embedding apart from it."""
    return source.parts["embedding" if role == "head" and source.config.tied_embeddings else role]


def _assembled(
    source: Source, plan: Plan, results: Iterator[tuple[StoredRows, ChunkFigures]]
) -> Iterator[tuple[StoredWeight, int]]:
    """Weights out of their chunks, which come in order."""
    for role, mine in groupby(results, key=lambda result: result[1].role):
        weight, tensors = plan.weights[role], _tensors(source, role)
        by_matrix = [list(some) for _, some in groupby(mine, key=lambda result: result[1].matrix)]
        stored = tensors_by_matrix(weight, tensors)
        matrices = []
        for matrix, parts, chunks in zip(weight.matrices, stored, by_matrix, strict=True):
            report = report_on(role, matrix, parts, [figures for _, figures in chunks], matrix.size_bytes)
            matrices.append(StoredMatrix(role, matrix, _joined([rows for rows, _ in chunks]), report))
        yield StoredWeight(role, tuple(matrices)), sum(tensor.size_bytes for tensor in tensors)


def _joined(chunks: Sequence[StoredRows]) -> StoredRows:
    if len(chunks) == 1:
        return chunks[0]
    blocks = [rows for rows in chunks if isinstance(rows, QuantizedRows)]
    if not blocks:
        return np.concatenate([rows for rows in chunks if not isinstance(rows, QuantizedRows)])
    return QuantizedRows(
        np.concatenate([rows.values for rows in blocks]),
        np.concatenate([rows.scales for rows in blocks]),
        _joined_where_there([rows.zero_points for rows in blocks]),
        sum(rows.squared_error for rows in blocks),
        sum(rows.squared_weight for rows in blocks),
        _joined_where_there([rows.offsets for rows in blocks]),
        _joined_where_there([rows.tables for rows in blocks]),
    )


def _joined_where_there(arrays: Sequence[NDArray[_Number] | None]) -> NDArray[_Number] | None:
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if there else None
