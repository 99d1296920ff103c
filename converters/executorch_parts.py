"""The PyTorch decoder's products, norms and lookups in the operators that XNNPACK takes.

It takes no reductions over the last axis and no slices of a dynamic shape: a mean of squares is a product with a constant row.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edgekit.config import Activation
from edgekit.errors import ConversionError
from edgekit.quiet import quieted

from .quantize import QuantizedRows
from .stored_weights import StoredMatrix
from .torch_weights import DecoderParts

with quieted():  # each registers operators
    for module in (
        "executorch.kernels.quantized",
        "torchao.quantization.quant_primitives",
    ):
        import_module(module)

__all__ = ["ExecutorchParts"]

# x * sigmoid(x * (GELU_LINEAR + GELU_CUBIC x^2)) is GELU's tanh form (arXiv:1606.08415): tanh(y) = 2 sigmoid(2y) - 1.
GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = GELU_LINEAR * 0.044715

Floats = NDArray[np.float32]


class ExecutorchParts(DecoderParts):
    """Products of whole numbers with inputs rounded to 8 bits, where the weight is stored in whole numbers."""

    def __init__(self) -> None:
        super().__init__(packed=False)
        self.inputs = RoundedInputs()

    def linear(self, matrix: StoredMatrix, bias: Floats | None) -> nn.Module:
        """See the base.

        Raises:
            ConversionError: The format is none of XNNPACK's.
        """
        if matrix.plan.format.is_float:
            return super().linear(matrix, bias)
        return IntegerProduct(matrix, None if bias is None else torch.from_numpy(bias), self.inputs)

    def embedding(self, matrix: StoredMatrix) -> nn.Module:
        """See the base."""
        return super().embedding(matrix) if matrix.plan.format.is_float else IntegerTable(matrix)

    def tied(self, matrix: StoredMatrix) -> tuple[nn.Module, nn.Module]:
        """See the base; the delegate has a copy of its own, which nothing can look rows up in."""
        if matrix.plan.format.is_float:
            return super().tied(matrix)
        return self.embedding(matrix), self.linear(matrix, None)

    def norm(self, role: str, weight: Floats, eps: float) -> nn.Module:
        """See the base."""
        return ProductNorm(torch.from_numpy(weight), eps)

    def activation(self, name: Activation) -> nn.Module:
        """See the base."""
        return TanhGelu() if name == "gelu_tanh" else super().activation(name)


class RoundedInputs:
    """Inputs of products in 8 bits, with a scale and a zero point for each token; products of one value share them."""

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._rounded: Tensor | None = None

    def of(self, value: Tensor) -> Tensor:
        """The value rounded, in the operators that XNNPACK's partitioner knows a dynamically quantized input by."""
        if value is not self._value or self._rounded is None:
            operators = torch.ops.quantized_decomposed
            scale, zero_point = operators.choose_qparams_per_token_asymmetric(value, torch.int8)
            stored = operators.quantize_per_token(value, scale, zero_point, -128, 127, torch.int8)
            rounded = operators.dequantize_per_token(stored, scale, zero_point, -128, 127, torch.int8, torch.float32)
            self._value, self._rounded = value, cast("Tensor", rounded)
        return self._rounded


class IntegerProduct(nn.Module):
    """A product with whole numbers of 8 bits with a scale for each row, or of 4 bits with a scale for each block."""

    def __init__(self, matrix: StoredMatrix, bias: Tensor | None, inputs: RoundedInputs) -> None:
        super().__init__()
        values, scales, self.block_size = _integers(matrix)
        self.register_buffer("values", values)
        if self.block_size:
            self.register_buffer("scales", scales)
            self.register_buffer("zero_points", torch.zeros(scales.shape, dtype=torch.int8))
        else:
            self.register_buffer("scales", scales.reshape(-1))
            self.register_buffer("zero_points", torch.zeros(len(scales), dtype=torch.int64))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.inputs = inputs

    def forward(self, value: Tensor) -> Tensor:
        """[1, new, columns] -> [1, new, rows]."""
        stored = self.get_buffer("values"), self.get_buffer("scales"), self.get_buffer("zero_points")
        if self.block_size:
            weight = torch.ops.torchao.dequantize_affine(
                stored[0], [1, self.block_size], *stored[1:], torch.int8, -8, 7, output_dtype=torch.float32
            )
        else:
            weight = torch.ops.quantized_decomposed.dequantize_per_channel(*stored, 0, -127, 127, torch.int8)
        return functional.linear(self.inputs.of(value), weight, self.bias)


class IntegerTable(nn.Module):
    """Rows of a table of 8-bit or 4-bit whole numbers."""

    def __init__(self, matrix: StoredMatrix) -> None:
        super().__init__()
        values, scales, block_size = _integers(matrix)
        self.bits = matrix.plan.format.bits
        if self.bits == 4:  # two in a byte, the first one in the upper half
            halves = (values + 8).view(torch.uint8).reshape(len(values), -1, 2)
            values = halves[:, :, 0] << 4 | halves[:, :, 1]
        self.register_buffer("values", values)
        self.register_buffer("scales", scales if block_size else scales.reshape(-1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [1, new] -> float32 [1, new, columns]."""
        stored = self.get_buffer("values"), self.get_buffer("scales"), None
        if self.bits == 4:
            found = torch.ops.quantized_decomposed.embedding_4bit.dtype(*stored, -8, 7, tokens, dtype=torch.float32)
        else:
            found = torch.ops.quantized_decomposed.embedding_byte.dtype(*stored, -128, 127, tokens, dtype=torch.float32)
        return cast("Tensor", found)


def _integers(matrix: StoredMatrix) -> tuple[Tensor, Tensor, int]:
    """Values int8 [rows, columns] around zero, scales float32 [rows, blocks], and the block size, 0 where a row is one block."""
    form, columns = matrix.plan.format, matrix.plan.shape[1]
    whole_rows = form.row_scaled and form.bits == 8 and not form.block_size
    blocks = form.bfloat16_scales and form.bits == 4 and form.block_size % 32 == 0 and columns % form.block_size == 0
    if not isinstance(matrix.rows, QuantizedRows) or not (whole_rows or blocks):
        raise ConversionError(
            f"{matrix.role} is to be kept in a form that ExecuTorch's kernels do not read: {form}",
            hint="this is EdgeKit's mistake",
        )
    values = matrix.rows.values.reshape(-1, columns) - np.uint8(1 << (form.bits - 1))  # wraps around to int8
    scales = torch.from_numpy(
        matrix.rows.scales.ravel().reshape(len(values), -1)
    )  # an axis of 1 has no stride of 0 then
    return torch.from_numpy(values.view(np.int8)), scales, form.block_size


class ProductNorm(nn.Module):
    """An RMS norm whose mean of squares is a product with a row of 1 / size."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        size = len(weight)
        self.register_buffer("weight", weight)
        self.register_buffer("mean", torch.full((1, size), 1 / size))
        self.register_buffer("eps", torch.full((1,), eps))

    def forward(self, value: Tensor) -> Tensor:
        """Norm the last axis."""
        mean_square = functional.linear(value * value, self.get_buffer("mean"), self.get_buffer("eps"))
        return value * torch.rsqrt(mean_square) * self.get_buffer("weight")


class TanhGelu(nn.Module):
    """GELU by tanh, written out: XNNPACK has the exact one only, and takes it for this one without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("linear", torch.full((1,), GELU_LINEAR))
        self.register_buffer("cubic", torch.full((1,), GELU_CUBIC))

    def forward(self, value: Tensor) -> Tensor:
        """Element by element."""
        slope = value * value * self.get_buffer("cubic") + self.get_buffer("linear")
        return value * torch.sigmoid(value * slope)
