"""Quantization schemes: which weights are kept in how many bits. Pure data and its validation.

A scheme is one of the named recipes, or a TOML file:

    rounding = "gptq"       # "nearest" (default); "hqq": scales by a norm that spares outliers; "gptq": by the inputs that
                            # each weight sees on text that the model writes
    bits = 4                # 2, 4 or 8 (16 and 32: floats)
    block_size = 64         # weights that share a scale: 16, 32, 64, 128 or 256
    symmetric = false       # true: a fixed zero point in the middle
    palette = false         # true: each weight is one of 2^bits values of a table (2, 4 or 6 bits) that block_size rows share

    scaling = "awq"         # "none" (default); "awq": channels that matter are made large, and the weights before them small
    layer_count = 30        # of the model that the numbers of layers below are of; asked for with them

    [[overrides]]           # later ones win
    roles = ["down", "output"]
    layers = "edges"        # "all" (default), the first and last eighth ("edges"), the first and the last one ("ends"),
    bits = 8                # or numbers: [0, 3, 29]; in a model of another depth, the layers at the same part of it
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeAlias

from edgekit.errors import PlanError, UnsupportedError

__all__ = [
    "PALETTES",
    "RECIPES",
    "CacheFormat",
    "LayerSelection",
    "Override",
    "QuantScheme",
    "Rounding",
    "Scaling",
    "WeightFormat",
    "load_scheme",
    "scheme_toml",
]

LayerSelection: TypeAlias = Literal["all", "edges", "ends"] | tuple[int, ...]
Rounding: TypeAlias = Literal["nearest", "hqq", "gptq"]
Scaling: TypeAlias = Literal["none", "awq"]
ROLES = ("embedding", "head", "qkv", "output", "gate_up", "down")
BLOCK_SIZES = (16, 32, 64, 128, 256)
BLOCK_BITS, PALETTE_BITS = (2, 4, 8), (2, 4, 6)
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "hqq", "gptq")
SCALINGS: tuple[Scaling, ...] = ("none", "awq")
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
    """How one weight is stored: floats of 16 or 32 bits, or blocks of 2, 4 or 8 bits along its columns.

    A block holds `block_size` values with one float32 scale: weight = scale * (value - zero point). Symmetric formats have
    the zero point 2^(bits-1), others an integer one for each block. With an `offset` each block has a float32 that is added
    to its weights: what checkpoints quantized by others need to be carried over exactly.

    `row_scaled` is what NPUs take: symmetric, with one float32 scale for each row, which in formats with blocks each block
    multiplies by a whole number of its own, up to 15; without (block size 0) a row is one block.

    A `palette` is a table of 2^bits float16 values, of which each weight is one, times a float16 scale of its row:
    `block_size` rows share the table.

    `bfloat16_scales`, of symmetric formats, are what XNNPACK's kernels read: each over zero and a bfloat16.
    """

    bits: int
    block_size: int = 0
    symmetric: bool = True
    row_scaled: bool = False
    offset: bool = False
    bfloat16_scales: bool = False
    palette: bool = False

    def __post_init__(self) -> None:
        if self.bits in {16, 32}:
            if self.block_size:
                raise PlanError(f"{self.bits} bits are floats and have no block size")
        elif self.bits not in (PALETTE_BITS if self.palette else BLOCK_BITS):
            hint = "palettes have 2, 4 or 6 bits" if self.palette else "use 2, 4, 8, 16 or 32"
            raise PlanError(f"{self.bits} bits are not handled", hint=hint)
        elif self.block_size not in BLOCK_SIZES and not (self.row_scaled and not self.block_size):
            raise PlanError(f"block size {self.block_size} is not handled", hint=f"use one of {BLOCK_SIZES}")

    @property
    def is_float(self) -> bool:
        """True for 16 and 32 bits."""
        return self.bits >= 16

    def size_bytes(self, rows: int, columns: int) -> int:
        """Stored size of a weight with its scales and zero points."""
        if self.is_float:
            return rows * columns * self.bits // 8
        if self.palette:
            return rows * (columns * self.bits // 8 + 2) + -(-rows // self.block_size) * 2 * (1 << self.bits)
        if self.row_scaled:
            return rows * (columns * self.bits // 8 + 4 + (columns // self.block_size if self.block_size else 0))
        blocks = -(-columns // self.block_size)
        zero_points = 0 if self.symmetric else -(-blocks * self.bits // 8)
        floats = (2 if self.bfloat16_scales else 4) + (4 if self.offset else 0)
        return rows * (blocks * (self.block_size * self.bits // 8 + floats) + zero_points)


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
        rounding: How values are chosen: each `nearest` to its weight; `hqq`, with scales and zero points that large errors
            weigh less on; or `gptq`: so that what the weight computes on calibration text changes least.
        row_scaled: Matrices of the layers take the row-scaled form of `WeightFormat`, with 8 bits or blocks of 32 with 4.
        scaling: `awq`: columns that see large inputs are made large before rounding, and what is before them small.
        layer_count: Layers of the model that overrides with numbers of layers were made for; 0 without such.
    """

    name: str
    format: WeightFormat
    overrides: tuple[Override, ...] = ()
    keep: bool = False
    rounding: Rounding = "nearest"
    scaling: Scaling = "none"
    layer_count: int = 0
    row_scaled: bool = False

    def format_of(self, role: str, layer: int | None, layers: int) -> WeightFormat:
        """The format of a role; `layer` is None for embedding and head."""
        chosen = self.format
        for override in self.overrides:
            if role in override.roles and self._selects(override.layers, layer, layers):
                chosen = override.format
        return chosen

    def _selects(self, selection: LayerSelection, layer: int | None, layers: int) -> bool:
        if selection == "all" or layer is None:
            return selection == "all"
        if isinstance(selection, tuple):
            return _same_depth(layer, layers, self.layer_count) in selection
        width = max(layers // EDGE_FRACTION, 1) if selection == "edges" else 1
        return min(layer, layers - 1 - layer) < width

    @property
    def forms(self) -> tuple[WeightFormat, ...]:
        """Every format that a weight may get."""
        return (self.format, *(override.format for override in self.overrides))

    @property
    def activation_bits(self) -> int:
        """16 for `fp16`, whose program computes in half precision; 32 for all else."""
        return 16 if self.format.bits == 16 else 32

    @property
    def quantized(self) -> bool:
        """True where any weight is kept in blocks."""
        return any(not form.is_float for form in self.forms)

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
        # At 8 bits most of the error is the inputs', which scaling makes even; zero points then buy little.
        QuantScheme("int8-scaled", WeightFormat(8, 64), scaling="awq"),
        QuantScheme("keep", _INT8, keep=True),
        QuantScheme("int4", _INT4),
        QuantScheme("int4-block64", replace(_INT4, block_size=64)),
        QuantScheme("int4-block128", replace(_INT4, block_size=128)),
        QuantScheme("int4-symmetric", replace(_INT4, symmetric=True)),
        QuantScheme("int4-symmetric-block64", WeightFormat(4, 64)),
        QuantScheme("int4-symmetric-block128", WeightFormat(4, 128)),
        # What searches (`--max-size`) spend these bytes on in common, on three copies of a model: `converters/README.md`.
        QuantScheme(
            "int4-mixed",
            WeightFormat(4, 64, symmetric=False),
            overrides=(Override(("qkv",), _INT4),),
            rounding="gptq",
            scaling="awq",
        ),
    )
}
# For formats whose programs look weights up.
PALETTES: Mapping[str, QuantScheme] = {
    "palette4": QuantScheme("palette4", WeightFormat(4, 16, palette=True)),
    "palette6": QuantScheme("palette6", WeightFormat(6, 16, palette=True)),
}


def _same_depth(layer: int, layers: int, others: int) -> int:
    """The layer of a model with `others` layers that lies as deep as `layer` among `layers`."""
    return layer if layers == others else round(layer * (others - 1) / max(layers - 1, 1))


def load_scheme(name: str) -> QuantScheme:
    """A named recipe or a recipe file.

    Raises:
        UnsupportedError: No recipe has that name.
        PlanError: The file is missing or malformed.
    """
    named = {**RECIPES, **PALETTES}
    if name in named:
        return named[name]
    if not name.endswith(".toml"):
        raise UnsupportedError(
            f"quantization {name!r} is not known", hint=f"use auto, {', '.join(named)}, or a recipe file (.toml)"
        )
    path = Path(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise PlanError(f"{path} is not valid TOML: {error}") from error
    return _scheme_from(values, path)


def scheme_toml(scheme: QuantScheme) -> str:
    """A scheme as a recipe file, which `load_scheme` reads back."""
    lines = [f'rounding = "{scheme.rounding}"', f'scaling = "{scheme.scaling}"', *_format_lines(scheme.format)]
    if scheme.layer_count:
        lines.append(f"layer_count = {scheme.layer_count}")
    for override in scheme.overrides:
        layers = override.layers if isinstance(override.layers, str) else list(override.layers)
        lines += ["", "[[overrides]]", f"roles = {json.dumps(override.roles)}", f"layers = {json.dumps(layers)}"]
        lines += _format_lines(override.format)
    return "\n".join(lines) + "\n"


def _format_lines(form: WeightFormat) -> list[str]:
    if form.is_float:
        return [f"bits = {form.bits}"]
    lines = [f"bits = {form.bits}", f"block_size = {form.block_size}", f"symmetric = {json.dumps(form.symmetric)}"]
    return [*lines, "palette = true"] if form.palette else lines


def _scheme_from(values: dict[str, Any], path: Path) -> QuantScheme:
    rounding, layer_count = values.pop("rounding", "nearest"), values.pop("layer_count", 0)
    scaling = values.pop("scaling", "none")
    if rounding not in ROUNDINGS:
        raise PlanError(f"{path}: rounding is {rounding!r}", hint=f"use one of {', '.join(ROUNDINGS)}")
    if scaling not in SCALINGS:
        raise PlanError(f"{path}: scaling is {scaling!r}", hint=f"use one of {', '.join(SCALINGS)}")
    if type(layer_count) is not int or layer_count < 0:
        raise PlanError(f"{path}: layer_count is {layer_count!r}, expected the number of the model's layers")
    listed = values.pop("overrides", [])
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise PlanError(f"{path}: overrides must be a list of tables")
    base = _format_from(values, WeightFormat(4, 32, symmetric=False), path)
    overrides = tuple(_override_from(item, base, layer_count, path) for item in listed)
    if len({form.bits == 16 for form in (base, *(override.format for override in overrides))}) > 1:
        raise PlanError(f"{path}: 16 bits can't be mixed with others", hint="use 32 for what stays in floats")
    scheme = QuantScheme(path.stem, base, overrides, rounding=rounding, scaling=scaling, layer_count=layer_count)
    learned = {rounding, scaling} - {"nearest", "none"}
    if learned and any(form.palette for form in scheme.forms):
        raise PlanError(
            f"{path}: palettes don't go with {' or '.join(sorted(learned))}", hint='use rounding = "nearest"'
        )
    for key, value in (("rounding", rounding), ("scaling", scaling)):
        if value not in {"nearest", "none"} and not scheme.quantized:
            raise PlanError(f"{path}: all weights are floats, which {value} does nothing for", hint=f"leave {key} out")
    return scheme


def _override_from(item: dict[str, Any], base: WeightFormat, layer_count: int, path: Path) -> Override:
    roles, layers = item.pop("roles", []), item.pop("layers", "all")
    if not isinstance(roles, list) or not roles or not all(role in ROLES for role in roles):
        raise PlanError(f"{path}: roles is {roles!r}", hint=f"name some of {', '.join(ROLES)}")
    if isinstance(layers, list):
        if not all(type(layer) is int and 0 <= layer < layer_count for layer in layers):
            raise PlanError(
                f"{path}: layers is {layers!r}, layer_count {layer_count}",
                hint="numbers of layers start at 0 and need layer_count, the depth of the model that they are of",
            )
        layers = tuple(layers)
    elif layers not in ("all", "edges", "ends"):
        raise PlanError(f"{path}: layers is {layers!r}", hint='use "all", "edges", "ends", or a list of numbers')
    return Override(tuple(roles), _format_from(item, base, path), layers)


def _format_from(values: dict[str, Any], base: WeightFormat, path: Path) -> WeightFormat:
    kinds: dict[str, type] = {"bits": int, "block_size": int, "symmetric": bool, "palette": bool}
    for key, value in values.items():
        if key not in kinds:
            raise PlanError(
                f"{path}: the key {key!r} is not known",
                hint=f"known: {', '.join(kinds)}, rounding, scaling, layer_count, overrides",
            )
        if type(value) is not kinds[key]:
            raise PlanError(f"{path}: {key} is {value!r}, expected {kinds[key].__name__}")
    try:
        if values.get("bits") in {16, 32}:
            return WeightFormat(**values)
        return replace(WeightFormat(8, 32) if base.is_float else base, **values)
    except PlanError as error:
        raise PlanError(f"{path}: {error.message}", hint=error.hint) from error
