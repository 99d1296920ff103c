"""Plan: every decision for one model on one device, and why. Pure: it sees shapes, never weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from edgekit.capability import CAPABILITIES
from edgekit.errors import PlanError
from edgekit.format_choice import check_growth, check_size, choose_format
from edgekit.memory_plan import MemoryPlan
from edgekit.outline import Outline, outline_of
from edgekit.plan_frame import Frame
from edgekit.quant import CacheFormat, QuantScheme, load_scheme
from edgekit.runtime_options import RuntimeOptions
from edgekit.scheme_choice import choose_scheme
from edgekit.source import Source
from edgekit.speed_plan import SpeedPlan
from edgekit.target import Target
from edgekit.weight_plan import WeightPlan, WeightsPlan, calibrated, plan_weights, scaled, with_own_head

__all__ = [
    "INT8_LEVEL",
    "LEAST_CONTEXT",
    "MemoryPlan",
    "Plan",
    "SpeedPlan",
    "WeightPlan",
    "make_plan",
]

INT8_LEVEL = 4  # the accuracy_level at which products are computed in int8
LEAST_CONTEXT = 512  # no shorter one is chosen unasked


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
        ranges = CAPABILITIES[self.format].quantized_activations or self.cache is CacheFormat.INT8
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
        format: One that the target takes; None takes its first one that can be converted to.
        cache: How keys and values are kept; None takes the format's first one, or what fits.
        budget_bytes: What the model may use; None takes what an app may use on the target.

    Raises:
        PlanError: The context is impossible.
        UnsupportedError: The format or the quantization is not known, they do not go together, the target does not take
            the format, or the format's programs can't hold the weights.
    """
    outline = source if isinstance(source, Outline) else outline_of(source)
    notes = [*([outline.obstacle] if outline.obstacle else []), *outline.notes]
    asked = quant if isinstance(quant, QuantScheme) else load_scheme(quant) if quant != "auto" else None
    chosen_format = choose_format(outline, target, asked, format, notes)
    budget = budget_bytes or target.memory.app_bytes
    frame = Frame(with_own_head(outline, chosen_format), target, chosen_format, budget)
    scheme = choose_scheme(frame, asked, notes)
    planned = plan_weights(frame.outline, scheme, frame.format)
    notes.extend(planned.notes)
    chosen_context, chosen_cache = _choose_context(frame, planned, context, frame.caches(scheme, cache), notes)
    check_growth(frame, chosen_context)
    return _settled(frame, scheme, planned, chosen_context, chosen_cache, notes)


def _settled(
    frame: Frame, scheme: QuantScheme, planned: WeightsPlan, context: int, cache: CacheFormat, notes: list[str]
) -> Plan:
    """The plan, with its sums."""
    target, memory = frame.target, frame.memory(planned, context, cache)
    check_size(frame, scheme, memory.weights_bytes)
    fits: Literal["yes", "no"] = "yes" if memory.total_bytes <= memory.budget_bytes else "no"
    if fits == "no":
        notes.append(
            f"needs {memory.total_bytes / 1e6:,.0f} MB, an app on {target.id} may use {memory.budget_bytes / 1e6:,.0f} MB"
        )
    return Plan(
        target=target.id,
        format=frame.format,
        scheme=scheme,
        context=context,
        cache=cache,
        provider=target.npu.provider if target.npu and frame.efficiency.unit == "npu" else "",
        runtime=target.options(frame.format),
        accuracy_level=INT8_LEVEL if scheme.quantized and frame.int8_activations else 0,
        weights=planned.weights,
        memory=memory,
        speed=frame.speed(planned, context, cache),
        fits=fits,
        notes=tuple(notes),
    )


def _choose_context(
    frame: Frame,
    planned: WeightsPlan,
    asked: int | None,
    caches: tuple[CacheFormat, ...],
    notes: list[str],
) -> tuple[int, CacheFormat]:
    """The asked or default context with the best cache that fits; a shorter one, unless asked, with the smallest."""
    default = frame.default_context
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


def _halved(frame: Frame, context: int) -> Iterator[int]:
    while context // 2 >= LEAST_CONTEXT:
        context = frame.whole_steps(context // 2)
        yield context


def _check_context(frame: Frame, asked: int, default: int) -> None:
    longest, step = frame.outline.anatomy.context, frame.capability.context_multiple
    if not 1 <= asked <= longest:
        raise PlanError(
            f"a context of {asked} is not possible: the model has 1 to {longest}", hint=f"use --context {default}"
        )
    if asked % step:
        raise PlanError(
            f"a context of {asked} is not possible: {frame.format} programs take multiples of {step}",
            hint=f"use --context {frame.whole_steps(asked) or step}",
        )


def _needed(frame: Frame, planned: WeightsPlan, context: int, cache: CacheFormat) -> int:
    return frame.memory(planned, context, cache).total_bytes
