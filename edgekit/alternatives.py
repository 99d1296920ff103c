"""What would fit where a plan does not: another scheme, a shorter context, a larger device. And what keeps to given limits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from edgekit.capability import CAPABILITIES
from edgekit.errors import PlanError, UnsupportedError
from edgekit.format_choice import check_format
from edgekit.outline import Outline
from edgekit.plan import LEAST_CONTEXT, Plan, make_plan
from edgekit.quant import RECIPES, CacheFormat, QuantScheme, load_scheme
from edgekit.target import Target, list_targets

__all__ = ["Limits", "Request", "WouldFit", "plans_within", "rank", "what_would_fit"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a plan, as `make_plan` has it."""

    quant: str | QuantScheme = "auto"
    context: int | None = None
    format: str | None = None
    cache: CacheFormat | None = None
    budget_bytes: int | None = None

    def check(self) -> None:
        """Refuse a scheme or a format that is not known, before any model is looked at."""
        if isinstance(self.quant, str) and self.quant != "auto":
            load_scheme(self.quant)
        if self.format:
            check_format(self.format)

    def plan(self, outline: Outline, target: Target) -> Plan:
        """The plan for it; errors are `make_plan`'s."""
        return make_plan(
            outline,
            target,
            quant=self.quant,
            context=self.context,
            format=self.format,
            cache=self.cache,
            budget_bytes=self.budget_bytes,
        )


@dataclass(frozen=True, slots=True)
class WouldFit:
    """What would fit instead; None where nothing of the kind would.

    Attributes:
        scheme: The finest one that fits with the plan's context, and what it takes.
        smallest: The one that takes least, whether it fits or not.
        context: The longest with the plan's scheme.
        target: The smallest device on which the plan would fit as it is.
    """

    scheme: Plan | None
    smallest: Plan
    context: int | None
    target: str | None

    def hint(self) -> str:
        """In one line."""
        ways = []
        if self.scheme:
            ways.append(f"--quant {self.scheme.quant} takes {_megabytes(self.scheme)}")
        if self.context:
            ways.append(f"--context {self.context} fits")
        if self.target:
            ways.append(f"it fits on {self.target}")
        if not self.scheme:
            ways.append(f"the smallest scheme, {self.smallest.quant}, takes {_megabytes(self.smallest)}")
        return "; ".join(ways)

    def to_json(self) -> dict[str, object]:
        """As `plan --json` has it."""
        return {
            "quant": self.scheme.quant if self.scheme else None,
            "smallest_quant": self.smallest.quant,
            "smallest_total_bytes": self.smallest.memory.total_bytes,
            "context": self.context,
            "target": self.target,
        }


def what_would_fit(outline: Outline, target: Target, plan: Plan) -> WouldFit:
    """What to change in a plan that does not fit."""
    plans = _plans_by_size(outline, target, plan)
    fitting = [found for found in plans if found.fits == "yes"]
    return WouldFit(
        scheme=fitting[-1] if fitting else None,
        smallest=plans[0],
        context=_longest_context(outline, target, plan),
        target=_next_device(outline, target, plan),
    )


def too_large_error(outline: Outline, target: Target, plan: Plan) -> PlanError:
    """The refusal of a plan that does not fit: what it needs, what there is, and what would fit."""
    needed, budget = (f"{size / 1e6:,.0f} MB" for size in (plan.memory.total_bytes, plan.memory.budget_bytes))
    return PlanError(
        f"{outline.name} as {plan.quant} with a context of {plan.context} needs {needed}, "
        f"an app on {target.id} may use {budget}",
        hint=f"{what_would_fit(outline, target, plan).hint()}; or --allow-too-large",
    )


def _plans_by_size(outline: Outline, target: Target, plan: Plan) -> list[Plan]:
    """One plan for each recipe that the format takes, with this context; the smallest first."""
    asked = Request(context=plan.context, format=plan.format, budget_bytes=plan.memory.budget_bytes)
    plans = [replace(asked, quant=name).plan(outline, target) for name in _recipes(outline, plan.format)]
    return sorted(plans, key=lambda found: found.memory.total_bytes)


def _recipes(outline: Outline, format: str) -> tuple[str, ...]:
    """What a format can be written with; to keep blocks is only for checkpoints that have them."""
    possible = (name for name, scheme in RECIPES.items() if outline.quantized or not scheme.keep)
    return CAPABILITIES[format].schemes or tuple(possible)


def _longest_context(outline: Outline, target: Target, plan: Plan) -> int | None:
    """By halving the gap: the sums only grow with the context."""
    asked = Request(plan.scheme, format=plan.format, budget_bytes=plan.memory.budget_bytes)
    step = CAPABILITIES[plan.format].context_multiple
    low, high = 0, plan.context // step
    while low < high:
        middle = (low + high + 1) // 2
        fits = replace(asked, context=middle * step).plan(outline, target).fits == "yes"
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * step or None


def _next_device(outline: Outline, target: Target, plan: Plan) -> str | None:
    larger = [device for device in list_targets() if device.memory.app_bytes > target.memory.app_bytes]
    for device in sorted(larger, key=lambda device: (device.memory.app_bytes, device.id)):
        try:
            found = Request(plan.scheme, plan.context, plan.format).plan(outline, device)
        except UnsupportedError:
            continue
        if found.fits == "yes":
            return device.id
    return None


def _megabytes(plan: Plan) -> str:
    return f"{plan.memory.total_bytes / 1e6:,.0f} MB"


def rank(plans: Iterable[Plan]) -> list[Plan]:
    """What fits first, then what decodes faster."""
    return sorted(plans, key=lambda plan: (plan.fits != "yes", -plan.speed.decode_tokens_per_s, plan.target))


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan must keep to; None is no limit."""

    max_bytes: int | None = None
    min_tokens_per_s: float | None = None

    def budget_bytes(self, target: Target) -> int:
        """What the model may use on a device."""
        return min(self.max_bytes or target.memory.app_bytes, target.memory.app_bytes)

    def hold(self, plan: Plan) -> bool:
        """True where the plan fits and is fast enough."""
        return plan.fits == "yes" and plan.speed.decode_tokens_per_s >= (self.min_tokens_per_s or 0)


def plans_within(outline: Outline, target: Target, request: Request, limits: Limits) -> list[Plan]:
    """For each scheme (`auto`: each recipe) the plan with the longest context that keeps to the limits; the finest first."""
    asked = replace(request, budget_bytes=limits.budget_bytes(target))
    format = asked.plan(outline, target).format
    names = _recipes(outline, format) if request.quant == "auto" else (request.quant,)
    contexts = (
        [request.context]
        if request.context
        else _contexts(outline.anatomy.context, CAPABILITIES[format].context_multiple)
    )
    found = []
    for name in names:
        plans = (replace(asked, quant=name, context=context).plan(outline, target) for context in contexts)
        longest = next(filter(limits.hold, plans), None)
        if longest:
            found.append(longest)
    # Nothing is finer than the blocks that a checkpoint has.
    return sorted(found, key=lambda plan: (not plan.scheme.keep, -plan.memory.weights_bytes))


def _contexts(longest: int, step: int) -> list[int]:
    """The model's own context and each power of two below it, as far as they are multiples of `step`; the longest first."""
    longest = longest // step * step or longest
    powers = [1 << exponent for exponent in range(LEAST_CONTEXT.bit_length() - 1, longest.bit_length())]
    return sorted({longest, *(power for power in powers if power <= longest and power % step == 0)}, reverse=True)
