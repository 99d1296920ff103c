"""The PyTorch decoder's weights: modules that a format makes out of stored numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekit.config import Activation, ModelConfig
from edgekit.graph import TensorReport
from edgekit.source import part_shapes

from .stored_weights import StoredMatrix, StoredWeight

__all__ = ["DecoderParts", "DecoderWeights", "RmsNorm", "load_weights"]

Floats = NDArray[np.float32]


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv:1910.07467)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, value: Tensor) -> Tensor:
        """Norm the last axis."""
        return value * torch.rsqrt((value * value).mean(-1, keepdim=True) + self.eps) * self.weight


class DecoderParts:
    """How a format computes products, lookups and norms. This one takes the stored weights as floats; others override it.

    Attributes:
        dtype: Of the floats.
        packed: Query, key and value are one product, and so are gate and up; else each is one of its own.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, *, packed: bool = True) -> None:
        self.dtype = dtype
        self.packed = packed

    def linear(self, matrix: StoredMatrix, bias: Floats | None) -> nn.Module:
        """value [1, new, columns] times the matrix transposed, plus the bias [rows]."""
        rows, columns = matrix.plan.shape
        product = nn.Linear(columns, rows, bias=bias is not None, device="meta")
        product.weight = self._parameter(matrix.floats())
        if bias is not None:
            product.bias = self._parameter(bias)
        return product

    def embedding(self, matrix: StoredMatrix) -> nn.Module:
        """Rows of the matrix by number: int64 [1, new] -> [1, new, columns]."""
        rows, columns = matrix.plan.shape
        table = nn.Embedding(rows, columns, device="meta")
        table.weight = self._parameter(matrix.floats())
        return table

    def tied(self, matrix: StoredMatrix) -> tuple[nn.Module, nn.Module]:
        """The embedding, and the head that is the same matrix; here both hold one tensor."""
        table = self.embedding(matrix)
        head = nn.Linear(matrix.plan.shape[1], matrix.plan.shape[0], bias=False, device="meta")
        head.weight = table.get_parameter("weight")
        return table, head

    def norm(self, role: str, weight: Floats, eps: float) -> nn.Module:
        """An RMS norm over the last axis: of `query_norm` and `key_norm` a head, of all others the hidden size."""
        return RmsNorm(torch.from_numpy(weight).to(self.dtype), eps)

    def activation(self, name: Activation) -> nn.Module:
        """The feed-forward's activation."""
        return nn.SiLU() if name == "silu" else nn.GELU(approximate="tanh")

    def _parameter(self, floats: Floats) -> nn.Parameter:
        return nn.Parameter(torch.from_numpy(floats).to(self.dtype), requires_grad=False)


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A decoder's modules by role: of `qkv` and `gate_up` one that returns its parts in a sequence."""

    embedding: nn.Module
    head: nn.Module
    linears: Mapping[str, nn.Module]
    norms: Mapping[str, nn.Module]
    activation: nn.Module
    reports: tuple[TensorReport, ...]


class PackedProduct(nn.Module):
    """One product whose columns are several values side by side."""

    def __init__(self, product: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.product, self.sizes = product, list(sizes)

    def forward(self, value: Tensor) -> tuple[Tensor, ...]:
        """The values."""
        return tuple(self.product(value).split(self.sizes, -1))


class ProductPerPart(nn.Module):
    """Several values, each a product of its own with what comes in."""

    def __init__(self, products: Iterable[nn.Module]) -> None:
        super().__init__()
        self.products = nn.ModuleList(products)

    def forward(self, value: Tensor) -> tuple[Tensor, ...]:
        """The values."""
        return tuple(product(value) for product in self.products)


class JoinedProduct(nn.Module):
    """A product whose rows are stored in several matrices."""

    def __init__(self, products: Iterable[nn.Module]) -> None:
        super().__init__()
        self.products = nn.ModuleList(products)

    def forward(self, value: Tensor) -> Tensor:
        """[1, new, rows of all]."""
        return torch.cat([product(value) for product in self.products], -1)


def load_weights(stored: Iterable[StoredWeight], config: ModelConfig, parts: DecoderParts) -> DecoderWeights:
    """Make the modules, one weight at a time.

    Args:
        stored: As `stored_weights` gives them: biases before their matrices.
        config: Of the decoder.
        parts: What makes modules.
    """
    attention = config.attention
    key = attention.kv_heads * attention.head_dim
    sizes = {
        "qkv": (attention.heads * attention.head_dim, key, key),
        "gate_up": (config.intermediate_size, config.intermediate_size),
    }
    ends: dict[str, StoredWeight] = {}
    linears, norms = dict[str, nn.Module](), dict[str, nn.Module]()
    biases, reports = dict[str, Floats](), dict[str, tuple[TensorReport, ...]]()
    for weight in stored:
        role, kind = weight.role, weight.role.rpartition(".")[2]
        reports[role] = tuple(matrix.report for matrix in weight.matrices)
        if kind.endswith("_norm"):
            norms[role] = parts.norm(role, weight.floats(), config.norm_eps)
        elif kind.endswith("_bias"):
            biases[role.removesuffix("_bias")] = weight.floats()
        elif role in {"embedding", "head"}:
            ends[role] = weight
        elif kind in sizes:
            linears[role] = _several(weight, sizes[kind], biases.get(role), parts)
        else:
            linears[role] = _product(weight, biases.get(role), parts)
    embedding, head = _ends(ends, parts)
    ordered = tuple(report for role in (*part_shapes(config), "head") for report in reports.pop(role, ()))
    return DecoderWeights(embedding, head, linears, norms, parts.activation(config.activation), ordered)


def _ends(ends: Mapping[str, StoredWeight], parts: DecoderParts) -> tuple[nn.Module, nn.Module]:
    """Embedding and head, which may be the same matrix."""
    if "head" not in ends:
        return parts.tied(*ends["embedding"].matrices)
    return parts.embedding(*ends["embedding"].matrices), _product(ends["head"], None, parts)


def _several(weight: StoredWeight, sizes: Sequence[int], bias: Floats | None, parts: DecoderParts) -> nn.Module:
    if parts.packed:
        return PackedProduct(_product(weight, bias, parts), sizes)
    products, first = [], 0
    for size in sizes:
        mine = None if bias is None else bias[first : first + size]
        products.append(_product(weight.part(first, first + size), mine, parts))
        first += size
    return ProductPerPart(products)


def _product(weight: StoredWeight, bias: Floats | None, parts: DecoderParts) -> nn.Module:
    products, first = [], 0
    for matrix in weight.matrices:
        last = first + matrix.plan.shape[0]
        products.append(parts.linear(matrix, None if bias is None else bias[first:last]))
        first = last
    return products[0] if len(products) == 1 else JoinedProduct(products)
