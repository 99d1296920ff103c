"""What programs of each format can be: how they store weights, what they compute in, how they keep keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from edgekit.quant import BLOCK_SIZES, PALETTE_BITS, CacheFormat, QuantScheme, WeightFormat

__all__ = ["CAPABILITIES", "Capability", "WeightForms"]

ROW = 0  # a block size: one scale for each row


@dataclass(frozen=True, slots=True)
class WeightForms:
    """Which quantized weights a format's programs take.

    Attributes:
        blocks: By bits, the sizes of their blocks; `ROW` is one scale for a whole row.
        zero_points: Blocks may have zero points of their own.
        offsets: Blocks may have offsets, as a checkpoint's own often do; see `WeightFormat`.
        whole_blocks: Blocks must divide a row, others pad its end.
        bfloat16_scales: Blocks' scales are positive bfloat16 numbers; see `WeightFormat`.
        palettes: Bits of palettes.
    """

    blocks: Mapping[int, tuple[int, ...]]
    zero_points: bool = True
    offsets: bool = True
    whole_blocks: bool = False
    bfloat16_scales: bool = False
    palettes: tuple[int, ...] = ()

    def takes(self, form: WeightFormat, columns: int) -> bool:
        """True where a weight with rows of so many columns can be stored in this form as it is."""
        if form.palette:
            return form.bits in self.palettes
        plain = (form.symmetric or self.zero_points) and (not form.offset or self.offsets)
        plain = plain and form.bfloat16_scales == self.bfloat16_scales
        return plain and not form.row_scaled and self._fits(form.bits, form.block_size, columns)

    def nearest(self, form: WeightFormat, columns: int) -> WeightFormat:
        """The form nearest to one that is asked for: of as many bits, or the next more, with the largest blocks up to its own."""
        if form.is_float or form.palette:
            return form
        symmetric = form.symmetric or not self.zero_points
        wanted = replace(form, symmetric=symmetric, bfloat16_scales=self.bfloat16_scales)
        for bits in sorted(bits for bits in self.blocks if bits >= form.bits):
            sizes = [size for size in self.blocks[bits] if size != ROW and self._fits(bits, size, columns)]
            size = max((size for size in sizes if size <= form.block_size), default=min(sizes, default=ROW))
            if size:
                return replace(wanted, bits=bits, block_size=size)
            if ROW in self.blocks[bits]:
                return WeightFormat(bits, row_scaled=True)
        return WeightFormat(32)

    def _fits(self, bits: int, size: int, columns: int) -> bool:
        if size not in self.blocks.get(bits, ()):
            return False
        return columns % size == 0 if self.whole_blocks else size <= max(columns, BLOCK_SIZES[0])


@dataclass(frozen=True, slots=True)
class Capability:
    """What programs of a format can be.

    Attributes:
        caches: What keys and values may be kept as, the default first.
        matrices: How matrices that are multiplied with are stored.
        embedding: How an embedding is, which is the head too where they are tied.
        own_head: A head that is tied to the embedding is stored a second time.
        keeps: A checkpoint's own blocks can be carried over.
        halves: `fp16` programs can be written, which compute in half precision.
        computes_in_halves: Programs of all other schemes than `fp32` compute in half precision.
        int8_activations: What is multiplied is rounded to 8 bits first: where the `target` is fast at that, always or never.
        quantized_activations: Programs compute in whole numbers, as NPUs do: matrices of the layers are scaled by rows, and
            what the values between them range over is calibrated on texts that the model writes.
        schemes: The recipes that there are, the finest first; empty: any whose forms can be stored.
        context_multiple: What a context must be a multiple of.
        query_growth: Queries can grow with their position.
        most_quantized_bytes: Of weights in a program that is not in full precision; 0 where nothing bounds them.
    """

    caches: tuple[CacheFormat, ...]
    matrices: WeightForms
    embedding: WeightForms
    own_head: bool = False
    keeps: bool = True
    halves: bool = True
    computes_in_halves: bool = False
    int8_activations: Literal["target", "always", "never"] = "target"
    quantized_activations: bool = False
    schemes: tuple[str, ...] = ()
    context_multiple: int = 1
    query_growth: bool = True
    most_quantized_bytes: int = 0

    def obstacle(self, scheme: QuantScheme) -> str:
        """What of a scheme can't be expressed, as the end of a sentence; empty where all can be."""
        if scheme.keep and not self.keeps:
            return "can't carry a checkpoint's blocks over"
        if scheme.activation_bits == 16 and not self.halves:
            return "is not computed in half precision"
        if {form.bits for form in scheme.forms if form.palette} - set(self.matrices.palettes):
            return "stores no palettes"
        widths = {form.bits for form in scheme.forms if not form.is_float and not form.palette}
        if widths - set(self.matrices.blocks):
            missing, known = min(widths - set(self.matrices.blocks)), sorted(self.matrices.blocks)
            return f"stores no weights of {missing} bits, but of {', '.join(map(str, known))}"
        return ""


_ANY_BLOCKS = {2: BLOCK_SIZES, 4: BLOCK_SIZES, 8: BLOCK_SIZES}
_DIVIDING = WeightForms(_ANY_BLOCKS, whole_blocks=True)
_DIVIDING_OR_PALETTES = replace(_DIVIDING, palettes=PALETTE_BITS)

CAPABILITIES: Mapping[str, Capability] = {
    "onnx": Capability(
        caches=(CacheFormat.FLOAT32, CacheFormat.FLOAT16, CacheFormat.INT8),
        matrices=WeightForms(_ANY_BLOCKS),
        embedding=_DIVIDING,
    ),
    "onnx-qdq": Capability(
        caches=(CacheFormat.INT8,),
        matrices=WeightForms(_ANY_BLOCKS),
        embedding=_DIVIDING,
        schemes=("int8", "int4"),
        quantized_activations=True,
        query_growth=False,
    ),
    "executorch": Capability(  # what XNNPACK multiplies with; float32 alone is computed alike on every processor
        caches=(CacheFormat.FLOAT32,),
        matrices=WeightForms(
            {4: tuple(size for size in BLOCK_SIZES if size % 32 == 0), 8: (ROW,)},
            zero_points=False, offsets=False, whole_blocks=True, bfloat16_scales=True,
        ),
        embedding=WeightForms({8: (ROW,)}, zero_points=False, offsets=False, whole_blocks=True),
        own_head=True,
        keeps=False,
        halves=False,
        int8_activations="always",
    ),
    "litert": Capability(
        caches=(CacheFormat.FLOAT32,),
        matrices=WeightForms({8: (ROW,)}, zero_points=False, offsets=False),
        embedding=WeightForms({8: (ROW,)}, zero_points=False, offsets=False),
        keeps=False,
        halves=False,
        int8_activations="always",
        most_quantized_bytes=2**31 - 2**26,  # LiteRT's Python package writes no longer FlatBuffer, its converter does
    ),
    "coreml": Capability(
        caches=(CacheFormat.FLOAT16,),
        matrices=_DIVIDING_OR_PALETTES,
        embedding=_DIVIDING_OR_PALETTES,
        computes_in_halves=True,
        int8_activations="never",
        context_multiple=32,
    ),
    "coreai": Capability(
        caches=(CacheFormat.FLOAT32, CacheFormat.FLOAT16),
        matrices=WeightForms(_ANY_BLOCKS),
        embedding=_DIVIDING,
        computes_in_halves=True,
        int8_activations="never",
    ),
}  # fmt: skip
