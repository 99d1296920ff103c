"""Plan: every decision of a conversion, and the memory and speed sums behind it. Pure: it sees shapes, never weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from math import prod
from typing import Any, Literal

from edgekit.config import ModelConfig
from edgekit.errors import PlanError, UnsupportedError
from edgekit.quant import BLOCK_SIZES, RECIPES, QuantScheme, WeightFormat, load_scheme
from edgekit.registry import CONVERTERS
from edgekit.source import Source, Tensor, part_shapes
from edgekit.target import Target

__all__ = ["MemoryPlan", "Plan", "SpeedPlan", "WeightPlan", "make_plan"]

DEFAULT_CONTEXT = 4096
PREFILL_CHUNK = 128
# The `auto` rule (design): 8 bits where their weights take at most this part of what an app may use, and decode is fast enough.
AUTO_MEMORY_PART = 0.25
AUTO_TOKENS_PER_S = 15.0
# Share of the memory bandwidth that a decode step reaches, and of int8 peak that prefill reaches, on ONNX Runtime.
DECODE_EFFICIENCY = 0.4
PREFILL_EFFICIENCY = 0.25
RUNTIME_BYTES = 80_000_000  # interpreter, ONNX Runtime and tokenizer
_MATRIX_ROLES = {"embedding", "head", "qkv", "output", "gate_up", "down"}


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
class MemoryPlan:
    """Bytes on the device, line by line; `budget_bytes` is what an app may use there."""

    weights_bytes: int
    kv_bytes: int
    activations_bytes: int
    runtime_bytes: int
    total_bytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class SpeedPlan:
    """Tokens per second, and what they are based on."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    basis: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Every decision for one model on one device. `notes` says each departure from what was asked, and why."""

    target: str
    format: str
    scheme: QuantScheme
    context: int
    threads: int
    accuracy_level: int
    weights: Mapping[str, WeightPlan]
    memory: MemoryPlan
    speed: SpeedPlan
    fits: Literal["yes", "no", "unknown"]
    notes: tuple[str, ...]

    @property
    def quant(self) -> str:
        """The scheme's name."""
        return self.scheme.name

    @property
    def calibrated(self) -> frozenset[str]:
        """Roles that are rounded by what they see on texts that the model writes."""
        return _calibrated(self.scheme, self.weights)

    def to_json(self) -> dict[str, Any]:
        """As `plan --json` and the manifest have it."""
        return {
            "fits": self.fits,
            "format": self.format,
            "quant": self.quant,
            "context": self.context,
            "threads": self.threads,
            "memory": asdict(self.memory),
            "speed": asdict(self.speed),
            "notes": list(self.notes),
        }


def make_plan(
    source: Source, target: Target, *, quant: str = "auto", context: int | None = None, format: str | None = None
) -> Plan:
    """Decide format, quantization and context.

    Args:
        source: An open checkpoint; only its config, shapes and types are looked at.
        target: The device.
        quant: A recipe's name, a recipe file, or `auto`.
        context: Tokens; None takes the smaller of the model's own and 4,096, or what fits.
        format: None takes the target's first one that can be converted to.

    Raises:
        PlanError: The context is impossible.
        UnsupportedError: The format or the quantization is not known.
    """
    config, notes = source.config, list(source.notes)
    chosen_format = _choose_format(target, format, notes)
    scheme = _choose_scheme(source, target, notes) if quant == "auto" else load_scheme(quant)
    weights = _plan_weights(source, scheme, notes)
    chosen_context = _choose_context(config, target, weights, context, notes)
    memory = _memory(config, target, weights, chosen_context)
    fits: Literal["yes", "no"] = "yes" if memory.total_bytes <= memory.budget_bytes else "no"
    if fits == "no":
        notes.append(
            f"needs {memory.total_bytes / 1e6:,.0f} MB, an app on {target.id} may use {memory.budget_bytes / 1e6:,.0f} MB"
        )
    return Plan(
        target=target.id,
        format=chosen_format,
        scheme=scheme,
        context=chosen_context,
        threads=target.threads,
        accuracy_level=4 if target.cpu.int8_activations and scheme.quantized else 0,
        weights=weights,
        memory=memory,
        speed=_speed(config, target, weights),
        fits=fits,
        notes=tuple(notes),
    )


def _choose_format(target: Target, asked: str | None, notes: list[str]) -> str:
    if asked:
        if asked not in CONVERTERS:
            raise UnsupportedError(f"format {asked!r} is not known", hint=f"known: {', '.join(CONVERTERS)}")
        return asked
    for name in target.formats:
        if name in CONVERTERS:
            if name != target.formats[0]:
                notes.append(f"{target.id} prefers {target.formats[0]}, which is not converted to yet: {name} instead")
            return name
    raise UnsupportedError(f"{target.id} takes {', '.join(target.formats)}", hint=f"known: {', '.join(CONVERTERS)}")


def _choose_scheme(source: Source, target: Target, notes: list[str]) -> QuantScheme:
    if source.quantized:
        return RECIPES["keep"]
    weights = _plan_weights(source, RECIPES["int8"], [])
    size_bytes, speed = _weights_bytes(weights), _speed(source.config, target, weights)
    if size_bytes <= AUTO_MEMORY_PART * target.memory.app_bytes and speed.decode_tokens_per_s > AUTO_TOKENS_PER_S:
        return RECIPES["int8"]
    notes.append(
        f"auto: int4-mixed, since 8 bits would take {size_bytes / 1e6:,.0f} MB and decode about "
        f"{speed.decode_tokens_per_s:.0f} tokens/s"
    )
    return RECIPES["int4-mixed"]


def _plan_weights(source: Source, scheme: QuantScheme, notes: list[str]) -> dict[str, WeightPlan]:
    weights, layers = {}, len(source.config.layers)
    adjusted: set[str] = set()
    for role, shape in part_shapes(source.config).items():
        layer, kind = (int(role.split(".")[1]), role.split(".")[2]) if role.startswith("layers.") else (None, role)
        if kind not in _MATRIX_ROLES:
            weights[role] = WeightPlan(shape, WeightFormat(scheme.activation_bits))
            continue
        form = scheme.format_of(kind, layer, layers)
        exact = {tensor.exact_format for tensor in source.parts[role]}
        same = next(iter(exact)) if len(exact) == 1 else None
        if scheme.keep and exact != {None}:
            weights[role] = _kept(shape, source.parts[role], _fitting(form, shape[1], exactly=kind == "embedding"))
            continue
        if same and same.bits == form.bits and not same.offset:
            weights[role] = WeightPlan(shape, same, carried=True)
            continue
        weights[role] = WeightPlan(shape, _fitting(form, shape[1], exactly=kind == "embedding"))
        if weights[role].format != form:
            adjusted.add(f"{kind}: rows of {shape[1]} take {_named(weights[role].format)} instead of {_named(form)}")
    notes.extend(sorted(adjusted))
    if scheme.keep:
        notes.append(_what_is_kept(source, weights))
    if scheme.rounding == "gptq":
        notes.append(_price_of_calibration(scheme, weights))
    return weights


def _kept(shape: tuple[int, ...], tensors: tuple[Tensor, ...], other: WeightFormat) -> WeightPlan:
    """A checkpoint's own blocks, in as few matrices as its formats allow; `other` is for tensors that can't be carried."""
    pieces = []
    for exact, group in groupby(tensors, key=lambda tensor: tensor.exact_format):
        rows = sum(tensor.shape[0] for tensor in group)
        pieces.append(WeightPlan((rows, *shape[1:]), exact or other, carried=exact is not None))
    if len(pieces) == 1:
        return pieces[0]
    return WeightPlan(shape, pieces[0].format, all(piece.carried for piece in pieces), tuple(pieces))


def _what_is_kept(source: Source, weights: Mapping[str, WeightPlan]) -> str:
    """Which of a checkpoint's types are carried over, and which are not."""
    kinds: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for role, weight in weights.items():
        if weight.form_is_blocks:
            for tensor in source.parts[role]:
                kinds[tensor.exact_format is not None][tensor.dtype] = None
    texts = []
    if kinds[True]:
        texts.append(f"{', '.join(kinds[True])} blocks are carried over without loss")
    if kinds[False]:
        texts.append(f"{', '.join(kinds[False])} tensors are rounded to 8 bits")
    return "keep: " + "; ".join(texts)


def _calibrated(scheme: QuantScheme, weights: Mapping[str, WeightPlan]) -> frozenset[str]:
    if scheme.rounding != "gptq":
        return frozenset()
    rounded = {role for role, weight in weights.items() if weight.form_is_blocks and not weight.carried}
    return frozenset(rounded - {"embedding"} if "head" in weights else rounded)  # an untied embedding is only looked up


def _price_of_calibration(scheme: QuantScheme, weights: Mapping[str, WeightPlan]) -> str:
    if not _calibrated(scheme, weights):
        return f"{scheme.name} asks for gptq rounding, but no weight is left to round by it"
    return (
        f"{scheme.name} rounds by texts that the model first writes: minutes for each billion parameters; "
        "int4 takes seconds"
    )


def _fitting(form: WeightFormat, columns: int, *, exactly: bool) -> WeightFormat:
    """The format with the largest block up to its own that is no longer than a row (for the embedding: divides it)."""
    if form.is_float:
        return form
    sizes = [
        size
        for size in BLOCK_SIZES
        if size <= form.block_size and (columns % size == 0 if exactly else size <= max(columns, BLOCK_SIZES[0]))
    ]
    if not sizes:
        return WeightFormat(32)
    return replace(form, block_size=sizes[-1])


def _named(form: WeightFormat) -> str:
    return f"{form.bits} bits" + (f" in blocks of {form.block_size}" if form.block_size else "")


def _choose_context(
    config: ModelConfig, target: Target, weights: Mapping[str, WeightPlan], asked: int | None, notes: list[str]
) -> int:
    if asked is not None:
        if not 1 <= asked <= config.context:
            raise PlanError(
                f"a context of {asked} is not possible: the model has 1 to {config.context}",
                hint=f"use --context {min(config.context, DEFAULT_CONTEXT)}",
            )
        return asked
    context = default = min(config.context, DEFAULT_CONTEXT)
    while context > 512 and _memory(config, target, weights, context).total_bytes > target.memory.app_bytes:
        context //= 2
    if context < default:
        notes.append(f"context {context} instead of {default}, so that the cache fits beside the weights")
    return context


def _weights_bytes(weights: Mapping[str, WeightPlan]) -> int:
    return sum(weight.size_bytes for weight in weights.values())


def _memory(config: ModelConfig, target: Target, weights: Mapping[str, WeightPlan], context: int) -> MemoryPlan:
    halves = weights["final_norm"].format.bits == 16  # norms are kept in the type that the program computes in
    cache_bytes = 2 if halves else 4
    widest = max(2 * config.intermediate_size, config.attention.qkv_rows) + 4 * config.hidden_size
    lines = {
        "weights_bytes": _weights_bytes(weights),
        "kv_bytes": config.kv_bytes(context, element_bytes=cache_bytes),
        "activations_bytes": 4 * (min(context, PREFILL_CHUNK) * widest + 2 * config.vocab_size),
        "runtime_bytes": RUNTIME_BYTES,
    }
    return MemoryPlan(**lines, total_bytes=sum(lines.values()), budget_bytes=target.memory.app_bytes)


def _speed(config: ModelConfig, target: Target, weights: Mapping[str, WeightPlan]) -> SpeedPlan:
    """Decode reads every weight once a token, but of an untied embedding only one row; prefill is bound by arithmetic."""
    read = {role: weight for role, weight in weights.items() if role != "embedding" or config.tied_embeddings}
    multiplied = sum(prod(weight.shape) for role, weight in read.items() if role not in {"embedding", "head"})
    decode = DECODE_EFFICIENCY * target.memory.bandwidth_bytes_per_s / _weights_bytes(read)
    prefill = PREFILL_EFFICIENCY * target.cpu.int8_ops_per_s / (2 * max(multiplied, 1))
    return SpeedPlan(round(decode, 1), round(prefill, 1), "modelled from the target's bandwidth and int8 rate")
