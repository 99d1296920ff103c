"""Streaming weights from a checkpoint into a program's weight file, quantized on the way.

A few rows at a time, on as many threads as there are processors: memory does not grow with the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from edgekit.config import ModelConfig
from edgekit.graph import TensorReport
from edgekit.plan import WeightPlan
from edgekit.progress import Progress, ProgressFn
from edgekit.quant import Rounding
from edgekit.source import Tensor

from .disk_space import check_space, writing
from .gptq import RoundingGuide
from .onnx_decoder import EmittedDecoder
from .onnx_graph import Region
from .onnx_weights import WeightRegions
from .packing import pack
from .quantize import QuantizedRows
from .rope import rope_tables
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

__all__ = ["RegionFile", "open_region_file", "write_weights"]

_Write: TypeAlias = Callable[[tuple[Chunk, RoundingGuide | None]], ChunkFigures]


def write_weights(
    path: Path,
    emitted: EmittedDecoder,
    config: ModelConfig,
    weights: Mapping[str, WeightPlan],
    parts: Mapping[str, tuple[Tensor, ...]],
    *,
    rounding: Rounding = "nearest",
    guides: Iterable[Mapping[str, RoundingGuide]] = (),
    cache_scales: Sequence[NDArray[np.float32]] = (),
    on_progress: ProgressFn | None = None,
) -> tuple[TensorReport, ...]:
    """Fill every region of the weight file.

    Args:
        cache_scales: Of an 8-bit cache; see `edgekit.cache_scales`.
        rounding: Of what no guide is for; see `quantize`.
        guides: For some roles at a time how to round them. They are made, if need be, with one thread of numpy's.

    Raises:
        SourceError: A weight is not a finite number.
        ConversionError: The disk is full or the file can't be written.
    """
    source_bytes = sum(tensor.size_bytes for role in emitted.weights for tensor in parts[role])

    def write(item: tuple[Chunk, RoundingGuide | None]) -> ChunkFigures:
        chunk, guide = item
        plan = weights[chunk.role].matrices[chunk.matrix]
        rows, figures = read_chunk(chunk, plan, guide, rounding=rounding, norm_offset=config.norm_offset)
        _write_rows(file, chunk.first_row, rows, plan.format.bits, emitted.weights[chunk.role][chunk.matrix])
        return figures

    # numpy's own threads would only wait for each other inside of ours, and guides must not depend on their number
    limit = threadpool_limits(1, user_api="blas") if guides else nullcontext()
    with limit, open_region_file(path, emitted.builder.data_bytes) as file:
        _write_rope_tables(file, emitted)
        for region, scales in zip(emitted.cache_scales, cache_scales, strict=True):
            file.write_rows(region, 0, scales)
        written, done = [], 0
        for result in _write_all(write, emitted, weights, parts, guides):
            written.append(result)
            done += result.stored_bytes
            if on_progress:
                on_progress(Progress("quantize", done, source_bytes, "bytes"))
    return _reports(written, emitted, weights, parts)


@contextmanager
def open_region_file(path: Path, size_bytes: int) -> Iterator[RegionFile]:
    """A new weight file.

    Raises:
        ConversionError: The disk is full or the file can't be written.
    """
    check_space(path.parent, size_bytes)
    with writing(path), RegionFile(path, size_bytes) as file:
        yield file


def _write_rope_tables(file: RegionFile, emitted: EmittedDecoder) -> None:
    for rope, tables in emitted.tables.items():
        positions = tables[0].shape[0] // (2 if rope.long_factors else 1)
        for region, table in zip(tables, rope_tables(rope, positions), strict=True):
            file.write_rows(region, 0, table.astype(_float_type(region)))


def _write_all(
    write: _Write,
    emitted: EmittedDecoder,
    weights: Mapping[str, WeightPlan],
    parts: Mapping[str, tuple[Tensor, ...]],
    guides: Iterable[Mapping[str, RoundingGuide]],
) -> Iterator[ChunkFigures]:
    """Write what the guides are for as they come, then all else."""

    def chunks(roles: Iterable[str]) -> Iterator[Chunk]:
        return (chunk for role in roles for chunk in chunks_of(role, weights[role], parts[role]))

    waiting = dict.fromkeys(emitted.weights)
    for some in guides:
        yield from in_parallel(write, ((chunk, some[chunk.role]) for chunk in chunks(some)))
        for role in some:
            del waiting[role]
        del some  # gone before the next are made: they take memory
    yield from in_parallel(write, ((chunk, None) for chunk in chunks(waiting)))


def _write_rows(file: RegionFile, first_row: int, rows: StoredRows, bits: int, regions: WeightRegions) -> None:
    if not isinstance(rows, QuantizedRows):
        file.write_rows(regions.values, first_row, rows)
        return
    file.write_rows(regions.values, first_row, pack(rows.values, bits))
    if regions.scales:
        file.write_rows(regions.scales, first_row, rows.scales)
    if regions.zero_points and rows.zero_points is not None:
        file.write_rows(regions.zero_points, first_row, pack(rows.zero_points, bits))
    if regions.offsets and rows.offsets is not None:
        file.write_rows(regions.offsets, first_row, rows.offsets)


def _float_type(region: Region) -> type[np.floating]:
    return np.float16 if region.item_bytes == 2 else np.float32


def _reports(
    written: list[ChunkFigures],
    emitted: EmittedDecoder,
    weights: Mapping[str, WeightPlan],
    parts: Mapping[str, tuple[Tensor, ...]],
) -> tuple[TensorReport, ...]:
    reports = []
    for role, matrices in emitted.weights.items():
        plan = weights[role]
        for index, (form, stored) in enumerate(zip(plan.matrices, tensors_by_matrix(plan, parts[role]), strict=True)):
            mine = [part for part in written if (part.role, part.matrix) == (role, index)]
            reports.append(report_on(role, form, stored, mine, matrices[index].size_bytes))
    return tuple(reports)


class RegionFile:
    """A weight file of known size, its regions written in any order from several threads."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._handle = path.open("wb", buffering=0)
        self._handle.truncate(size_bytes)
        self._lock = threading.Lock()

    def write_rows(self, region: Region, first_row: int, rows: NDArray[np.generic]) -> None:
        """Write whole rows of a region."""
        data = memoryview(np.ascontiguousarray(rows).data).cast("B")
        if len(data) % region.row_bytes or first_row * region.row_bytes + len(data) > region.size_bytes:
            raise ValueError(f"{len(data)} bytes from row {first_row} do not fit region {region}")
        with self._lock:
            self._handle.seek(region.offset + first_row * region.row_bytes)
            while data:
                data = data[self._handle.write(data) :]

    def __enter__(self) -> RegionFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()
