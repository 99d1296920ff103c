"""The choice of formats under a budget, against trying every combination."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit import allocation
from edgekit.allocation import Option, frontier

QUICK = settings(max_examples=150, deadline=None, derandomize=True)
options = st.lists(
    st.builds(Option, st.integers(1, 60), st.floats(0, 10, allow_subnormal=False)), min_size=1, max_size=4
)
problems = st.lists(options, min_size=1, max_size=4)


def combinations(items: list[list[Option]]) -> list[tuple[int, float]]:
    return [
        (sum(option.size_bytes for option in chosen), sum(option.cost for option in chosen))
        for chosen in product(*items)
    ]


@QUICK
@given(items=problems, budget=st.integers(0, 250))
def test_no_combination_within_the_budget_costs_less(items: list[list[Option]], budget: int) -> None:
    solved = frontier(items)
    choice = solved.within(budget)
    affordable = [cost for size, cost in combinations(items) if size <= budget]
    assert (choice is None) == (not affordable)
    if choice is not None:
        assert solved.size_bytes(choice) <= budget
        assert solved.cost(choice) == pytest.approx(min(affordable))


@QUICK
@given(items=problems, bound=st.floats(0, 40))
def test_no_smaller_combination_reaches_the_cost(items: list[list[Option]], bound: float) -> None:
    solved = frontier(items)
    choice = solved.reaching(bound)
    good = [size for size, cost in combinations(items) if cost <= bound]
    if choice is None:  # sums in another order may miss the bound by their last digit
        assert all(cost > bound * (1 - 1e-12) for _, cost in combinations(items))
    else:
        assert solved.cost(choice) <= bound * (1 + 1e-12)
        assert not good or solved.size_bytes(choice) <= min(good)


@QUICK
@given(items=problems, budget=st.integers(0, 250))
def test_coarse_units_keep_the_budget_and_lose_at_most_a_unit_of_each_item(
    items: list[list[Option]], budget: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "UNITS", 7)
        solved = frontier(items)
    choice = solved.within(budget)
    if choice is None:
        assert budget < solved.smallest_bytes
        return
    assert solved.size_bytes(choice) <= budget
    lost = solved.unit_bytes * len(items)
    fewer = [cost for size, cost in combinations(items) if size <= budget - lost]
    assert not fewer or solved.cost(choice) <= min(fewer) * (1 + 1e-12)


def test_more_bytes_never_cost_more() -> None:
    items = [[Option(10 * bits, 1 / bits**tensor) for bits in (2, 4, 8)] for tensor in range(1, 6)]
    solved = frontier(items)
    costs = [solved.cost(choice) for budget in range(100, 401, 5) if (choice := solved.within(budget))]
    assert costs == sorted(costs, reverse=True)
    assert len(costs) == 61
