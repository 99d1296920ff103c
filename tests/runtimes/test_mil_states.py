"""States of the MIL evaluator: writing in place never shows, whatever reads and writes come in whatever order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.runtimes.mil_evaluator import MilFunction, new_states
from edgekit.runtimes.mil_program import Function, Operation, Signature
from edgekit.runtimes.mil_types import TensorType

ROWS, COLUMNS = 3, 2
WHOLE, ROW = TensorType("float32", (ROWS, COLUMNS)), TensorType("float32", (1, COLUMNS))
STATES = ("memory", "other")
BOUNDS = {f"{row}": np.array([row, 0], np.int32) for row in range(ROWS)} | {
    f"{row}+": np.array([row + 1, COLUMNS], np.int32) for row in range(ROWS)
}


@dataclass
class Writer:
    """Writes a program, and keeps for each value what an evaluator that copies everything would have."""

    states: dict[str, NDArray[np.float32]] = field(
        default_factory=lambda: {name: np.zeros(WHOLE.shape, np.float32) for name in STATES}
    )
    operations: list[Operation] = field(default_factory=list)
    wholes: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    rows: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def add(self, kind: str, inputs: Mapping[str, str], result: NDArray[np.float32] | None = None) -> None:
        name = f"v{len(self.operations)}"
        named = {key: (value,) for key, value in inputs.items()}
        outputs = () if result is None else ((name, WHOLE if result.shape == WHOLE.shape else ROW),)
        self.operations.append(Operation(kind, name, named, outputs))
        if result is not None:
            (self.wholes if result.shape == WHOLE.shape else self.rows)[name] = result.copy()


@st.composite
def programs(draw: st.DrawFn) -> Writer:
    writer = Writer(rows={"x": np.array([[5.0, 7.0]], np.float32)})
    for _ in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(["read", "read", "write", "update", "update", "view", "reshape", "add"]))
        state, row = draw(st.sampled_from(STATES)), draw(st.integers(0, ROWS - 1))
        place = {"begin": f"{row}", "end": f"{row}+"}
        if kind == "read":
            writer.add("read_state", {"input": state}, writer.states[state])
        if kind == "read" or not writer.wholes:
            continue
        whole, other = (draw(st.sampled_from(sorted(writer.wholes))) for _ in range(2))
        value = writer.wholes[whole]
        if kind == "write":
            writer.add("write_state", {"input": state, "data": whole})
            writer.states[state] = value.copy()
        elif kind == "update":
            source = draw(st.sampled_from(sorted(writer.rows)))
            changed = value.copy()
            changed[row] = writer.rows[source][0]
            writer.add("slice_update", {"x": whole, "update": source, **place}, changed)
        elif kind == "view":
            writer.add("slice_by_index", {"x": whole, **place}, value[row : row + 1])
        elif kind == "reshape":
            writer.add("reshape", {"x": whole, "shape": "shape"}, value)
        else:
            writer.add("add", {"x": whole, "y": other}, value + writer.wholes[other])
    return writer


@settings(max_examples=400, deadline=None)
@given(programs(), st.data())
def test_states_are_as_if_everything_were_copied(writer: Writer, data: st.DataObject) -> None:
    values = {**writer.wholes, **writer.rows}
    returned = data.draw(st.lists(st.sampled_from(sorted(values)), unique=True))
    constants = {**BOUNDS, "shape": np.array(WHOLE.shape, np.int32)}
    outputs = {name: WHOLE if name in writer.wholes else ROW for name in returned}
    signature = Signature({"x": ROW}, dict.fromkeys(STATES, WHOLE), outputs)
    function = MilFunction(Function("main", signature, tuple(writer.operations), constants))
    states = new_states(signature.states)
    found = function({"x": writer.rows["x"]}, states)
    for name in returned:
        np.testing.assert_array_equal(found[name], values[name])
    for name in STATES:
        np.testing.assert_array_equal(states[name], writer.states[name])


def test_a_cache_is_written_in_place() -> None:
    """The pattern of every decoder: read, update, write, read again and look at a part."""
    place = {"begin": ("1",), "end": ("1+",)}
    operations = (
        Operation("read_state", "a", {"input": ("memory",)}, (("a", WHOLE),)),
        Operation("slice_update", "b", {"x": ("a",), "update": ("x",), **place}, (("b", WHOLE),)),
        Operation("write_state", "w", {"input": ("memory",), "data": ("b",)}, ()),
        Operation("read_state", "c", {"input": ("memory",)}, (("c", WHOLE),)),
        Operation("slice_by_index", "d", {"x": ("c",), **place}, (("d", ROW),)),
    )
    signature = Signature({"x": ROW}, {"memory": WHOLE}, {"d": ROW})
    function = MilFunction(Function("main", signature, operations, BOUNDS))
    states, x = new_states(signature.states), np.ones(ROW.shape, np.float32)
    before = states["memory"]
    np.testing.assert_array_equal(function({"x": x}, states)["d"], x)
    assert states["memory"] is before
