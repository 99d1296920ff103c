"""Quantization schemes: which weights are kept in how many bits. Pure data and its validation.

A scheme is one of the named recipes, or a TOML file:

    rounding = "gptq"       # "nearest" (default), or by the inputs that each weight sees on text that the model writes
    bits = 4                # 4 or 8 (16 and 32: floats)
    block_size = 64         # weights that share a scale: 16, 32, 64, 128 or 256
    symmetric = false       # true: a fixed zero point in the middle

    [[overrides]]           # later ones win
    roles = ["down", "output"]
    layers = "edges"        # "all" (default), the first and last eighth ("edges"), or the first and the last one ("ends")
    bits = 8
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeAlias

from edgekit.errors import PlanError, UnsupportedError

__all__ = ["RECIPES", "CacheFormat", "LayerSelection", "Override", "QuantScheme", "WeightFormat", "load_scheme"]

LayerSelection: TypeAlias = Literal["all", "edges", "ends"]
Rounding: TypeAlias = Literal["nearest", "gptq"]
ROLES = ("embedding", "head", "qkv", "output", "gate_up", "down")
BLOCK_SIZES = (16, 32, 64, 128, 256)
EDGE_FRACTION = 8  # an edge is this fraction of the layers, at either end


class CacheFormat(StrEnum):
    """How keys and values are kept: floats, or 8-bit integers with one fixed float32 scale for each channel."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"

    @property
    def element_bytes(self) -> int:
        """Size of one key's or value's element."""
        return {"float32": 4, "float16": 2, "int8": 1}[self.value]

    def scale_bytes(self, channels: int) -> int:
        """Size of the scales, once for all tokens; `channels`: 2 * layers * kv_heads * head_dim."""
        return 4 * channels if self is CacheFormat.INT8 else 0


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How one weight is stored: floats of 16 or 32 bits, or blocks of 4 or 8 bits along its columns.

    A block holds `block_size` values with one float32 scale: weight = scale * (value - zero point). Symmetric formats have
    the zero point 2^(bits-1), others an integer one for each block.
    """

    bits: int
    block_size: int = 0
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits in {16, 32}:
            if self.block_size:
                raise PlanError(f"{self.bits} bits are floats and have no block size")
        elif self.bits not in {4, 8}:
            raise PlanError(f"{self.bits} bits are not handled", hint="use 4, 8, 16 or 32")
        elif self.block_size not in BLOCK_SIZES:
            raise PlanError(f"block size {self.block_size} is not handled", hint=f"use one of {BLOCK_SIZES}")

    @property
    def is_float(self) -> bool:
        """True for 16 and 32 bits."""
        return self.bits >= 16

    def size_bytes(self, rows: int, columns: int) -> int:
        """Stored size of a weight with its scales and zero points."""
        if self.is_float:
            return rows * columns * self.bits // 8
        blocks = -(-columns // self.block_size)
        zero_points = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return rows * (blocks * (self.block_size * self.bits // 8 + 4) + zero_points)


@dataclass(frozen=True, slots=True)
class Override:
    """Roles (of some layers) that depart from the scheme's format."""

    roles: tuple[str, ...]
    format: WeightFormat
    layers: LayerSelection = "all"


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """A named choice of formats.

    Attributes:
        keep: Carry a checkpoint's own blocks over where that is exact.
        rounding: How values are chosen: each `nearest` to its weight, or `gptq`: so that what the weight computes on
            calibration text changes least.
    """

    name: str
    format: WeightFormat
    overrides: tuple[Override, ...] = ()
    keep: bool = False
    rounding: Rounding = "nearest"

    def format_of(self, role: str, layer: int | None, layers: int) -> WeightFormat:
        """The format of a role; `layer` is None for embedding and head."""
        chosen = self.format
        widths = {"all": layers, "edges": max(layers // EDGE_FRACTION, 1), "ends": 1}
        for override in self.overrides:
            width = widths[override.layers]
            selected = override.layers == "all" or (layer is not None and min(layer, layers - 1 - layer) < width)
            if role in override.roles and selected:
                chosen = override.format
        return chosen

    @property
    def activation_bits(self) -> int:
        """16 for `fp16`, whose program computes in half precision; 32 for all else."""
        return 16 if self.format.bits == 16 else 32

    @property
    def quantized(self) -> bool:
        """True where any weight is kept in blocks."""
        return not self.format.is_float or any(not override.format.is_float for override in self.overrides)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


_INT8 = WeightFormat(8, 64, symmetric=False)
_INT4 = WeightFormat(4, 32, symmetric=False)
RECIPES: Mapping[str, QuantScheme] = {
    scheme.name: scheme
    for scheme in (
        QuantScheme("fp32", WeightFormat(32)),
        QuantScheme("fp16", WeightFormat(16)),
        QuantScheme("int8", _INT8),
        QuantScheme("keep", _INT8, keep=True),
        QuantScheme("int4", _INT4),
        QuantScheme("int4-block64", replace(_INT4, block_size=64)),
        QuantScheme("int4-block128", replace(_INT4, block_size=128)),
        QuantScheme("int4-symmetric", replace(_INT4, symmetric=True)),
        QuantScheme("int4-symmetric-block64", WeightFormat(4, 64)),
        QuantScheme("int4-symmetric-block128", WeightFormat(4, 128)),
        QuantScheme(
            "int4-mixed",
            WeightFormat(4, 128),  # the fastest blocks: calibration makes up for their length
            overrides=(Override(("down",), _INT8, "ends"),),  # the worst outliers
            rounding="gptq",
        ),
    )
}


def load_scheme(name: str) -> QuantScheme:
    """A named recipe or a recipe file.

    Raises:
        UnsupportedError: No recipe has that name.
        PlanError: The file is missing or malformed.
    """
    if name in RECIPES:
        return RECIPES[name]
    if not name.endswith(".toml"):
        raise UnsupportedError(
            f"quantization {name!r} is not known", hint=f"use auto, {', '.join(RECIPES)}, or a recipe file (.toml)"
        )
    path = Path(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise PlanError(f"{path} is not valid TOML: {error}") from error
    return _scheme_from(values, path)


def _scheme_from(values: dict[str, Any], path: Path) -> QuantScheme:
    rounding = values.pop("rounding", "nearest")
    if rounding not in ("nearest", "gptq"):
        raise PlanError(f"{path}: rounding is {rounding!r}", hint='use "nearest" or "gptq"')
    listed = values.pop("overrides", [])
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise PlanError(f"{path}: overrides must be a list of tables")
    base = _format_from(values, WeightFormat(4, 32, symmetric=False), path)
    overrides = []
    for item in listed:
        roles, layers = item.pop("roles", []), item.pop("layers", "all")
        if not isinstance(roles, list) or not roles or not all(role in ROLES for role in roles):
            raise PlanError(f"{path}: roles is {roles!r}", hint=f"name some of {', '.join(ROLES)}")
        if layers not in ("all", "edges", "ends"):
            raise PlanError(f"{path}: layers is {layers!r}", hint='use "all", "edges" or "ends"')
        overrides.append(Override(tuple(roles), _format_from(item, base, path), layers))
    if len({form.bits == 16 for form in (base, *(override.format for override in overrides))}) > 1:
        raise PlanError(f"{path}: 16 bits can't be mixed with others", hint="use 32 for what stays in floats")
    scheme = QuantScheme(path.stem, base, tuple(overrides), rounding=rounding)
    if rounding == "gptq" and not scheme.quantized:
        raise PlanError(f"{path}: all weights are floats, which gptq does not round", hint="leave rounding out")
    return scheme


def _format_from(values: dict[str, Any], base: WeightFormat, path: Path) -> WeightFormat:
    kinds: dict[str, type] = {"bits": int, "block_size": int, "symmetric": bool}
    for key, value in values.items():
        if key not in kinds:
            raise PlanError(
                f"{path}: the key {key!r} is not known", hint=f"known: {', '.join(kinds)}, rounding, overrides"
            )
        if type(value) is not kinds[key]:
            raise PlanError(f"{path}: {key} is {value!r}, expected {kinds[key].__name__}")
    if values.get("bits") in {16, 32}:
        return WeightFormat(values["bits"])
    if base.is_float:
        base = WeightFormat(8, 32)
    return replace(base, **values)
