"""Plan: every decision for one model on one device, and why. Pure: it sees shapes, never weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

from edgekit.efficiency import EFFICIENCY, Efficiency
from edgekit.errors import PlanError, UnsupportedError
from edgekit.memory_plan import MemoryPlan, plan_memory
from edgekit.outline import Outline, outline_of
from edgekit.quant import RECIPES, CacheFormat, Override, QuantScheme, load_scheme
from edgekit.registry import CONVERTERS
from edgekit.runtime_options import RuntimeOptions
from edgekit.source import Source
from edgekit.speed_plan import SpeedPlan, plan_speed
from edgekit.target import Format, Target
from edgekit.weight_plan import WeightPlan, WeightsPlan, calibrated, plan_weights, scaled

__all__ = [
    "DEFAULT_CONTEXT",
    "INT8_LEVEL",
    "LEAST_CONTEXT",
    "MemoryPlan",
    "Plan",
    "SpeedPlan",
    "WeightPlan",
    "make_plan",
]

DEFAULT_CONTEXT = 4096
INT8_LEVEL = 4  # the accuracy_level at which products are computed in int8
LEAST_CONTEXT = 512  # no shorter one is chosen unasked
# The `auto` rule (design): 8 bits where their weights take at most this part of what an app may use, and decode is fast enough.
AUTO_MEMORY_PART = 0.25
AUTO_TOKENS_PER_S = 15.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Every decision for one model on one device.

    `provider` is what should run the program, empty for the processor. `notes` says each departure from what was asked, and
    why.
    """

    target: str
    format: str
    scheme: QuantScheme
    context: int
    cache: CacheFormat
    provider: str
    runtime: RuntimeOptions
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
    def needs_texts(self) -> bool:
        """True where conversion learns from texts that the model writes first."""
        ranges = EFFICIENCY[self.format].quantized_activations or self.cache is CacheFormat.INT8
        return bool(self.calibrated or self.scaled) or ranges

    @property
    def calibrated(self) -> frozenset[str]:
        """Roles that are rounded by what they see on texts that the model writes."""
        return calibrated(self.scheme, self.weights)

    @property
    def scaled(self) -> frozenset[str]:
        """Weights whose columns are scaled by what they see on texts that the model writes."""
        return scaled(self.scheme, self.weights)

    def to_json(self) -> dict[str, Any]:
        """As `plan --json` and the manifest have it."""
        return {
            "fits": self.fits,
            "format": self.format,
            "quant": self.quant,
            "context": self.context,
            "cache": self.cache.value,
            "provider": self.provider,
            "runtime": asdict(self.runtime),
            "memory": asdict(self.memory),
            "speed": asdict(self.speed),
            "notes": list(self.notes),
        }


def make_plan(
    source: Source | Outline,
    target: Target,
    *,
    quant: str | QuantScheme = "auto",
    context: int | None = None,
    format: str | None = None,
    cache: CacheFormat | None = None,
    budget_bytes: int | None = None,
) -> Plan:
    """Decide format, quantization, context and cache.

    Args:
        source: An open checkpoint, of which only config, shapes and types are looked at, or just its outline.
        target: The device.
        quant: A recipe's name, a recipe file, a scheme, or `auto`: what the target's profile or the rule of `auto` says.
        context: Tokens; None takes the smaller of the model's own and 4,096, or what fits.
        format: None takes the target's first one that can be converted to.
        cache: How keys and values are kept; None takes the format's first one, or what fits.
        budget_bytes: What the model may use; None takes what an app may use on the target.

    Raises:
        PlanError: The context is impossible.
        UnsupportedError: The format or the quantization is not known, or do not go together.
    """
    outline = source if isinstance(source, Outline) else outline_of(source)
    notes = [*([outline.obstacle] if outline.obstacle else []), *outline.notes]
    asked = quant if isinstance(quant, QuantScheme) else load_scheme(quant) if quant != "auto" else None
    chosen_format = _choose_format(outline, target, asked, format, notes)
    frame = _Frame(outline, target, chosen_format, budget_bytes or target.memory.app_bytes)
    scheme = asked or _automatic_scheme(frame, notes)
    if frame.efficiency.quantized_activations:
        scheme = _for_npu(scheme, notes)
    planned = plan_weights(outline, scheme)
    notes.extend(planned.notes)
    caches = frame.caches(scheme, cache)
    chosen_context, chosen_cache = _choose_context(frame, planned, context, caches, notes)
    _check_expressible(frame, chosen_context)
    memory = frame.memory(planned, chosen_context, chosen_cache)
    fits: Literal["yes", "no"] = "yes" if memory.total_bytes <= memory.budget_bytes else "no"
    if fits == "no":
        notes.append(
            f"needs {memory.total_bytes / 1e6:,.0f} MB, an app on {target.id} may use {memory.budget_bytes / 1e6:,.0f} MB"
        )
    return Plan(
        target=target.id,
        format=frame.format,
        scheme=scheme,
        context=chosen_context,
        cache=chosen_cache,
        provider=target.npu.provider if target.npu and frame.efficiency.unit == "npu" else "",
        runtime=target.options(frame.format),
        accuracy_level=INT8_LEVEL if target.cpu.int8_activations and scheme.quantized else 0,
        weights=planned.weights,
        memory=memory,
        speed=frame.speed(planned, chosen_context, chosen_cache),
        fits=fits,
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    """What is settled before the scheme: the model, the device, the format and the budget."""

    outline: Outline
    target: Target
    format: str
    budget_bytes: int

    @property
    def efficiency(self) -> Efficiency:
        return EFFICIENCY[self.format]

    def whole_steps(self, context: int) -> int:
        """The longest context up to this one that the format's programs can have; 0 where there is none."""
        return context // self.efficiency.context_multiple * self.efficiency.context_multiple

    def memory(self, planned: WeightsPlan, context: int, cache: CacheFormat) -> MemoryPlan:
        return plan_memory(
            self.outline.anatomy,
            planned.groups,
            context=context,
            cache=cache,
            efficiency=self.efficiency,
            options=self.target.options(self.format),
            budget_bytes=self.budget_bytes,
        )

    def speed(self, planned: WeightsPlan, context: int, cache: CacheFormat) -> SpeedPlan:
        return plan_speed(
            self.outline.anatomy, planned.groups, self.target, context=context, cache=cache, efficiency=self.efficiency
        )

    def caches(self, scheme: QuantScheme, asked: CacheFormat | None) -> tuple[CacheFormat, ...]:
        """What keys and values may be kept as, the best first."""
        # A program that computes in halves has nothing wider to keep.
        halves = scheme.activation_bits == 16
        possible = tuple(cache for cache in self.efficiency.caches if not (halves and cache is CacheFormat.FLOAT32))
        if asked is None:
            return possible
        if asked not in possible:
            raise UnsupportedError(
                f"{self.format} programs of {scheme.name} can't keep keys and values as {asked.value}",
                hint=f"use {', '.join(kind.value for kind in possible)}",
            )
        return (asked,)


def check_format(name: str) -> None:
    """Refuse a format that is not converted to."""
    if name not in CONVERTERS:
        state = "is not converted to yet" if name in get_args(Format) else "is not known"
        raise UnsupportedError(f"format {name!r} {state}", hint=f"known: {', '.join(CONVERTERS)}")


def _choose_format(
    outline: Outline, target: Target, scheme: QuantScheme | None, asked: str | None, notes: list[str]
) -> str:
    """The asked format, or the first of the target's that is converted to and can have this model and scheme."""
    if asked:
        check_format(asked)
        obstacle = _obstacle(asked, outline, scheme)
        if obstacle:
            raise UnsupportedError(f"{asked} {obstacle}", hint="leave --format out, or use --format onnx")
        return asked
    obstacles = {name: _obstacle(name, outline, scheme) for name in target.formats}
    chosen = next((name for name, obstacle in obstacles.items() if not obstacle), None)
    if chosen is None:
        raise UnsupportedError(f"{target.id} takes {', '.join(target.formats)}", hint=f"known: {', '.join(CONVERTERS)}")
    first = target.formats[0]
    if chosen != first:
        notes.append(f"{target.id} prefers {first}, which {obstacles[first]}: {chosen} instead")
    return chosen


def _obstacle(format: str, outline: Outline, scheme: QuantScheme | None) -> str:
    """Why a format can't have this model with this scheme (None: one is still to be chosen); empty where it can."""
    if format not in CONVERTERS:
        return "is not converted to yet"
    efficiency, anatomy = EFFICIENCY[format], outline.anatomy
    # Not the names alone: a recipe file may be called int8.toml and ask for something else. Row-scaled ones are of a plan.
    if (
        scheme and efficiency.schemes and not scheme.row_scaled
        and scheme not in [RECIPES[name] for name in efficiency.schemes]
    ):  # fmt: skip
        which = "the recipe file " * (scheme.name in efficiency.schemes) + scheme.name
        return f"is not written with {which} but {', '.join(efficiency.schemes)}"
    other = {layer.kind for layer in anatomy.caches} - {"full", "sliding"}
    if efficiency.unit == "npu" and (other or any(weight.kind == "experts" for weight in anatomy.weights.values())):
        return "has neither experts nor recurrent or latent layers"
    return ""


def _check_expressible(frame: _Frame, context: int) -> None:
    """Refuse what a format's programs can't express."""
    attention = frame.outline.config.attention if frame.outline.config else None
    if not frame.efficiency.quantized_activations or attention is None or not attention.query_growth:
        return
    if context > attention.query_growth_context:
        raise UnsupportedError(
            f"{frame.format} programs can't let queries grow with their position, as this model's do past token "
            f"{attention.query_growth_context:,}",
            hint=f"use --context {attention.query_growth_context}, or --format onnx",
        )


def _for_npu(scheme: QuantScheme, notes: list[str]) -> QuantScheme:
    """The scheme with row-scaled layers; the embedding and the head, which the CPU computes, stay at 8 bits."""
    ends = RECIPES["int8"].format
    if scheme.format != ends:
        notes.append(f"{scheme.name}: the embedding and the head, which run on the CPU, are kept at 8 bits")
    return replace(scheme, row_scaled=True, overrides=(*scheme.overrides, Override(("embedding", "head"), ends)))


def _automatic_scheme(frame: _Frame, notes: list[str]) -> QuantScheme:
    """Quantized checkpoints keep their blocks, profiles have a default, and else the rule of `auto` decides."""
    if frame.outline.quantized:
        scheme = RECIPES["keep"]
    else:
        scheme = _rule_of_auto(frame, notes) if frame.target.quant == "auto" else load_scheme(frame.target.quant)
    allowed = frame.efficiency.schemes
    if not allowed or scheme.name in allowed:
        return scheme
    smaller = allowed[0] if scheme.keep or scheme.format.bits >= 8 else allowed[-1]
    notes.append(f"{frame.format} is not written with {scheme.name}: {smaller} instead")
    return RECIPES[smaller]


def _rule_of_auto(frame: _Frame, notes: list[str]) -> QuantScheme:
    scheme = RECIPES["int8"]
    planned = plan_weights(frame.outline, scheme)
    context, cache = _default_context(frame), frame.caches(scheme, None)[0]
    size_bytes, speed = planned.size_bytes, frame.speed(planned, context, cache).decode_tokens_per_s
    if size_bytes <= AUTO_MEMORY_PART * frame.budget_bytes and speed > AUTO_TOKENS_PER_S:
        return scheme
    notes.append(
        f"auto: int4-mixed, since 8 bits would take {size_bytes / 1e6:,.0f} MB and decode about {speed:.3g} tokens/s"
    )
    return RECIPES["int4-mixed"]


def _default_context(frame: _Frame) -> int:
    npu = frame.target.npu if frame.efficiency.unit == "npu" else None
    longest = min(frame.outline.anatomy.context, DEFAULT_CONTEXT, npu.max_context if npu and npu.max_context else 10**9)
    return frame.whole_steps(longest) or longest


def _choose_context(
    frame: _Frame,
    planned: WeightsPlan,
    asked: int | None,
    caches: tuple[CacheFormat, ...],
    notes: list[str],
) -> tuple[int, CacheFormat]:
    """The asked or default context with the best cache that fits; a shorter one, unless asked, with the smallest."""
    default = _default_context(frame)
    if asked is not None:
        _check_context(frame, asked, default)
    context = asked or default
    needed = partial(_needed, frame, planned)
    fitting = next((cache for cache in caches if needed(context, cache) <= frame.budget_bytes), None)
    cache = fitting or caches[-1]
    if cache != caches[0]:
        notes.append(
            f"keys and values as {cache.value} instead of {caches[0].value}, so that they fit beside the weights"
        )
    if asked or fitting:
        return context, cache
    shorter = next((length for length in _halved(frame, context) if needed(length, cache) <= frame.budget_bytes), None)
    if shorter:
        notes.append(f"context {shorter} instead of {default}, so that the cache fits beside the weights")
    return shorter or context, cache


def _halved(frame: _Frame, context: int) -> Iterator[int]:
    while context // 2 >= LEAST_CONTEXT:
        context = frame.whole_steps(context // 2)
        yield context


def _check_context(frame: _Frame, asked: int, default: int) -> None:
    longest, step = frame.outline.anatomy.context, frame.efficiency.context_multiple
    if not 1 <= asked <= longest:
        raise PlanError(
            f"a context of {asked} is not possible: the model has 1 to {longest}", hint=f"use --context {default}"
        )
    if asked % step:
        raise PlanError(
            f"a context of {asked} is not possible: {frame.format} programs take multiples of {step}",
            hint=f"use --context {frame.whole_steps(asked) or step}",
        )


def _needed(frame: _Frame, planned: WeightsPlan, context: int, cache: CacheFormat) -> int:
    return frame.memory(planned, context, cache).total_bytes
