"""AWQ-style scaling: channels that matter are made large before rounding, and small again by the weight before them.

Column j of a weight is multiplied by s_j and whatever produces input j is divided by it: the norm before query, key, value,
gate and up; the rows of the up projection before down; the rows of the value projection before the output projection. The
function stays, at no cost when it runs; what a channel loses by rounding shrinks with s_j. s is a power of the inputs' size; the
power is searched, by what rounding then changes in the weight's products (arXiv:2306.00978: sections 3.2 and 4; here sizes
are root mean squares, and products are compared through the inputs' second moments instead of the inputs). Where products are
computed in int8, even inputs are also rounded better: SmoothQuant's point (arXiv:2211.10438), which counts most at 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgekit.config import ModelConfig
from edgekit.plan import WeightPlan
from edgekit.quant import WeightFormat
from edgekit.source import Source, StoredBlocks, Tensor

from .quantize import Floats, dequantize, quantize

__all__ = ["SCALED", "find_scales", "scaled_source", "search_scales", "shared_channels", "some_rows"]

POWERS = tuple(np.linspace(0, 1, 9).tolist())
ROWS_TRIED, _RUN = 128, 16  # of each weight, in evenly spread runs
_LEAST_SIZE = 1e-4  # of the largest: what no text lit up
# What produces the inputs of a matrix: a norm, or the last rows of another matrix.
_NORMS = {"qkv": "attention_norm", "gate_up": "mlp_norm"}
_PRODUCERS = {"output": "qkv", "down": "gate_up"}
SCALED = (*_NORMS, *_PRODUCERS)

Moments = NDArray[np.float64]
Channels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ScaledTensor:
    """A stored tensor as it is read with its rows and columns multiplied.

    Attributes:
        rows: float32 [rows] or None.
        columns: float32 [columns] or None.
        offset: Added to every value first and taken off last: a norm that stores its distance from one.
    """

    base: Tensor
    rows: Floats | None = None
    columns: Floats | None = None
    offset: float = 0.0

    @property
    def name(self) -> str:
        """The name in the checkpoint."""
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return self.base.shape

    @property
    def dtype(self) -> str:
        """The stored type in the checkpoint's own words."""
        return self.base.dtype

    @property
    def size_bytes(self) -> int:
        """Stored size."""
        return self.base.size_bytes

    @property
    def exact_format(self) -> None:
        """None: scaled values are no longer the checkpoint's blocks."""
        return

    def read(self, start: int = 0, stop: int | None = None) -> Floats:
        """Rows [start, stop) as float32."""
        values = self.base.read(start, stop) + np.float32(self.offset)
        if self.rows is not None:
            values *= self.rows[start:stop].reshape(-1, *(1,) * (values.ndim - 1))
        if self.columns is not None:
            values *= self.columns
        values -= np.float32(self.offset)
        return values

    def read_blocks(self, start: int, stop: int) -> StoredBlocks:
        """Never called: `exact_format` is None."""
        raise TypeError(f"{self.name} has no blocks of its own")


def find_scales(
    source: Source,
    weights: Mapping[str, WeightPlan],
    moments: Iterable[Mapping[str, Moments]],
    *,
    int8_activations: bool,
) -> dict[str, Floats]:
    """The factor of each column of the layers' matrices that are rounded, by role.

    Args:
        source: The checkpoint.
        weights: Their formats.
        moments: Second moments of their inputs, by role, some at a time; their mean or sum.
        int8_activations: Whether products are computed in int8.
    """
    found = {}
    for some in moments:
        for role, seen in some.items():
            plan = weights[role]
            if role.rpartition(".")[2] in SCALED and plan.form_is_blocks and not plan.carried:
                channels = shared_channels(source.config, role, plan.shape[1])
                found[role] = search_scales(
                    some_rows(source.parts[role], ROWS_TRIED)[0],
                    seen,
                    plan.format,
                    channels,
                    int8_activations=int8_activations,
                )
    return found


def search_scales(
    weights: Floats, moments: Moments, form: WeightFormat, channels: Channels, *, int8_activations: bool = False
) -> Floats:
    """The factors of least change in the products, float32 [columns]; ones where no scaling is better.

    Args:
        weights: float32 [rows, columns].
        moments: float64 [columns, columns]: second moments of the inputs.
        form: A block format.
        channels: int64 [columns]: columns of one channel share a factor.
        int8_activations: Count what rounding the inputs to 8 bits changes, too.
    """
    sizes = np.sqrt(np.bincount(channels, moments.diagonal()) / np.bincount(channels))
    seen = moments.astype(np.float32)
    best, least = np.ones(weights.shape[1], np.float32), np.inf
    for power in POWERS:
        factors = _factors(sizes, power)[channels]
        stored = dequantize(quantize(weights * factors, form), form, weights.shape[1])
        change = stored / factors - weights
        loss = float(np.vdot(change @ seen, change))
        if int8_activations:
            loss += _input_error(
                weights * factors, np.sqrt(moments.diagonal()) / factors, form.block_size or len(factors)
            )
        if loss < least:
            best, least = factors, loss
    return best


def _input_error(weights: Floats, sizes: Moments, block_size: int) -> float:
    """Squared error of the products where inputs of these sizes are rounded, each block to 255 levels over its range.

    The square of the largest of a block is taken to be 2.4 times that of their 8-norm: for 32 to 128 normal numbers of one size
    that is within 3%, and it follows the largest size where one stands out.
    """
    lacking = -len(sizes) % block_size
    blocks = np.pad(sizes, (0, lacking)).reshape(-1, block_size)
    peaks = 2.4 * (blocks**8).sum(axis=1) ** 0.25
    energy = np.pad(np.square(weights, dtype=np.float64).sum(axis=0), (0, lacking)).reshape(-1, block_size).sum(axis=1)
    return float(peaks @ energy) / 127**2 / 12  # of a uniform error: step^2 / 12


def _factors(sizes: Moments, power: float) -> Floats:
    """sizes^power, so that the largest and the smallest are each other's inverse."""
    raised = np.maximum(sizes, max(sizes.max(), 1e-30) * _LEAST_SIZE) ** power
    factors: Floats = (raised / np.sqrt(raised.max() * raised.min())).astype(np.float32)
    return factors


def shared_channels(config: ModelConfig, role: str, columns: int) -> Channels:
    """For each column the row that produces it: several heads of an output projection read the same value."""
    if not role.endswith(".output"):
        return np.arange(columns)
    attention = config.attention
    by_head = np.arange(attention.kv_heads * attention.head_dim).reshape(attention.kv_heads, 1, attention.head_dim)
    return np.repeat(by_head, attention.heads // attention.kv_heads, axis=1).reshape(-1)


def some_rows(tensors: tuple[Tensor, ...], count: int) -> tuple[Floats, int]:
    """Evenly spread runs of rows, float32 [about `count`, columns], and how many rows there are."""
    total = sum(tensor.shape[0] for tensor in tensors)
    step = max(total // count, 1) * _RUN
    runs = [tensor.read(start, start + _RUN) for tensor in tensors for start in range(0, tensor.shape[0], step)]
    return np.concatenate(runs), total


def scaled_source(source: Source, scales: Mapping[str, Floats]) -> Source:
    """The same function with the columns of some matrices multiplied by factors, and what is before them divided.

    Args:
        source: The checkpoint; tensors of the new one are read through it.
        scales: float32 [columns] by role, as of `find_scales`.
    """
    rows: dict[str, Floats] = {}
    for role, factors in scales.items():
        layer, _, kind = role.rpartition(".")
        if kind in _NORMS:
            rows[f"{layer}.{_NORMS[kind]}"] = np.float32(1) / factors
            continue
        producer = f"{layer}.{_PRODUCERS[kind]}"
        channels = shared_channels(source.config, role, len(factors))
        produced = np.ones(channels.max() + 1, np.float32)
        produced[channels] /= factors
        before = np.ones(source_rows(source, producer) - len(produced), np.float32)
        rows[producer] = np.concatenate([before, produced])
        if f"{producer}_bias" in source.parts:
            rows[f"{producer}_bias"] = rows[producer]
    parts = {
        role: _scaled_parts(tensors, rows.get(role), scales.get(role), _offset(source.config, role))
        if role in rows or role in scales
        else tensors
        for role, tensors in source.parts.items()
    }
    return replace(source, parts=parts)


def source_rows(source: Source, role: str) -> int:
    """Rows of a role's weight."""
    return sum(tensor.shape[0] for tensor in source.parts[role])


def _offset(config: ModelConfig, role: str) -> float:
    return config.norm_offset if role.endswith("_norm") else 0.0


def _scaled_parts(
    tensors: tuple[Tensor, ...], rows: Floats | None, columns: Floats | None, offset: float
) -> tuple[Tensor, ...]:
    scaled, first = [], 0
    for tensor in tensors:
        mine = None if rows is None else rows[first : first + tensor.shape[0]]
        scaled.append(ScaledTensor(tensor, mine, columns, offset))
        first += tensor.shape[0]
    return tuple(scaled)
