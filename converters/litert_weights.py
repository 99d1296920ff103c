"""Weights of a LiteRT program: floats for its converter, and the whole numbers that then take their place in the file."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekit.errors import ConversionError

from .quantize import QuantizedRows
from .stored_weights import StoredMatrix
from .torch_weights import DecoderParts, RmsNorm

__all__ = ["Integers", "LitertParts", "digest"]

Integers = tuple[NDArray[np.int8], NDArray[np.float32]]  # values [rows, columns] and a scale for each row
_MIDDLE = 128  # what the quantizer's bytes have for zero


class LitertParts(DecoderParts):
    """Products and lookups in floats, of which `integers` says what whole numbers they are.

    Attributes:
        integers: Values and scales by the digest of the floats that they stand for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.integers: dict[str, Integers] = {}

    def linear(self, matrix: StoredMatrix, bias: NDArray[np.float32] | None) -> nn.Module:
        """See the base.

        Raises:
            ConversionError: The weight is not stored as 8 bits with a scale for each row.
        """
        self._remember(matrix)
        return super().linear(matrix, bias)

    def embedding(self, matrix: StoredMatrix) -> nn.Module:
        """See the base; raises as `linear`."""
        self._remember(matrix)
        return super().embedding(matrix)

    def norm(self, role: str, weight: NDArray[np.float32], eps: float) -> nn.Module:
        """See the base."""
        return (HeadNorm if role.endswith((".query_norm", ".key_norm")) else RmsNorm)(torch.from_numpy(weight), eps)

    def _remember(self, matrix: StoredMatrix) -> None:
        rows, form = matrix.rows, matrix.plan.format
        if not isinstance(rows, QuantizedRows):
            return
        if form.bits != 8 or rows.scales.shape[1] != 1 or rows.zero_points is not None or rows.offsets is not None:
            raise ConversionError(f"{matrix.role}: LiteRT programs store 8 bits with one scale a row, not {form}")
        columns = matrix.plan.shape[1]
        values = (rows.values.reshape(len(rows.values), -1)[:, :columns].astype(np.int16) - _MIDDLE).astype(np.int8)
        self.integers[digest(matrix.floats())] = values, rows.scales[:, 0].astype(np.float32)


class HeadNorm(RmsNorm):
    """A norm of heads in two axes: of four, the converter makes a product for one token that it then refuses."""

    def forward(self, value: Tensor) -> Tensor:
        """Norm the last axis."""
        return super().forward(value.reshape(-1, value.shape[-1])).reshape(value.shape)


def digest(floats: NDArray[np.generic]) -> str:
    """Names a matrix by its numbers."""
    return hashlib.sha256(np.ascontiguousarray(floats).reshape(-1).view(np.uint8).data).hexdigest()
