"""What the PyTorch decoder is made of for Core AI: compressed weights, and attention over caches that are inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edgekit.config import ModelConfig

from .coreai_ops import append_to_cache, attend, rms_norm, rotate
from .quantize import QuantizedRows
from .stored_weights import StoredMatrix, StoredWeight
from .torch_attention import CachedAttention, Rotation
from .torch_weights import DecoderParts

__all__ = ["CoreAIAttention", "CoreAIParts", "with_own_sizes"]

# By bits and whether they are signed. PyTorch's stubs do not have them all.
_INTEGERS = {
    (bits, signed): getattr(torch, f"{'' if signed else 'u'}int{bits}")
    for bits in (2, 4, 8)
    for signed in (True, False)
}


class CoreAIParts(DecoderParts):
    """Weights stay in their blocks: what coreai-opt emits for weights that it quantizes, with our numbers.

    With `wide_residual` the residual stream is in float32, whatever the products are in: that of Gemma outgrows half precision.
    """

    def __init__(self, dtype: torch.dtype, *, wide_residual: bool) -> None:
        super().__init__(dtype)
        self.residual = torch.float32 if wide_residual else dtype

    def linear(self, matrix: StoredMatrix, bias: NDArray[np.float32] | None) -> nn.Module:
        """See the base."""
        return Product(self._weight(matrix), matrix.plan.shape[1], None if bias is None else self._parameter(bias))

    def embedding(self, matrix: StoredMatrix) -> nn.Module:
        """See the base."""
        return Lookup(self._weight(matrix), matrix.plan.shape[1], self.residual)

    def tied(self, matrix: StoredMatrix) -> tuple[nn.Module, nn.Module]:
        """See the base: one weight, used twice."""
        weight, columns = self._weight(matrix), matrix.plan.shape[1]
        return Lookup(weight, columns, self.residual), Product(weight, columns, None)

    def norm(self, role: str, weight: NDArray[np.float32], eps: float) -> nn.Module:
        """See the base."""
        wide = role.endswith(("post_attention_norm", "post_mlp_norm"))
        return Norm(self._parameter(weight), eps, self.residual if wide else self.dtype)

    def _weight(self, matrix: StoredMatrix) -> nn.Module:
        if isinstance(matrix.rows, QuantizedRows):
            return Blocks(matrix.rows, matrix.plan.format.bits, self.dtype)
        return Floats(self._parameter(matrix.floats()))


def with_own_sizes(weight: StoredWeight, dtype: torch.dtype) -> StoredWeight:
    """The weight, its report with the bytes that it takes here: scales and floats are of the given type."""
    sized = (replace(one, report=replace(one.report, size_bytes=_size_bytes(one, dtype))) for one in weight.matrices)
    return replace(weight, matrices=tuple(sized))


def _size_bytes(matrix: StoredMatrix, dtype: torch.dtype) -> int:
    rows, bits = matrix.rows, matrix.plan.format.bits
    if not isinstance(rows, QuantizedRows):
        return rows.size * dtype.itemsize
    numbers = rows.values.size + (rows.zero_points.size if rows.zero_points is not None and rows.offsets is None else 0)
    floats = rows.scales.size * (1 if rows.offsets is None else 2)
    return -(-numbers * bits // 8) + floats * dtype.itemsize


class Floats(nn.Module):
    """A weight in floats."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> Tensor:
        """[rows, columns]."""
        return self.weight


class Blocks(nn.Module):
    """A weight in whole numbers, each block with its scale.

    Symmetric blocks are signed and have no zero points. Where blocks have an offset (see `WeightFormat`), the operator's
    `minval` is the weight that the lowest number stands for: scale * (lowest - zero point) + offset.
    """

    def __init__(self, rows: QuantizedRows, bits: int, dtype: torch.dtype) -> None:
        super().__init__()
        count, blocks, size = rows.values.shape
        middle, signed = 1 << (bits - 1), rows.zero_points is None
        values = (
            rows.values.view(np.int8) - np.int8(middle - 256 if middle == 128 else middle) if signed else rows.values
        )
        self.bits_type = _INTEGERS[bits, signed]
        self.register_buffer("values", torch.from_numpy(values.reshape(count, blocks * size)))
        self.register_buffer("scales", torch.from_numpy(rows.scales).to(dtype))
        self.register_buffer("zero_points", None)
        self.register_buffer("lowest", None)
        if rows.offsets is not None:
            zero_points = np.float32(middle) if rows.zero_points is None else rows.zero_points.astype(np.float32)
            self.lowest = torch.from_numpy(rows.offsets - rows.scales * zero_points).to(dtype)
        elif rows.zero_points is not None:
            self.zero_points = torch.from_numpy(np.ascontiguousarray(rows.zero_points))

    def forward(self) -> Tensor:
        """[rows, whole blocks]."""
        weight: Tensor = torch.ops.coreai.constexpr_blockwise_shift_scale(
            self.values, self.scales, self.zero_points, self.lowest, self.bits_type, None
        )
        return weight


class Product(nn.Module):
    """What comes in times a weight transposed, plus a bias."""

    def __init__(self, weight: nn.Module, columns: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.columns, self.bias = weight, columns, bias

    def forward(self, value: Tensor) -> Tensor:
        """[1, new, columns] -> [1, new, rows]."""
        weight = self.weight()
        if weight.shape[1] > self.columns:
            value = functional.pad(value, (0, weight.shape[1] - self.columns))
        return functional.linear(value, weight, self.bias)


class Lookup(nn.Module):
    """Rows of a weight."""

    def __init__(self, weight: nn.Module, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.columns, self.dtype = weight, columns, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """[1, new] -> [1, new, columns]."""
        rows: Tensor = functional.embedding(tokens, self.weight())
        return rows[..., : self.columns].to(self.dtype)


class Norm(nn.Module):
    """See `rms_norm`; what comes out has the given type."""

    def __init__(self, weight: nn.Parameter, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.eps, self.dtype = weight, eps, dtype

    def forward(self, value: Tensor) -> Tensor:
        """Norm the last axis."""
        normed: Tensor = rms_norm(value, self.weight, self.eps)
        return normed.to(self.dtype)


class CoreAIAttention(CachedAttention):
    """Attention over two caches, of all layers, that the program is given: `bind` them before each forward.

    How many tokens a cache has is in the shapes, since Core AI knows no other sizes at run time.
    """

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__(config, context)
        self._given: _Given | None = None

    def bind(self, key_cache: Tensor, value_cache: Tensor, position_ids: Tensor, new: int) -> Tensor:
        """Take the caches [layers, 1, kv_heads, capacity, head_dim] and all tokens' positions [1, tokens], the last `new` ones'
        too, whose positions are returned: [new]."""
        tokens = position_ids.shape[1]
        torch._check(tokens >= new)  # type: ignore[no-untyped-call]  # PyTorch has no types for it
        self._given = _Given(key_cache, value_cache, tokens - new, tokens, {})
        return position_ids[0, tokens - new :]

    def take(self) -> tuple[Tensor, Tensor]:
        """The caches after the forward."""
        given, self._given = self._bound, None
        return given.keys, given.values

    def positions(self, tokens: Tensor, start: Tensor) -> Tensor:
        """See the base; here `start` has them all."""
        return start

    def begin(self, start: Tensor, positions: Tensor) -> None:
        """See the base."""

    def rotate(self, heads: Tensor, rotation: Rotation) -> Tensor:
        """See the base."""
        half, halves = rotation.dim // 2, self._bound.halves
        if id(rotation) not in halves:
            halves[id(rotation)] = rotation.cosine[..., :half], rotation.sine[..., :half]
        rotated: Tensor = rotate(heads, *halves[id(rotation)])
        return rotated

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, place: None) -> Tensor:
        """See the base."""
        given, cache_type = self._bound, self._bound.keys.dtype
        given.keys, keys = append_to_cache(given.keys, key.to(cache_type), layer, given.start, given.stop)
        given.values, values = append_to_cache(given.values, value.to(cache_type), layer, given.start, given.stop)
        scale, softcap = self.config.scale, self.config.softcap
        attended: Tensor = attend(query, keys, values, scale, self.windows[layer], softcap)
        return attended

    @property
    def _bound(self) -> _Given:
        if self._given is None:
            raise RuntimeError("no caches are bound")
        return self._given


@dataclass(slots=True)
class _Given:
    """What one forward was given: caches, which it replaces, and the positions [start, stop) of the new tokens."""

    keys: Tensor
    values: Tensor
    start: int
    stop: int
    halves: dict[int, tuple[Tensor, Tensor]]  # of each kind of rotation, cosine and sine of a half
