"""Spending bytes where they buy the most: one option for each item, at the least total cost within a budget.

The multiple-choice knapsack problem, by dynamic programming over sizes in whole units: exact for sizes that are multiples of the
unit; otherwise sizes are rounded up, so that a budget is kept, and up to a unit of each item may go unspent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Frontier", "Option", "frontier"]

UNITS = 1 << 14  # that the span between the smallest and the largest choice is cut into


@dataclass(frozen=True, slots=True)
class Option:
    """One way to keep an item: its size, and what it costs in quality."""

    size_bytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class Frontier:
    """The best choices at every size.

    Attributes:
        smallest_bytes: Of the smallest choice.
        unit_bytes: Sizes are told apart by this much.
        costs: float64 [units]: the least cost within `smallest_bytes` + that many units.
        chosen: uint8 [items, units]: each item's option in the best choice of this item and those before it.
        items: The options chosen among.
    """

    smallest_bytes: int
    unit_bytes: int
    costs: NDArray[np.float64]
    chosen: NDArray[np.uint8]
    items: tuple[tuple[Option, ...], ...]

    def within(self, budget_bytes: int) -> tuple[int, ...] | None:
        """The option of each item at the least total cost, of at most this size; None where nothing is as small."""
        units = (budget_bytes - self.smallest_bytes) // self.unit_bytes
        if units < 0:
            return None
        for more in range(len(self.items), 0, -1):  # sizes were rounded up: a choice of more units may yet be within
            if units + more < len(self.costs) and self.size_bytes(found := self._choice(units + more)) <= budget_bytes:
                return found
        return self._choice(min(units, len(self.costs) - 1))

    def reaching(self, cost: float) -> tuple[int, ...] | None:
        """The smallest choice of at most this cost; None where none costs as little."""
        import numpy as np

        # costs fall with size, so that the first that is low enough is found by bisection
        units = int(np.searchsorted(-self.costs, -cost))
        return self._choice(units) if units < len(self.costs) else None

    def size_bytes(self, choice: Sequence[int]) -> int:
        """Total size of a choice."""
        return sum(options[index].size_bytes for options, index in zip(self.items, choice, strict=True))

    def cost(self, choice: Sequence[int]) -> float:
        """Total cost of a choice."""
        return sum(options[index].cost for options, index in zip(self.items, choice, strict=True))

    def _choice(self, units: int) -> tuple[int, ...]:
        found = []
        for options, chosen in zip(reversed(self.items), reversed(self.chosen), strict=True):
            index = int(chosen[units])
            units -= _units(options, self.unit_bytes)[index]
            found.append(index)
        return tuple(reversed(found))


def frontier(items: Sequence[Sequence[Option]]) -> Frontier:
    """Solve for every size at once.

    Args:
        items: Each with one to 256 options.
    """
    import numpy as np

    smallest = sum(min(option.size_bytes for option in options) for options in items)
    largest = sum(max(option.size_bytes for option in options) for options in items)
    unit = max(-(-(largest - smallest) // UNITS), 1)
    count = sum(max(_units(options, unit)) for options in items) + 1
    costs, chosen = np.zeros(count), np.zeros((len(items), count), np.uint8)
    for number, options in enumerate(items):
        best = np.full(count, np.inf)
        for index, (option, units) in enumerate(zip(options, _units(options, unit), strict=True)):
            total = costs[: count - units] + option.cost
            better = total < best[units:]
            best[units:][better] = total[better]
            chosen[number, units:][better] = index
        costs = best
    return Frontier(smallest, unit, costs, chosen, tuple(map(tuple, items)))


def _units(options: Sequence[Option], unit_bytes: int) -> list[int]:
    """Size of each option over the smallest, in whole units."""
    smallest = min(option.size_bytes for option in options)
    return [-(-(option.size_bytes - smallest) // unit_bytes) for option in options]
