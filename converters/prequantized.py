"""Checkpoints that others have quantized: GPTQ and AWQ are read as they are, all else is refused by name.

Both store weight = scale * (value - zero point), one scale and one integer zero point for each group of inputs, in integers of
2, 4 or 8 bits, several to an int32:
- GPTQ (AutoGPTQ's `qlinear_cuda_old.py`): values packed along the inputs, zero points along the outputs and stored one lower
  (as they are where `checkpoint_format` is `gptq_v2`); `g_idx` names each input's group.
- AWQ (AutoAWQ's `gemm`): both packed along the outputs, eight of 4 bits to an int32 in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import SourceError, UnsupportedError
from edgekit.quant import BLOCK_SIZES, WeightFormat
from edgekit.source import StoredBlocks, Tensor

if TYPE_CHECKING:
    from .from_safetensors import SafetensorsTensor

__all__ = ["PACKED_TYPES", "PackedTensor", "combine_packed", "packing_of", "unread_method"]

PACKED_TYPES = frozenset({"GPTQ-2", "GPTQ-4", "GPTQ-8", "AWQ-4"})
_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_HINT = "use the full-precision checkpoint it was made from, or a GGUF"
_DAMAGED = "the checkpoint is damaged or its config belongs to another one; download both again"
# What is stored beside, or instead of, a linear layer's `weight` by methods whose config was lost or never says so.
_MARKS = (
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.weight\.(absmax|quant_map|quant_state\.\w+)$|\.SCB$"), "bitsandbytes"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors"),
    (re.compile(r"_blocks$"), "MXFP4"),
    (re.compile(r"\.weight_scale(_inv|_2)?$"), "FP8"),
)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_NAMES = {
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (fbgemm)",
    "mxfp4": "MXFP4",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "gptq": "GPTQ",
    "awq": "AWQ",
}


@dataclass(frozen=True, slots=True)
class _Packing:
    """How a checkpoint's integers are stored; `group_size` 0 is one group for all inputs."""

    method: str
    bits: int
    group_size: int
    zero_shift: int

    @property
    def to_word(self) -> int:
        """Integers in an int32."""
        return 32 // self.bits


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One linear layer's weight in groups, [outputs, inputs]; `groups` has each input's group where they are out of order."""

    name: str
    packing: _Packing
    values: SafetensorsTensor
    zero_points: SafetensorsTensor
    scales: SafetensorsTensor
    groups: NDArray[np.int64] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        rows, columns = self.values.shape
        if self.packing.method == "awq":
            return columns * self.packing.to_word, rows
        return columns, rows * self.packing.to_word

    @property
    def dtype(self) -> str:
        """The method and its bits."""
        return f"{self.packing.method.upper()}-{self.packing.bits}"

    @property
    def size_bytes(self) -> int:
        """Stored size with scales and zero points."""
        return self.values.size_bytes + self.zero_points.size_bytes + self.scales.size_bytes

    @property
    def exact_format(self) -> WeightFormat | None:
        """Its own groups, where they are whole blocks of inputs that lie side by side."""
        size = self.packing.group_size
        if self.groups is not None or size not in BLOCK_SIZES or self.shape[1] % size:
            return None
        return WeightFormat(self.packing.bits, size, symmetric=False)

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) as float32."""
        stop = self.shape[0] if stop is None else stop
        columns = self.shape[1]
        groups = np.arange(columns) // (self.packing.group_size or columns) if self.groups is None else self.groups
        zero_points, scales = self._zero_points(start, stop), self.scales.read()[:, start:stop].T
        centred = self._values(start, stop).astype(np.float32) - zero_points.astype(np.float32)[:, groups]
        with np.errstate(all="ignore"):  # values that are not finite are refused by the writer
            weights: NDArray[np.float32] = centred * scales[:, groups]
        return weights

    def read_blocks(self, start: int, stop: int) -> StoredBlocks:
        """Rows [start, stop) in their own groups."""
        assert self.exact_format is not None
        scales = np.ascontiguousarray(self.scales.read()[:, start:stop].T)
        return StoredBlocks(
            self.exact_format, self._values(start, stop), scales, zero_points=self._zero_points(start, stop)
        )

    def _values(self, start: int, stop: int) -> NDArray[np.uint8]:
        """uint8 [rows, inputs]."""
        words = _words(self.values)
        if self.packing.method == "awq":
            return np.ascontiguousarray(self._outputs(words, start, stop).T)
        fields = _fields(words[:, start:stop], self.packing.bits)  # [words, rows, fields]
        return np.ascontiguousarray(fields.transpose(1, 0, 2)).reshape(stop - start, -1)

    def _zero_points(self, start: int, stop: int) -> NDArray[np.uint8]:
        """uint8 [rows, groups]."""
        stored = self._outputs(_words(self.zero_points), start, stop)
        return np.ascontiguousarray((stored + np.uint8(self.packing.zero_shift)).T) & np.uint8(
            (1 << self.packing.bits) - 1
        )

    def _outputs(self, words: NDArray[np.uint32], start: int, stop: int) -> NDArray[np.uint8]:
        """Outputs [start, stop) of words that are packed along them, uint8 [rows of words, outputs]."""
        count = self.packing.to_word
        first, last = start // count, -(-stop // count)
        fields = _fields(words[:, first:last], self.packing.bits)
        if self.packing.method == "awq":
            fields = fields[..., np.argsort(_AWQ_ORDER)]
        return fields.reshape(len(words), -1)[:, start - first * count : stop - first * count]


def _words(tensor: SafetensorsTensor) -> NDArray[np.uint32]:
    return tensor.file.read(tensor.offset, tensor.size_bytes).view("<u4").reshape(tensor.shape)


def _fields(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """The integers of each word, low-order bits first, on a new last axis."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((words[..., None] >> shifts) & np.uint32((1 << bits) - 1)).astype(np.uint8)


def unread_method(config: Mapping[str, object]) -> str | None:
    """Why a checkpoint that its config calls quantized is not read; None where it is read, or is not quantized."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        return None
    named = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if not isinstance(settings, Mapping) or not isinstance(named, str) or not named.isprintable():
        return "this checkpoint is already quantized with an unnamed method, which is not read"
    method = _NAMES.get(named.lower(), named[:60])
    reason = _unread_variant(named.lower(), settings)
    return (
        f"this checkpoint is already quantized with {method}{reason}, which is not read" if reason is not None else None
    )


def _unread_variant(method: str, settings: Mapping[str, object]) -> str | None:
    """What of a method's settings is not read; None where all is."""
    bits = settings.get("bits")
    if method == "gptq":
        if settings.get("dynamic"):
            return " of several kinds"
        return None if bits in {2, 4, 8} and type(bits) is int else f" of {bits} bits"
    if method == "awq":
        version = settings.get("version", "gemm")
        if str(version).lower() != "gemm":
            return f" (version {str(version)[:20]})"
        return None if bits == 4 and type(bits) is int else f" of {bits} bits"
    return ""


def combine_packed(
    config: Mapping[str, object], directory: Path, tensors: Mapping[str, SafetensorsTensor]
) -> dict[str, Tensor]:
    """Put the parts of each packed weight together under the weight's name; all else stays as it is.

    Raises:
        UnsupportedError: The checkpoint is quantized in a way that is not read.
        SourceError: A part is missing, or the parts do not fit each other.
    """
    reason = unread_method(config)
    if reason:
        raise UnsupportedError(reason, hint=_HINT)
    settings = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(settings, Mapping):
        _refuse_marks(directory, tensors)
        return dict(tensors)
    packing = packing_of(settings)
    packed = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    parts = {f"{module}.{part}" for module in packed for part in _PARTS}
    found: dict[str, Tensor] = {name: tensor for name, tensor in tensors.items() if name not in parts}
    return found | {f"{module}.weight": _combined(module, packing, tensors) for module in packed}


def _refuse_marks(directory: Path, tensors: Mapping[str, SafetensorsTensor]) -> None:
    for name in tensors:
        method = next((method for mark, method in _MARKS if mark.search(name)), None)
        if method:
            raise UnsupportedError(
                f"{directory}: tensor {name} belongs to a checkpoint quantized with {method}, which config.json does not say",
                hint="fetch the config.json of the same download; GPTQ and AWQ are read where it describes them",
            )


def packing_of(settings: Mapping[str, object]) -> _Packing:
    """How `quantization_config` says that integers are packed.

    Raises:
        SourceError: Its group size is no number.
    """
    method, bits, size = str(settings["quant_method"]).lower(), settings.get("bits"), settings.get("group_size")
    if not isinstance(bits, int) or type(size) is not int or not (size == -1 or size > 0):
        raise SourceError(f"quantization_config: group_size is {str(size)[:40]}, expected a number", hint=_DAMAGED)
    old = method == "gptq" and settings.get("checkpoint_format", "gptq") != "gptq_v2"
    return _Packing(method, bits, max(size, 0), int(old))


def _combined(module: str, packing: _Packing, tensors: Mapping[str, SafetensorsTensor]) -> PackedTensor:
    missing = [part for part in _PARTS[:3] if f"{module}.{part}" not in tensors]
    if missing:
        raise SourceError(f"tensor {module}.{missing[0]} is missing beside {module}.qweight", hint=_DAMAGED)
    values, zero_points, scales = (tensors[f"{module}.{part}"] for part in _PARTS[:3])
    if any(len(part.shape) != 2 for part in (values, zero_points, scales)):
        raise SourceError(f"tensor {module}.qweight and its scales are not all matrices", hint=_DAMAGED)
    if {values.dtype, zero_points.dtype} != {"I32"} or scales.dtype not in {"F16", "BF16", "F32"}:
        raise SourceError(f"tensor {module}.qweight or its scales are of another type than packed ones", hint=_DAMAGED)
    found = PackedTensor(f"{module}.weight", packing, values, zero_points, scales, None)
    rows, columns = found.shape
    groups = -(-columns // (packing.group_size or max(columns, 1)))
    if scales.shape != (groups, rows) or zero_points.shape != (groups, -(-rows // packing.to_word)):
        raise SourceError(f"tensor {module}.scales is {list(scales.shape)}, expected {[groups, rows]}", hint=_DAMAGED)
    return PackedTensor(found.name, packing, values, zero_points, scales, _groups(module, found, tensors))


def _groups(module: str, tensor: PackedTensor, tensors: Mapping[str, SafetensorsTensor]) -> NDArray[np.int64] | None:
    """Each input's group; None where they are in order."""
    stored = tensors.get(f"{module}.g_idx")
    if stored is None:
        return None
    columns, groups = tensor.shape[1], tensor.scales.shape[0]
    if stored.dtype != "I32" or stored.shape != (columns,):
        raise SourceError(f"tensor {module}.g_idx does not name the group of each of {columns} inputs", hint=_DAMAGED)
    found = _words(stored).astype(np.int64)
    if found.max(initial=0) >= groups:
        raise SourceError(f"tensor {module}.g_idx names a group beyond the {groups} that there are", hint=_DAMAGED)
    in_order = np.array_equal(found, np.arange(columns) // (tensor.packing.group_size or max(columns, 1)))
    return None if in_order else found
