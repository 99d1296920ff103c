"""Types of MIL, Core ML's intermediate language, and how the evaluator holds their numbers.

Tensors of float16 are held as float32 arrays whose every value float16 has too: processors compute those ten times as fast.
An operator computes in float32 and its result is rounded once, which is what an accelerator with float32 accumulators does;
what is too large for float16 becomes infinite, as it does on a device. Integers of fewer than 8 bits are held as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BITS", "HELD", "ArrayLike", "TensorType", "round_to_half"]

ArrayLike = NDArray[Any]

# By MIL's name of a type: the bits that an element takes in a file, and what holds it here.
BITS = {"bool": 8, "float16": 16, "float32": 32, "int32": 32, "uint32": 32, "int16": 16, "uint16": 16} | {
    "int8": 8, "uint8": 8, "int4": 4, "uint6": 6, "uint4": 4, "uint3": 3, "uint2": 2, "uint1": 1
}  # fmt: skip
HELD: dict[str, type[np.generic]] = {
    "bool": np.bool_,
    "float16": np.float32,
    "float32": np.float32,
    "int32": np.int32,
    "uint32": np.uint32,
    "int16": np.int16,
    "uint16": np.uint16,
    "int8": np.int8,
    "int4": np.int8,
} | dict.fromkeys(("uint8", "uint6", "uint4", "uint3", "uint2", "uint1"), np.uint8)

_LEAST_NORMAL = np.float32(2.0**-14)  # of float16
_INFINITE_FROM = 65520.0  # halfway from float16's largest number to the next one there would be
_EXPONENT = np.uint32(0x7F800000)
_BINADES_UP = np.float32(1.5 * 2**13)
_ROUNDED_AT_A_TIME = 1 << 16  # what a processor's cache holds


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor's element type, by MIL's name, and its shape; -1 stands for a length that is not known beforehand."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def is_fixed(self) -> bool:
        """Whether all lengths are known beforehand."""
        return -1 not in self.shape

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape is such a tensor."""
        return shape == self.shape or (
            len(shape) == len(self.shape)
            and all(wanted in {-1, length} for wanted, length in zip(self.shape, shape, strict=True))
        )


def round_to_half(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round to the nearest numbers of float16, ties to even, and leave them in float32; zeros lose their sign.

    Adding and subtracting a number 2^13 times as large as the value's binade leaves the 11 bits of float16: numpy's own
    conversion takes fifteen times as long.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    rounded = np.empty_like(flat)
    for start in range(0, flat.size, _ROUNDED_AT_A_TIME):
        part = slice(start, start + _ROUNDED_AT_A_TIME)
        _round_part(flat[part], rounded[part])
    return rounded.reshape(values.shape)


def _round_part(values: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    size = np.maximum(np.abs(values), _LEAST_NORMAL)
    if not size.max(initial=0) < _INFINITE_FROM:  # NaN too
        with np.errstate(over="ignore"):  # becomes infinite, as on a device
            out[...] = values.astype(np.float16)
        return
    size.view(np.uint32)[...] &= _EXPONENT
    size *= _BINADES_UP
    np.add(values, size, out=out)
    np.subtract(out, size, out=out)
