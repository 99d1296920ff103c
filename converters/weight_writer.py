"""Streaming weights from a checkpoint into a program's weight file, quantized on the way.

A few rows at a time, on as many threads as there are processors: memory does not grow with the model.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from edgekit.config import ModelConfig
from edgekit.errors import ConversionError, SourceError
from edgekit.graph import TensorReport
from edgekit.plan import WeightPlan
from edgekit.progress import Progress, ProgressFn
from edgekit.quant import Rounding, WeightFormat
from edgekit.source import Tensor

from .gptq import RoundingGuide, quantize_guided
from .onnx_decoder import EmittedDecoder
from .onnx_graph import Region
from .onnx_weights import WeightRegions
from .packing import pack
from .quantize import QuantizedRows, carry_over, quantize
from .rope import rope_tables

__all__ = ["MOST_THREADS", "RegionFile", "open_region_file", "read_floats", "write_weights"]

CHUNK_ELEMENTS = 1 << 21  # 8 MiB of float32 on each thread
MOST_THREADS = 4  # more only multiply the memory: reading and writing are shared


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows [start, stop) of one stored tensor, which become rows `first_row` and on of a matrix of a role's weight."""

    role: str
    matrix: int
    tensor: Tensor
    start: int
    stop: int
    first_row: int


@dataclass(frozen=True, slots=True)
class _Written:
    role: str
    matrix: int
    squared_error: float
    squared_weight: float
    largest: float  # magnitude; 0 where the weights themselves were not seen
    stored_bytes: int


_Write: TypeAlias = Callable[[_Chunk, RoundingGuide | None], _Written]


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

    def write(chunk: _Chunk, guide: RoundingGuide | None) -> _Written:
        plan = weights[chunk.role].matrices[chunk.matrix]
        regions = emitted.weights[chunk.role][chunk.matrix]
        return _write_chunk(file, chunk, plan, regions, guide, rounding, config.norm_offset)

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
    _check_space(path, size_bytes)
    try:
        with RegionFile(path, size_bytes) as file:
            yield file
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        raise ConversionError(f"{path.name} can't be written: {what}", hint="free some space, or use --out") from error


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
) -> Iterator[_Written]:
    """Write what the guides are for as they come, then all else."""

    def chunks(roles: Iterable[str]) -> Iterator[_Chunk]:
        return (chunk for role in roles for chunk in _chunks_of(role, weights[role], parts[role]))

    waiting = dict.fromkeys(emitted.weights)
    for some in guides:
        yield from _in_parallel(write, ((chunk, some[chunk.role]) for chunk in chunks(some)))
        for role in some:
            del waiting[role]
        del some  # gone before the next are made: they take memory
    yield from _in_parallel(write, ((chunk, None) for chunk in chunks(waiting)))


def _check_space(path: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if size_bytes > free:
        raise ConversionError(
            f"no space left: the weights need {size_bytes / 1e6:,.0f} MB, {path.parent} has {free / 1e6:,.0f} MB",
            hint="free some space, or choose another place with --out",
        )


def _chunks_of(role: str, plan: WeightPlan, tensors: tuple[Tensor, ...]) -> Iterator[_Chunk]:
    for matrix, parts in enumerate(_by_matrix(plan, tensors)):
        first_row = 0
        for tensor in parts:
            rows = tensor.shape[0]
            columns = int(np.prod(tensor.shape[1:], dtype=np.int64))
            step = max(CHUNK_ELEMENTS // columns, 1)
            for start in range(0, rows, step):
                yield _Chunk(role, matrix, tensor, start, min(start + step, rows), first_row + start)
            first_row += rows


def _by_matrix(plan: WeightPlan, tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """The stored tensors of each matrix that a weight is kept as."""
    rest = iter(tensors)
    for matrix in plan.matrices:
        mine: list[Tensor] = []
        while sum(tensor.shape[0] for tensor in mine) < matrix.shape[0]:
            mine.append(next(rest))
        yield tuple(mine)


def _write_chunk(
    file: RegionFile,
    chunk: _Chunk,
    plan: WeightPlan,
    regions: WeightRegions,
    guide: RoundingGuide | None,
    rounding: Rounding,
    norm_offset: float,
) -> _Written:
    stored_bytes = chunk.tensor.size_bytes * (chunk.stop - chunk.start) // chunk.tensor.shape[0]
    if plan.form_is_blocks:
        rows, largest = _quantized(chunk, plan, guide, rounding)
        file.write_rows(regions.values, chunk.first_row, pack(rows.values, plan.format.bits))
        if regions.scales:
            file.write_rows(regions.scales, chunk.first_row, rows.scales)
        if regions.zero_points and rows.zero_points is not None:
            file.write_rows(regions.zero_points, chunk.first_row, pack(rows.zero_points, plan.format.bits))
        if regions.offsets and rows.offsets is not None:
            file.write_rows(regions.offsets, chunk.first_row, rows.offsets)
        return _Written(chunk.role, chunk.matrix, rows.squared_error, rows.squared_weight, largest, stored_bytes)
    floats = read_floats(chunk.tensor, chunk.start, chunk.stop)
    if chunk.role.endswith("_norm"):
        floats = floats + np.float32(norm_offset)
    stored = floats.astype(_float_type(regions.values))
    file.write_rows(regions.values, chunk.first_row, stored)
    difference = stored.astype(np.float32) - floats if stored.dtype != floats.dtype else np.zeros(1, np.float32)
    squared_error, squared_weight = (float(np.vdot(values, values)) for values in (difference, floats))
    return _Written(chunk.role, chunk.matrix, squared_error, squared_weight, _largest(floats), stored_bytes)


def _quantized(
    chunk: _Chunk, plan: WeightPlan, guide: RoundingGuide | None, rounding: Rounding
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


def _float_type(region: Region) -> type[np.floating]:
    return np.float16 if region.item_bytes == 2 else np.float32


def _in_parallel(work: _Write, items: Iterable[tuple[_Chunk, RoundingGuide | None]]) -> Iterator[_Written]:
    """Results as they come; at most one chunk waits for each thread, so that an error or Ctrl-C ends it at once."""
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        running: set[Future[_Written]] = set()
        for item in items:
            running.add(pool.submit(work, *item))
            if len(running) > threads:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        yield from (future.result() for future in wait(running).done)


def _reports(
    written: list[_Written],
    emitted: EmittedDecoder,
    weights: Mapping[str, WeightPlan],
    parts: Mapping[str, tuple[Tensor, ...]],
) -> tuple[TensorReport, ...]:
    reports = []
    for role, matrices in emitted.weights.items():
        plan = weights[role]
        for index, (form, stored) in enumerate(zip(plan.matrices, _by_matrix(plan, parts[role]), strict=True)):
            mine = [part for part in written if (part.role, part.matrix) == (role, index)]
            reports.append(_report(role, form.format, matrices[index], stored, mine))
    return tuple(reports)


def _report(
    role: str, form: WeightFormat, regions: WeightRegions, stored: tuple[Tensor, ...], written: list[_Written]
) -> TensorReport:
    sums = sorted((part.squared_error, part.squared_weight) for part in written)
    error, weight = (sum(column) for column in zip(*sums, strict=True))
    largest, elements = max(part.largest for part in written), sum(prod(tensor.shape) for tensor in stored)
    return TensorReport(
        role=role,
        stored=" + ".join(dict.fromkeys(tensor.dtype for tensor in stored)),
        bits=regions.values.item_bytes * 8 if form.is_float else form.bits,
        block_size=form.block_size,
        size_bytes=regions.size_bytes,
        source_bytes=sum(tensor.size_bytes for tensor in stored),
        relative_error=_four_digits((error / weight) ** 0.5 if weight else 0.0),
        peak=_four_digits(largest / (weight / elements) ** 0.5 if weight else 0.0),
    )


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


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
