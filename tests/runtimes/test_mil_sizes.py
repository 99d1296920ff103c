"""Programs that ask for more memory than they say, or than there should be, are refused before they get it."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekit.errors import GenerationError
from edgekit.runtimes.mil_evaluator import MilFunction
from edgekit.runtimes.mil_program import Function, Operation, Signature
from edgekit.runtimes.mil_sizes import LARGEST_RESULT
from edgekit.runtimes.mil_types import TensorType

LENGTH = 1 << 16  # a few of these are small; LENGTH * LENGTH elements are 16 GB
COLUMN, ROW = np.zeros((LENGTH, 1), np.float32), np.zeros((1, LENGTH), np.float32)
PLACES = np.zeros(LENGTH, np.int32)
MOST_BYTES = 10 << 20
HOSTILE: dict[str, dict[str, Any]] = {
    "fill": {"shape": np.array([LENGTH, LENGTH], np.int32), "value": np.float32(1)},
    "range_1d": {"start": np.int32(0), "end": np.int32(2**31 - 1), "step": np.int32(1)},
    "tile": {"x": ROW, "reps": np.array([LENGTH, 1], np.int32)},
    "pad": {"x": ROW, "pad": np.array([0, LENGTH, 0, 0], np.int32)},
    "add": {"x": COLUMN, "y": ROW},
    "less": {"x": COLUMN, "y": ROW},
    "select": {"cond": COLUMN > 0, "a": ROW, "b": ROW},
    "clip": {"x": COLUMN, "alpha": ROW, "beta": ROW},
    "rsqrt": {"x": COLUMN, "epsilon": ROW},
    "layer_norm": {"x": COLUMN, "axes": np.array([1], np.int32), "epsilon": ROW},
    "gather": {"x": ROW, "indices": PLACES, "axis": np.int32(0)},
    "gather_along_axis": {"x": ROW[:, None], "indices": PLACES[:, None, None].copy(), "axis": np.int32(1)},
    "linear": {"x": COLUMN, "weight": COLUMN},
    "matmul": {"x": COLUMN, "y": ROW},
    "scaled_dot_product_attention": {"query": COLUMN[None], "key": COLUMN[None], "value": COLUMN[None]},
    "concat": {"values": [ROW[0]] * LENGTH, "axis": np.int32(0)},
    "stack": {"values": [ROW[0]] * LENGTH, "axis": np.int32(0)},
}


def program(kind: str, arguments: dict[str, Any], declared: TensorType) -> MilFunction:
    """One operator of constants."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in arguments.items()}
    names = {key: tuple(f"{key}{index}" for index in range(len(values))) for key, values in lists.items()}
    constants = {
        name: np.asarray(value) for key, values in lists.items() for name, value in zip(names[key], values, strict=True)
    }
    operation = Operation(kind, kind, names, (("out", declared),))
    return MilFunction(Function("main", Signature({}, {}, {"out": declared}), (operation,), constants))


def run(function: MilFunction) -> NDArray[Any]:
    """Its result; it must not have taken much memory on the way."""
    tracemalloc.start()
    try:
        return function({}, {})["out"]
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_BYTES


@pytest.mark.parametrize("shape", [(8,), (-1,), (LENGTH, LENGTH)], ids=["less", "unknown", "as much"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_huge_result_is_refused_before_it_takes_memory(kind: str, shape: tuple[int, ...]) -> None:
    function = program(kind, HOSTILE[kind], TensorType("float32", shape))
    with pytest.raises(GenerationError, match=rf"\({kind}\) can't be computed: .* elements"):
        run(function)


def test_attention_of_few_results_may_not_have_huge_scores() -> None:
    few = {"query": COLUMN[None], "key": COLUMN[None], "value": np.zeros((1, LENGTH, 1), np.float32)}
    function = program("scaled_dot_product_attention", few, TensorType("float32", (1, LENGTH, 1)))
    with pytest.raises(GenerationError, match=f"are more than the {LARGEST_RESULT:,}"):
        run(function)


@pytest.mark.parametrize("shape", [(4, 6), (-1, 6)])
def test_result_of_the_declared_size_is_computed(shape: tuple[int, ...]) -> None:
    arguments = {"shape": np.array([4, 6], np.int32), "value": np.float32(2)}
    np.testing.assert_array_equal(run(program("fill", arguments, TensorType("float32", shape))), np.full((4, 6), 2))


LARGE = TensorType("float32", (1 << 14,))  # 64 KiB


def chain(count: int, kept: int) -> MilFunction:
    """Adds 1 so many times, and at the end adds up as many of the last results, which were all needed until then."""
    constants: dict[str, NDArray[Any] | str] = {"one": np.array(1, np.float32), "x0": np.zeros(LARGE.shape, np.float32)}
    steps = [
        Operation("add", f"x{n + 1}", {"x": (f"x{n}",), "y": ("one",)}, ((f"x{n + 1}", LARGE),)) for n in range(count)
    ]
    names = [f"x{count - n}" for n in range(kept)]
    sums = [names[0], *(f"s{n}" for n in range(1, kept))]
    steps += [
        Operation("add", sums[n], {"x": (sums[n - 1],), "y": (names[n],)}, ((sums[n], LARGE),)) for n in range(1, kept)
    ]
    return MilFunction(Function("main", Signature({}, {}, {sums[-1]: LARGE}), tuple(steps), constants))


def test_results_that_are_needed_at_once_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.runtimes.mil_sizes.LARGEST_LIVE_BYTES", 10 * LARGE.count * 4)
    many = chain(100, kept=3)
    (result,) = many({}, {}).values()
    np.testing.assert_array_equal(result, 100 + 99 + 98)
    with pytest.raises(GenerationError, match=r"x11 \(add\) can't be computed: with .* bytes at once it needs more"):
        chain(100, kept=100)({}, {})


def test_views_of_a_buffer_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.runtimes.mil_sizes.LARGEST_LIVE_BYTES", 3 * LARGE.count * 4)
    constants: dict[str, NDArray[Any] | str] = {
        "one": np.array(1, np.float32),
        "x": np.zeros(LARGE.shape, np.float32),
        "shape": np.array([2, -1], np.int32),
    }
    halves = TensorType("float32", (2, LARGE.count // 2))
    steps = [Operation("add", "y", {"x": ("x",), "y": ("one",)}, (("y", LARGE),))]
    views = [f"v{n}" for n in range(8)]
    steps += [Operation("reshape", name, {"x": ("y",), "shape": ("shape",)}, ((name, halves),)) for name in views]
    outputs = dict.fromkeys(views, halves)
    found = MilFunction(Function("main", Signature({}, {}, outputs), tuple(steps), constants))({}, {})
    assert found.keys() == set(views)
