"""Finding a scheme for a budget: a format for each matrix, of the best quality within a size, or the smallest of a quality.

Costs are measured on texts that the model writes (`registry.MEASURE_COSTS`), the choice among them is solved for
(`allocation.frontier`), and what is chosen is a scheme like any other: data, written into the bundle as a recipe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgekit.allocation import Frontier, Option, frontier
from edgekit.calibration import calibration_texts
from edgekit.errors import PlanError, UnsupportedError
from edgekit.outline import outline_of
from edgekit.plan import INT8_LEVEL, Plan, make_plan
from edgekit.progress import ProgressFn
from edgekit.quant import Override, QuantScheme, WeightFormat
from edgekit.registry import MEASURE_COSTS, PROGRAM_BYTES, load_attribute
from edgekit.source import Source
from edgekit.target import Target
from edgekit.weight_plan import WeightPlan, plan_weights

__all__ = ["FORMATS", "SEARCHED", "Budget", "Candidates", "SchemeSearch", "choose", "measure", "possible_plans"]

# What is chosen among. 2 and 8 bits are fast where the device multiplies in int8; larger blocks are faster than smaller ones.
FORMATS = tuple(
    WeightFormat(bits, size, symmetric) for bits in (2, 4, 8) for size in (32, 64, 128) for symmetric in (True, False)
)
TRIES, MARGIN = 3, 1.05  # what a first try cost more than asked, and a little more, is taken off for the next
# Where the search starts from.
SEARCHED = QuantScheme("searched", WeightFormat(4, 64), rounding="gptq", scaling="awq")


@dataclass(frozen=True, slots=True)
class Budget:
    """What a scheme may take: bytes of a program's files, nats of mean KL divergence, or both; None is no bound.

    Raises:
        PlanError: There is no bound, or one that is not over zero.
    """

    max_bytes: int | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if self.max_bytes is None and self.max_kl is None:
            raise PlanError("a budget needs a size or a KL divergence")
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise PlanError(f"a size of {self.max_bytes:,} bytes is not possible")
        if self.max_kl is not None and not self.max_kl > 0:
            raise PlanError(f"a KL divergence of {self.max_kl} is not possible: it must be over 0")


@dataclass(frozen=True, slots=True)
class Candidates:
    """How each matrix can be kept, and what that is expected to cost.

    Attributes:
        plans: By role.
        frontier: The best choices among them, items in the order of `plans`; sizes are those of the weights alone.
        layers: Of the model.
    """

    plans: Mapping[str, tuple[WeightPlan, ...]]
    frontier: Frontier
    layers: int

    def scheme(self, choice: Sequence[int]) -> QuantScheme:
        """A choice as a scheme: the most frequent format, and what departs from it by role and layer."""
        chosen = {role: plans[index].format for (role, plans), index in zip(self.plans.items(), choice, strict=True)}
        (common, _), *_ = Counter(chosen.values()).most_common(1)
        groups: dict[tuple[str, WeightFormat], list[int]] = {}
        for role, form in chosen.items():
            if form != common:
                layer, kind = _layer_and_kind(role)
                groups.setdefault((kind, form), []).extend([] if layer is None else [layer])
        overrides = tuple(
            Override((kind,), form, tuple(layers) if layers else "all") for (kind, form), layers in groups.items()
        )
        return replace(SEARCHED, format=common, overrides=overrides, layer_count=self.layers)


def _layer_and_kind(role: str) -> tuple[int | None, str]:
    parts = role.split(".")
    return (int(parts[1]), parts[2]) if len(parts) == 3 else (None, role)


def possible_plans(source: Source) -> dict[str, tuple[WeightPlan, ...]]:
    """By role, all ways of keeping each matrix that differ, smallest first."""
    outline = outline_of(source)
    found: dict[str, set[WeightPlan]] = {}
    for form in FORMATS:
        for role, plan in plan_weights(outline, QuantScheme("candidate", form)).weights.items():
            if plan.form_is_blocks:
                found.setdefault(role, set()).add(plan)
    return {role: tuple(sorted(plans, key=_by_size)) for role, plans in found.items()}


def _by_size(plan: WeightPlan) -> tuple[int, int, int]:
    return plan.size_bytes, plan.format.bits, plan.format.block_size


def measure(
    source: Source,
    texts: Sequence[Sequence[int]],
    place: Path,
    *,
    int8_activations: bool,
    on_progress: ProgressFn | None = None,
) -> Candidates:
    """Measure what each way of keeping each matrix costs, and solve for every size.

    Args:
        texts: Token ids that the model writes.
        place: A folder where layers are written aside.
        int8_activations: Whether products are computed in int8.

    Raises:
        SourceError, ConversionError: A layer can't be read or does not run.
    """
    plans = possible_plans(source)
    formats = {role: tuple(plan.format for plan in some) for role, some in plans.items()}
    costs = load_attribute(MEASURE_COSTS)(
        source, texts, place, formats, SEARCHED.rounding, SEARCHED.scaling,
        int8_activations=int8_activations, on_progress=on_progress,
    )  # fmt: skip
    items = [
        [Option(plan.size_bytes, 0.0 if plan.carried else cost) for plan, cost in zip(some, costs[role], strict=True)]
        for role, some in plans.items()
    ]
    return Candidates(plans, frontier(items), len(source.config.layers))


def choose(candidates: Candidates, budget: Budget, other_bytes: int, *, correction: float = 1.0) -> tuple[int, ...]:
    """The choice of least cost within the size, or, where a divergence is asked for, the smallest that keeps that.

    Args:
        other_bytes: Of the program's files, besides these weights.
        correction: What earlier choices have cost, divided by what was expected.

    Raises:
        PlanError: Nothing is as small, or as good, or both at once.
    """
    solved = candidates.frontier
    within = solved.within(budget.max_bytes - other_bytes) if budget.max_bytes is not None else None
    if budget.max_bytes is not None and within is None:
        raise _too_small(budget.max_bytes, solved.smallest_bytes + other_bytes)
    if budget.max_kl is None:
        return within or ()
    choice = solved.reaching(budget.max_kl / correction)
    if choice is None:
        least = float(solved.costs[-1]) * correction
        raise PlanError(
            f"no choice of formats is expected to reach a KL divergence of {budget.max_kl:.3g}; the least is {least:.2g}",
            hint=f"use --max-kl {least * 1.1:.2g}, or --quant fp16 or fp32",
        )
    needed = solved.size_bytes(choice) + other_bytes
    if budget.max_bytes is not None and within and needed > budget.max_bytes:
        raise PlanError(
            f"a KL divergence of {budget.max_kl:.3g} takes about {_megabytes(needed)} MB, "
            f"more than {_megabytes(budget.max_bytes)} MB",
            hint=f"use --max-size {_megabytes(needed + 100_000)}MB, or --max-kl {solved.cost(within) * correction * 1.05:.2g}",
        )
    return choice


def _too_small(max_bytes: int, smallest_bytes: int) -> PlanError:
    return PlanError(
        f"{_megabytes(max_bytes)} MB are too few: the smallest formats take {_megabytes(smallest_bytes)} MB",
        hint=f"use --max-size {_megabytes(smallest_bytes + 100_000)}MB or more; so near to the smallest, expect poor text",
    )


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f}"


class SchemeSearch:
    """The search of one conversion: plans that should keep a budget, the next one made after a look at what the last one cost.

    Attributes:
        texts: Token ids that the model wrote: costs are measured on them, and weights rounded by them.
    """

    def __init__(
        self,
        source: Source,
        target: Target,
        start: Plan,
        budget: Budget,
        bundle_directory: Path,
        *,
        on_progress: ProgressFn | None = None,
    ) -> None:
        """Measure costs.

        Args:
            start: The plan of `SEARCHED`; its format and context stay.

        Raises:
            PlanError: The size is too small for any scheme; told before anything is measured.
            UnsupportedError: Programs of this format are not written to a size.
            SourceError, ConversionError, BundleError: The model's texts or layers can't be computed.
        """
        if start.format not in PROGRAM_BYTES:
            raise UnsupportedError(
                f"{start.format} programs are not written to a size or quality", hint=f"use {', '.join(PROGRAM_BYTES)}"
            )
        self._source, self._target, self._start, self._budget = source, target, start, budget
        plans = possible_plans(source)
        smallest = sum(some[0].size_bytes for some in plans.values()) + self._other_bytes(start, plans)
        if budget.max_bytes is not None and smallest > budget.max_bytes:
            raise _too_small(budget.max_bytes, smallest)
        self.texts = calibration_texts(source, start, bundle_directory, on_progress=on_progress)
        self._candidates = measure(
            source, self.texts, bundle_directory.parent,
            int8_activations=start.accuracy_level == INT8_LEVEL, on_progress=on_progress,
        )  # fmt: skip
        self._correction = 1.0

    def tries(self) -> Iterator[Plan]:
        """Plans that are expected to keep the budget.

        Raises:
            PlanError: No scheme keeps it, or none was found in the last try.
        """
        for _ in range(TRIES):
            yield self._plan()
        raise PlanError(
            f"a mean KL divergence of {self._budget.max_kl} was not kept in {TRIES} tries",
            hint=f"use --max-kl {(self._budget.max_kl or 0) * self._correction:.2g}",
        )

    def keeps(self, kl_mean: float | None) -> bool:
        """Whether a try keeps the divergence that was asked for; None: it was not measured, and is believed."""
        if kl_mean is None or self._budget.max_kl is None or kl_mean <= self._budget.max_kl:
            return True
        self._correction *= MARGIN * kl_mean / self._budget.max_kl
        return False

    def _plan(self) -> Plan:
        other_bytes = 0
        while True:  # arrays are aligned, so that a choice may take some more bytes than its weights
            choice = choose(self._candidates, self._budget, other_bytes, correction=self._correction)
            plan = make_plan(
                self._source,
                self._target,
                quant=self._candidates.scheme(choice),
                context=self._start.context,
                format=self._start.format,
                cache=self._start.cache,
            )
            found = self._other_bytes(plan, self._candidates.plans)
            if found <= other_bytes:
                break
            other_bytes = found
        cost, size = self._candidates.frontier.cost(choice) * self._correction, self._program_bytes(plan)
        note = f"searched: {_megabytes(size)} MB, expected to cost a mean KL divergence of {cost:.2g}"
        return replace(plan, notes=(*plan.notes, note))

    def _other_bytes(self, plan: Plan, roles: Iterable[str]) -> int:
        return self._program_bytes(plan) - sum(plan.weights[role].size_bytes for role in roles)

    def _program_bytes(self, plan: Plan) -> int:
        size_bytes: int = load_attribute(PROGRAM_BYTES[plan.format])(self._source, plan)
        return size_bytes
