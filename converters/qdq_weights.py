"""The weight file of the NPU's graphs: each matrix quantized by rows, and written with its inputs along the first axis."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekit.graph import TensorReport
from edgekit.progress import Progress, ProgressFn
from edgekit.quant import WeightFormat
from edgekit.source import Tensor

from .layer_weights import LayerWeights
from .packing import pack
from .qdq_graph import MatrixRegions
from .row_scales import ScaledRows, quantize_rows
from .weight_rows import CHUNK_ELEMENTS, MOST_THREADS
from .weight_writer import RegionFile, open_region_file

__all__ = ["write_matrices"]


def write_matrices(
    path: Path,
    size_bytes: int,
    matrices: Sequence[MatrixRegions],
    parts: Mapping[str, tuple[Tensor, ...]],
    weights: LayerWeights,
    *,
    on_progress: ProgressFn | None = None,
) -> tuple[TensorReport, ...]:
    """Fill the file. A few whole roles are in memory at a time, since they are written transposed.

    Raises:
        SourceError: A weight is not a finite number.
        ConversionError: The disk is full or the file can't be written.
    """
    roles = [list(group) for _, group in groupby(matrices, key=lambda regions: regions.matrix.role)]
    reports = []
    with open_region_file(path, size_bytes) as file, ThreadPoolExecutor(_threads()) as pool:
        waiting = [pool.submit(_write_role, file, group, parts[group[0].matrix.role], weights) for group in roles]
        try:
            for number, future in enumerate(waiting):
                reports.append(future.result())
                if on_progress:
                    on_progress(Progress("quantize", number + 1, len(roles), "weights"))
        finally:
            pool.shutdown(cancel_futures=True)
    return tuple(reports)


def _threads() -> int:
    return min(os.cpu_count() or 1, MOST_THREADS)


def _write_role(
    file: RegionFile, group: Sequence[MatrixRegions], tensors: tuple[Tensor, ...], weights: LayerWeights
) -> TensorReport:
    form = group[0].format
    floats = weights.matrix(group[0].matrix.role)
    step = max(CHUNK_ELEMENTS // floats.shape[1], 1)
    rows = _joined([quantize_rows(floats[start : start + step], form) for start in range(0, len(floats), step)])
    del floats
    for regions in group:
        matrix = regions.matrix
        part = slice(matrix.first_row, matrix.first_row + matrix.rows)
        file.write_rows(regions.values, 0, _packed(rows.values[part].T, form.bits))
        file.write_rows(regions.row_scales, 0, rows.row_scales[part] * np.float32(matrix.factor))
        if regions.block_scales and rows.block_scales is not None:
            file.write_rows(regions.block_scales, 0, np.ascontiguousarray(rows.block_scales[part].T))
    return _report(group, form, rows, tensors)


def _joined(chunks: Sequence[ScaledRows]) -> ScaledRows:
    blocks = [chunk.block_scales for chunk in chunks if chunk.block_scales is not None]
    return ScaledRows(
        np.concatenate([chunk.values for chunk in chunks]),
        np.concatenate([chunk.row_scales for chunk in chunks]),
        np.concatenate(blocks) if blocks else None,
        sum(chunk.squared_error for chunk in chunks),
        sum(chunk.squared_weight for chunk in chunks),
        max(chunk.largest for chunk in chunks),
    )


def _packed(values: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    bytes_ = np.ascontiguousarray(values).view(np.uint8)
    return pack(bytes_ & np.uint8(15), 4) if bits == 4 else bytes_


def _report(
    group: Sequence[MatrixRegions], form: WeightFormat, rows: ScaledRows, tensors: tuple[Tensor, ...]
) -> TensorReport:
    error = (rows.squared_error / rows.squared_weight) ** 0.5 if rows.squared_weight else 0.0
    places = [place for regions in group for place in (regions.values, regions.row_scales, regions.block_scales)]
    return TensorReport(
        role=group[0].matrix.role,
        stored=" + ".join(dict.fromkeys(tensor.dtype for tensor in tensors)),
        bits=form.bits,
        block_size=form.block_size or rows.values.shape[1],
        size_bytes=sum(place.size_bytes for place in places if place),
        source_bytes=sum(tensor.size_bytes for tensor in tensors),
        relative_error=float(f"{error:.4g}"),
        peak=float(f"{rows.largest / (rows.squared_weight / rows.values.size) ** 0.5:.4g}")
        if rows.squared_weight
        else 0.0,
    )
