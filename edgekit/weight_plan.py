"""How each weight is stored: what a scheme means for the shapes of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from weakref import WeakKeyDictionary

from edgekit.anatomy import Weight, WeightKind
from edgekit.calibration_cost import calibration_cost
from edgekit.capability import CAPABILITIES, Capability
from edgekit.outline import Outline
from edgekit.quant import QuantScheme, WeightFormat
from edgekit.source import Tensor

__all__ = ["WeightGroup", "WeightPlan", "WeightsPlan", "calibrated", "plan_weights", "scaled", "with_own_head"]

_PRODUCERS = {"output": "qkv", "down": "gate_up"}

ROW_SCALED_BLOCK = 32


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """How one weight is stored.

    Attributes:
        format: Of the first piece where there are several.
        carried: The checkpoint's own blocks, without rounding.
        pieces: Matrices of some rows each, one after the other, where a checkpoint stores parts of a packed projection
            differently and one format can't carry them all; else empty.
    """

    shape: tuple[int, ...]
    format: WeightFormat
    carried: bool = False
    pieces: tuple[WeightPlan, ...] = ()

    @property
    def matrices(self) -> tuple[WeightPlan, ...]:
        """What is stored: the pieces, or the whole."""
        return self.pieces or (self,)

    @property
    def form_is_blocks(self) -> bool:
        """True where the weight is kept in quantized blocks."""
        return not self.format.is_float

    @property
    def size_bytes(self) -> int:
        """Stored size."""
        return sum(one.format.size_bytes(one.shape[0], prod(one.shape[1:])) for one in self.matrices)


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """Weights that are alike for the sums: of one class and format, of which a token reads the same share.

    `multiplied` are their parameters where they are matrices inside the layers, which prefill is bound by.
    """

    kind: WeightKind
    format: WeightFormat
    active: float
    size_bytes: int
    multiplied: int

    @property
    def blocks(self) -> int:
        """Quantized blocks; none of floats."""
        if self.format.is_float:
            return 0
        eight = self.format.size_bytes(1, 8 * self.format.block_size)  # whose zero points fill whole bytes
        return 8 * self.size_bytes // eight

    @property
    def is_looked_up(self) -> bool:
        """True for an embedding that is not the head too: only some of its rows are ever read."""
        return self.kind == "embedding" and self.active < 1


@dataclass(frozen=True, slots=True)
class WeightsPlan:
    """All weights of a model under one scheme: each by its name, summed up in groups, and what departs from the scheme."""

    weights: Mapping[str, WeightPlan]
    groups: tuple[WeightGroup, ...]
    notes: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Stored size of all weights."""
        return sum(group.size_bytes for group in self.groups)


# Ranking devices and schemes asks for the same ones again; an outline that is gone takes its own along.
_PLANNED: WeakKeyDictionary[Outline, dict[tuple[QuantScheme, str], WeightsPlan]] = WeakKeyDictionary()
_WITH_HEADS: WeakKeyDictionary[Outline, Outline] = WeakKeyDictionary()


def with_own_head(outline: Outline, format: str) -> Outline:
    """The model as programs of a format store it: some keep a head that is tied to the embedding a second time."""
    if not CAPABILITIES[format].own_head or "head" in outline.anatomy.weights:
        return outline
    if outline not in _WITH_HEADS:
        embedding = outline.anatomy.weights["embedding"]
        both = {
            "embedding": replace(embedding, active=1 / embedding.shape[0]),
            "head": replace(embedding, kind="head"),  # rounded as schemes have it for the embedding
        }
        anatomy = replace(outline.anatomy, weights={**outline.anatomy.weights, **both})
        parts = {**outline.parts, "head": outline.parts["embedding"]} if outline.parts else outline.parts
        _WITH_HEADS[outline] = replace(outline, anatomy=anatomy, parts=parts)
    return _WITH_HEADS[outline]


def plan_weights(outline: Outline, scheme: QuantScheme, format: str = "onnx") -> WeightsPlan:
    """How a format's programs store each weight of the anatomy."""
    known = _PLANNED.setdefault(outline, {})
    if (scheme, format) not in known:
        known[scheme, format] = _plan_weights(outline, scheme, CAPABILITIES[format])
    return known[scheme, format]


def _plan_weights(outline: Outline, scheme: QuantScheme, capability: Capability) -> WeightsPlan:
    weights, notes = _plan_each(outline, scheme, capability)
    sums: dict[tuple[WeightKind, WeightFormat, float], tuple[int, int]] = {}
    for name, plan in weights.items():
        weight = outline.anatomy.weights[name]
        multiplied = weight.parameters if weight.role and weight.kind not in ("embedding", "head") else 0
        for one in plan.matrices:
            size_bytes, sum_multiplied = sums.get((weight.kind, one.format, weight.active), (0, 0))
            share = multiplied * one.shape[0] // plan.shape[0]
            sums[weight.kind, one.format, weight.active] = (size_bytes + one.size_bytes, sum_multiplied + share)
    return WeightsPlan(weights, tuple(WeightGroup(*key, *sums[key]) for key in sums), notes)


def _plan_each(
    outline: Outline, scheme: QuantScheme, capability: Capability
) -> tuple[dict[str, WeightPlan], tuple[str, ...]]:
    weights, layers = dict[str, WeightPlan](), len(outline.anatomy.caches)
    departures: dict[str, dict[str, None]] = {}
    floats = 16 if capability.computes_in_halves and scheme.quantized else scheme.activation_bits
    for name, weight in outline.anatomy.weights.items():
        if not weight.role:
            weights[name] = WeightPlan(weight.shape, WeightFormat(floats))
            continue
        form = scheme.format_of(weight.role, _layer(name), layers)
        plan = _plan_one(weight, form, outline.parts.get(name, ()), scheme, capability)
        weights[name] = plan
        carried = plan.carried or plan.pieces
        if not carried and _departs(plan.format, form, row_scaled=scheme.row_scaled):
            what = f"rows of {weight.shape[1]} take {_named(plan.format)} instead of {_named(form)}"
            departures.setdefault(what, {})[weight.role] = None
    notes = sorted(f"{', '.join(roles)}: {what}" for what, roles in departures.items())
    if scheme.keep and outline.parts:
        notes.append(_what_is_kept(outline, weights))
    if scheme.rounding == "gptq" or scheme.scaling != "none":
        notes.append(_price_of_calibration(scheme, weights))
    return weights, tuple(notes)


def _plan_one(
    weight: Weight, form: WeightFormat, tensors: tuple[Tensor, ...], scheme: QuantScheme, capability: Capability
) -> WeightPlan:
    """One matrix: as the scheme has it, as near to that as the format can, or in the checkpoint's own blocks."""
    columns = weight.shape[1]
    if scheme.row_scaled and weight.kind not in ("embedding", "head"):
        return WeightPlan(weight.shape, _row_scaled(form, columns))
    forms = capability.embedding if weight.kind == "embedding" else capability.matrices
    fitting = forms.nearest(form, columns)
    if fitting.palette and any(tensor.shape[0] % fitting.block_size for tensor in tensors):
        fitting = forms.nearest(WeightFormat(8, 64), columns)  # rows that share a table are of one tensor
    exact = {tensor.exact_format for tensor in tensors}
    if scheme.keep and any(exact):
        return _kept(weight.shape, tensors, fitting)
    same = next(iter(exact)) if len(exact) == 1 else None
    if same and same.bits == form.bits and not same.offset and forms.takes(same, columns):
        return WeightPlan(weight.shape, same, carried=True)
    return WeightPlan(weight.shape, fitting)


def _departs(found: WeightFormat, form: WeightFormat, *, row_scaled: bool) -> bool:
    """True where a weight is stored otherwise than asked, beyond what makes the format's programs what they are."""
    return found.bits != form.bits if row_scaled else found != form


def _kept(shape: tuple[int, ...], tensors: tuple[Tensor, ...], other: WeightFormat) -> WeightPlan:
    """A checkpoint's own blocks, in as few matrices as its formats allow; `other` is for tensors that can't be carried."""
    pieces = []
    for exact, group in groupby(tensors, key=lambda tensor: tensor.exact_format):
        rows = sum(tensor.shape[0] for tensor in group)
        pieces.append(WeightPlan((rows, *shape[1:]), exact or other, carried=exact is not None))
    if len(pieces) == 1:
        return pieces[0]
    return WeightPlan(shape, pieces[0].format, all(piece.carried for piece in pieces), tuple(pieces))


def _what_is_kept(outline: Outline, weights: Mapping[str, WeightPlan]) -> str:
    """Which of a checkpoint's types are carried over, and which are not."""
    kinds: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for role, weight in weights.items():
        if weight.form_is_blocks:
            for tensor in outline.parts.get(role, ()):
                kinds[tensor.exact_format is not None][tensor.dtype] = None
    texts = []
    if kinds[True]:
        texts.append(f"{', '.join(kinds[True])} blocks are carried over without loss")
    if kinds[False]:
        texts.append(f"{', '.join(kinds[False])} tensors are rounded to 8 bits")
    return "keep: " + "; ".join(texts)


def calibrated(scheme: QuantScheme, weights: Mapping[str, WeightPlan]) -> frozenset[str]:
    """Weights that are rounded by what they see on texts that the model writes."""
    if scheme.rounding != "gptq":
        return frozenset()
    rounded = {
        role
        for role, weight in weights.items()
        if weight.form_is_blocks and not weight.carried and not weight.format.row_scaled
    }
    return frozenset(rounded - {"embedding"} if "head" in weights else rounded)  # an untied embedding is only looked up


def scaled(scheme: QuantScheme, weights: Mapping[str, WeightPlan]) -> frozenset[str]:
    """Matrices of the layers whose columns are scaled by what they see on texts that the model writes."""
    if scheme.scaling == "none":
        return frozenset()
    names = (role for role, weight in weights.items() if weight.form_is_blocks and not weight.carried)
    matrices = (name for name in names if _layer(name) is not None)
    producers = {name: weights.get(_producer(name)) for name in matrices}  # others' layers have none of that name
    return frozenset(name for name, producer in producers.items() if producer and not producer.carried)


def _producer(name: str) -> str:
    """What computes a matrix's inputs and is divided where they are scaled: another matrix, or (itself here) a norm."""
    layer, _, role = name.rpartition(".")
    return f"{layer}.{_PRODUCERS[role]}" if role in _PRODUCERS else name


def _layer(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def _price_of_calibration(scheme: QuantScheme, weights: Mapping[str, WeightPlan]) -> str:
    rounded = calibrated(scheme, weights)
    learning = rounded | scaled(scheme, weights)
    if not learning:
        asked = "gptq rounding" if scheme.rounding == "gptq" else f"{scheme.scaling} scaling"
        return f"{scheme.name} asks for {asked}, but no weight is left to round by it"
    cost = calibration_cost({role: weight.shape for role, weight in weights.items()}, learning)
    verb, quick = ("rounds", "int4") if rounded else ("scales", "int8")
    return f"{scheme.name} {verb} by texts that the model first writes: {cost} here (modelled); {quick} takes seconds"


def _row_scaled(form: WeightFormat, columns: int) -> WeightFormat:
    if form.bits == 4 and columns % ROW_SCALED_BLOCK == 0:
        return WeightFormat(4, ROW_SCALED_BLOCK, row_scaled=True)
    return WeightFormat(8, row_scaled=True)


def _named(form: WeightFormat) -> str:
    """A format for messages."""
    if form.row_scaled:
        return f"{form.bits} bits with a scale for each " + ("block and row" if form.block_size else "row")
    if form.palette:
        return f"palettes of {form.bits} bits"
    zero_points = " without zero points" * (form.symmetric and not form.is_float)
    return f"{form.bits} bits" + (f" in blocks of {form.block_size}" if form.block_size else "") + zero_points
