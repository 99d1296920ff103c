"""Frame: what is settled before the rest of a plan, and the sums that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.capability import CAPABILITIES, Capability
from edgekit.efficiency import EFFICIENCY, Efficiency
from edgekit.errors import UnsupportedError
from edgekit.memory_plan import MemoryPlan, plan_memory
from edgekit.outline import Outline
from edgekit.quant import CacheFormat, QuantScheme
from edgekit.speed_plan import SpeedPlan, plan_speed
from edgekit.target import Target
from edgekit.weight_plan import WeightsPlan

__all__ = ["DEFAULT_CONTEXT", "Frame"]

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Frame:
    """What is settled before the scheme: the model, the device, the format and the budget."""

    outline: Outline
    target: Target
    format: str
    budget_bytes: int

    @property
    def efficiency(self) -> Efficiency:
        """Of the format's runtime."""
        return EFFICIENCY[self.format]

    @property
    def capability(self) -> Capability:
        """Of the format's programs."""
        return CAPABILITIES[self.format]

    @property
    def int8_activations(self) -> bool:
        """What is multiplied with quantized weights is rounded to 8 bits first."""
        asked = self.capability.int8_activations
        return asked == "always" or (asked == "target" and self.target.cpu.int8_activations)

    @property
    def default_context(self) -> int:
        """The smaller of the model's own and 4,096, as far as an NPU's tools take it."""
        npu = self.target.npu if self.efficiency.unit == "npu" else None
        limit = npu.max_context if npu and npu.max_context else DEFAULT_CONTEXT
        longest = min(self.outline.anatomy.context, DEFAULT_CONTEXT, limit)
        return self.whole_steps(longest) or longest

    def whole_steps(self, context: int) -> int:
        """The longest context up to this one that the format's programs can have; 0 where there is none."""
        return context // self.capability.context_multiple * self.capability.context_multiple

    def memory(self, planned: WeightsPlan, context: int, cache: CacheFormat) -> MemoryPlan:
        """The memory sums."""
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
        """The speed sums."""
        return plan_speed(
            self.outline.anatomy, planned.groups, self.target, context=context, cache=cache, efficiency=self.efficiency
        )

    def caches(self, scheme: QuantScheme, asked: CacheFormat | None) -> tuple[CacheFormat, ...]:
        """What keys and values may be kept as, the best first.

        Raises:
            UnsupportedError: The asked one can't be.
        """
        # A program that computes in halves has nothing wider to keep.
        halves = scheme.activation_bits == 16 or (self.capability.computes_in_halves and scheme.quantized)
        possible = tuple(cache for cache in self.capability.caches if not (halves and cache is CacheFormat.FLOAT32))
        if asked is None:
            return possible
        if asked not in possible:
            raise UnsupportedError(
                f"{self.format} programs of {scheme.name} can't keep keys and values as {asked.value}",
                hint=f"use {', '.join(kind.value for kind in possible)}",
            )
        return (asked,)
