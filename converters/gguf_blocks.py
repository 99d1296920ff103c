"""GGUF's quantized blocks taken apart into the integers, scales and offsets that a program can compute with.

Layouts: ggml's `ggml-common.h` and `ggml-quants.c`. Every type here stands for weights scale * integer + minimum with one scale
for each 16 or 32 weights, and its integers fit 2, 4 or 8 bits, so that nothing is rounded again. K-quants store scales and
minima in two steps (half-precision ones of 256 weights, times integers of 6 bits or 8 for each block): the product fits a
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgekit.quant import WeightFormat
from edgekit.source import StoredBlocks

__all__ = ["BLOCK_TYPES", "BlockType"]

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]

# What the codes of IQ4_NL and IQ4_XS stand for, as 8-bit integers around 128.
_IQ4_VALUES = np.array([1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241], np.uint8)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Blocks taken apart: weight = scale * (value - centre) + minimum.

    `values` are uint8 [blocks, weights of a block], `scales` and `minima` float32 [blocks, scales of a block].
    """

    values: Bytes
    scales: Floats
    minima: Floats | None = None


@dataclass(frozen=True, slots=True)
class BlockType:
    """One of GGUF's types.

    Attributes:
        format: What carries it exactly.
        take_apart: From its stored blocks, uint8 [blocks, bytes].
        shift: What its value 0 becomes in the program's integers, whose middle is 2^(bits-1).
    """

    format: WeightFormat
    take_apart: Callable[[Bytes], _Parts]
    shift: int = 0

    def read(self, stored: Bytes) -> StoredBlocks:
        """Take blocks apart.

        Args:
            stored: uint8 [rows, blocks, bytes of a block].
        """
        rows, form = len(stored), self.format
        with np.errstate(all="ignore"):  # scales that are not finite are refused by the writer
            parts = self.take_apart(np.ascontiguousarray(stored).reshape(-1, stored.shape[-1]))
            offsets = None
            if parts.minima is not None:
                middle = np.float32((1 << (form.bits - 1)) - self.shift)
                offsets = (middle * parts.scales + parts.minima).reshape(rows, -1)
        values = parts.values + np.uint8(self.shift)
        return StoredBlocks(form, values.reshape(rows, -1), parts.scales.reshape(rows, -1), offsets)


def _halves(stored: Bytes) -> Floats:
    """Pairs of bytes as half-precision numbers."""
    return np.ascontiguousarray(stored).view("<f2").astype(np.float32)


def _planes(data: Bytes, bits: int, run: int) -> Bytes:
    """Fields of some bits: those in the low-order bits of `run` bytes, then the next higher ones of the same bytes."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = (data.reshape(len(data), -1, 1, run) >> shifts) & np.uint8((1 << bits) - 1)
    return fields.reshape(len(data), -1)


def _q4_0(stored: Bytes) -> _Parts:
    return _Parts(_planes(stored[:, 2:], 4, 16), _halves(stored[:, :2]))


def _q4_1(stored: Bytes) -> _Parts:
    return _Parts(_planes(stored[:, 4:], 4, 16), _halves(stored[:, :2]), _halves(stored[:, 2:4]))


def _fifth_bit(data: Bytes) -> Bytes:
    return np.unpackbits(data, axis=-1, bitorder="little") << np.uint8(4)


def _q5_0(stored: Bytes) -> _Parts:
    values = _planes(stored[:, 6:], 4, 16) | _fifth_bit(stored[:, 2:6])
    return _Parts(values, _halves(stored[:, :2]))


def _q5_1(stored: Bytes) -> _Parts:
    values = _planes(stored[:, 8:], 4, 16) | _fifth_bit(stored[:, 4:8])
    return _Parts(values, _halves(stored[:, :2]), _halves(stored[:, 2:4]))


def _q8_0(stored: Bytes) -> _Parts:
    return _Parts(stored[:, 2:], _halves(stored[:, :2]))


def _scales_and_minima(stored: Bytes) -> tuple[Floats, Floats]:
    """Of Q4_K and Q5_K: twelve bytes hold eight scales and eight minima of six bits (`get_scale_min_k4`)."""
    low_scales, low_minima, high = (stored[:, start : start + 4] for start in (4, 8, 12))
    top = np.uint8(0x30)
    scales = np.concatenate([low_scales & np.uint8(63), (high & np.uint8(15)) | ((low_scales >> 2) & top)], axis=-1)
    minima = np.concatenate([low_minima & np.uint8(63), (high >> 4) | ((low_minima >> 2) & top)], axis=-1)
    return _halves(stored[:, :2]) * scales.astype(np.float32), -_halves(stored[:, 2:4]) * minima.astype(np.float32)


def _q4_k(stored: Bytes) -> _Parts:
    return _Parts(_planes(stored[:, 16:], 4, 32), *_scales_and_minima(stored))


def _q5_k(stored: Bytes) -> _Parts:
    values = _planes(stored[:, 48:], 4, 32) | (_planes(stored[:, 16:48], 1, 32) << np.uint8(4))
    return _Parts(values, *_scales_and_minima(stored))


def _q6_k(stored: Bytes) -> _Parts:
    values = _planes(stored[:, :128], 4, 64) | (_planes(stored[:, 128:192], 2, 32) << np.uint8(4))
    return _Parts(values, _halves(stored[:, 208:]) * stored[:, 192:208].view(np.int8).astype(np.float32))


def _q3_k(stored: Bytes) -> _Parts:
    values = _planes(stored[:, 32:96], 2, 32) | (_planes(stored[:, :32], 1, 32) << np.uint8(2))
    scales = _planes(stored[:, 96:104], 4, 8) | (_planes(stored[:, 104:108], 2, 4) << np.uint8(4))
    return _Parts(values, _halves(stored[:, 108:]) * (scales.astype(np.float32) - 32))


def _iq4_nl(stored: Bytes) -> _Parts:
    return _Parts(_IQ4_VALUES[_planes(stored[:, 2:], 4, 16)], _halves(stored[:, :2]))


def _iq4_xs(stored: Bytes) -> _Parts:
    low, high = _planes(stored[:, 4:8], 4, 1), _planes(stored[:, 2:4], 2, 1)
    scales = (low | (high << np.uint8(4))).astype(np.float32) - 32
    return _Parts(_IQ4_VALUES[_planes(stored[:, 8:], 4, 16)], _halves(stored[:, :2]) * scales)


def _q2_k(stored: Bytes) -> _Parts:
    of_both = stored[:, :16]
    scale, minimum = _halves(stored[:, 80:82]), _halves(stored[:, 82:])
    scales = scale * (of_both & np.uint8(15)).astype(np.float32)
    return _Parts(_planes(stored[:, 16:80], 2, 32), scales, -minimum * (of_both >> 4).astype(np.float32))


_FOUR, _EIGHT = WeightFormat(4, 32), WeightFormat(8, 32)
_FOUR_OFFSET, _EIGHT_OFFSET = WeightFormat(4, 32, offset=True), WeightFormat(8, 32, offset=True)
BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType(_FOUR, _q4_0),
    "Q4_1": BlockType(_FOUR_OFFSET, _q4_1),
    "Q5_0": BlockType(_EIGHT, _q5_0, shift=112),
    "Q5_1": BlockType(_EIGHT_OFFSET, _q5_1, shift=112),
    "Q8_0": BlockType(_EIGHT, _q8_0, shift=128),
    "Q2_K": BlockType(WeightFormat(2, 16, offset=True), _q2_k),
    "Q3_K": BlockType(WeightFormat(4, 16), _q3_k, shift=4),
    "Q4_K": BlockType(_FOUR_OFFSET, _q4_k),
    "Q5_K": BlockType(_EIGHT_OFFSET, _q5_k, shift=112),
    "Q6_K": BlockType(WeightFormat(8, 16), _q6_k, shift=96),
    "IQ4_NL": BlockType(_EIGHT, _iq4_nl),
    "IQ4_XS": BlockType(_EIGHT, _iq4_xs),
}
