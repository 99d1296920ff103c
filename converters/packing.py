"""Integers of 2, 4 or 8 bits in bytes, the first of each byte in its low-order bits, as ONNX Runtime's block operators read
them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["pack", "unpack"]

Bytes = NDArray[np.uint8]


def pack(values: Bytes, bits: int) -> Bytes:
    """Put 8 / bits values into each byte along the last axis; what is missing from the last byte is zero."""
    count = 8 // bits
    if count == 1:
        return values
    lacking = -values.shape[-1] % count
    if lacking:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], lacking), np.uint8)], axis=-1)
    packed = values[..., 0::count].copy()
    for place in range(1, count):
        packed |= values[..., place::count] << np.uint8(place * bits)
    return packed


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """The first `count` values along the last axis."""
    places = np.arange(0, 8, bits, dtype=np.uint8)
    values = (packed[..., None] >> places) & np.uint8((1 << bits) - 1)
    return values.reshape(*packed.shape[:-1], -1)[..., :count]
