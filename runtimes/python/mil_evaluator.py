"""Executes an ML program's functions with numpy, operator by operator, as the device reads them from the package.

It is no Core ML: it computes what the program says, not as a given chip rounds it. Results are rounded where the program
declares float16 (see `mil_types`), and integers are what they are; shapes, indices and slices that do not fit are errors
where a device would read anything. Types and constants are checked when the program is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.errors import BundleError, GenerationError

from .mil_constants import DECODERS
from .mil_movers import MOVING
from .mil_operators import COMPUTING, Kernel
from .mil_package import BROKEN, Package
from .mil_program import Function, Operation, operator_kinds, read_functions
from .mil_sizes import LiveMemory, check_size
from .mil_types import HELD, ArrayLike, TensorType, round_to_half

__all__ = ["MilFunction", "load_functions", "new_states"]

_STATE_OPERATORS = ("read_state", "write_state")
_KNOWN = {"const", *DECODERS, *COMPUTING, *MOVING, *_STATE_OPERATORS}
States = dict[str, ArrayLike]


def load_functions(package: Package) -> dict[str, MilFunction]:
    """The functions of a package, ready to run.

    Raises:
        BundleError: An operator is not known (the error lists all of them), or the program is damaged.
    """
    unknown = sorted(operator_kinds(package) - _KNOWN)
    if unknown:
        raise BundleError(
            f"the MIL evaluator does not know the operators: {', '.join(kind[:40] for kind in unknown)}",
            hint="on macOS, Core ML itself runs the program",
        )
    return {name: MilFunction(function) for name, function in read_functions(package).items()}


def new_states(types: Mapping[str, TensorType]) -> States:
    """States of a new sequence: zeros, which take memory only where they are written to."""
    return {name: np.zeros(kind.shape, HELD[kind.dtype]) for name, kind in types.items()}


@dataclass(frozen=True, slots=True)
class _Step:
    """An operation, and what is known of it before it runs.

    Attributes:
        dead: Values that nothing needs any more after it.
        in_place: Of a `slice_update`: nothing sees that its x changes but the state's next `write_state`.
    """

    operation: Operation
    kernel: Kernel
    dead: frozenset[str]
    in_place: bool


class MilFunction:
    """A function that can be called."""

    def __init__(self, function: Function) -> None:
        self.name = function.name
        self.signature = function.signature
        self._constants = function.constants
        last_use = _last_uses(function)
        in_place = _updated_in_place(function, last_use)
        self._steps = [
            _Step(
                operation,
                _kernel(operation),
                frozenset(
                    name
                    for name in operation.names()
                    if last_use[name] == index and name not in function.signature.states
                ),
                index in in_place,
            )
            for index, operation in enumerate(function.operations)
        ]

    def __call__(self, inputs: Mapping[str, ArrayLike], states: States) -> dict[str, ArrayLike]:
        """Run it.

        Args:
            inputs: Arrays of the declared shapes and of types that hold the same numbers.
            states: From `new_states`; changed.

        Returns:
            The outputs by name, held as `mil_types` says; valid until the next call.

        Raises:
            GenerationError: An input does not fit, or an operator can't be computed.
        """
        values: dict[str, Any] = dict(self._constants)
        live = LiveMemory(values.values(), sum(state.nbytes for state in states.values()))
        for name, kind in self.signature.inputs.items():
            if name not in inputs or not kind.admits(inputs[name].shape):
                raise GenerationError(f"function {self.name} of the package takes {name} as {kind}")
            values[name] = _declared(inputs[name], kind, rounded=False)
            live.add(values[name])
        with np.errstate(all="ignore"):  # infinities and NaN are results
            for step in self._steps:
                _run(step, values, states, live, self.name)
        return {name: values[name] for name in self.signature.outputs}


def _run(step: _Step, values: dict[str, Any], states: States, live: LiveMemory, function: str) -> None:
    operation = step.operation
    try:
        if operation.kind == "read_state":
            results = [states[operation.inputs["input"][0]]]
        elif operation.kind == "write_state":
            _write(states, operation.inputs["input"][0], values[operation.inputs["data"][0]])
            results = []
        else:
            results = _computed(step, values, live)
        for (name, kind), result in zip(operation.outputs, results, strict=True):
            values[name] = _declared(result, kind, rounded=operation.kind not in COMPUTING)
            live.add(values[name])
    except (ValueError, IndexError, TypeError, KeyError, AttributeError, ArithmeticError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise GenerationError(f"{function}: {operation.name} ({operation.kind}) can't be computed: {reason}") from error
    for name in step.dead:
        live.remove(values.pop(name))


def _computed(step: _Step, values: Mapping[str, Any], live: LiveMemory) -> list[Any]:
    arguments = {
        key: [values[name] for name in names] if key == "values" else values[names[0]]
        for key, names in step.operation.inputs.items()
    }
    live.check(check_size(step.operation.kind, arguments, step.operation.outputs[0][1]))
    if step.in_place:
        arguments["in_place"] = True
    result = step.kernel(**arguments)
    return result if isinstance(result, list) else [result]


def _declared(result: Any, kind: TensorType, *, rounded: bool) -> ArrayLike:
    """A result in the type that the program declares."""
    array: ArrayLike = np.asarray(result).astype(HELD[kind.dtype], copy=False)
    if not kind.admits(array.shape):
        raise ValueError(f"the result is of shape {array.shape}, not {kind.shape}")
    return array if rounded or kind.dtype != "float16" else round_to_half(array)


def _write(states: States, name: str, data: ArrayLike) -> None:
    """Set a state; what was read from it before stays as it was."""
    if data.shape != states[name].shape:
        raise ValueError(f"data of shape {data.shape} for a state of shape {states[name].shape}")
    if data is not states[name]:  # else it was changed in place
        states[name] = data.copy()


def _kernel(operation: Operation) -> Kernel:
    """What computes an operation.

    Raises:
        BundleError: It has a parameter that MIL does not know, or lacks one.
    """
    if operation.kind in _STATE_OPERATORS:
        wanted = {"input", "data"} if operation.kind == "write_state" else {"input"}
        if operation.inputs.keys() != wanted or not all(operation.inputs.values()):
            raise _misused(operation, "it takes " + " and ".join(sorted(wanted)))
        return _no_kernel
    kernel = COMPUTING.get(operation.kind) or MOVING[operation.kind]
    signature = inspect.signature(kernel)
    ours = {name for name, parameter in signature.parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    try:
        signature.bind(**operation.inputs)
    except TypeError as error:
        raise _misused(operation, str(error)) from error
    if ours & operation.inputs.keys():  # the evaluator's own, such as `in_place`
        raise _misused(operation, f"got an unexpected argument {min(ours & operation.inputs.keys())!r}")
    if any(len(names) != 1 for key, names in operation.inputs.items() if key != "values"):
        raise _misused(operation, "a list where one value is taken")
    return kernel


def _no_kernel(**arguments: Any) -> Any:
    raise TypeError("operators of states have none")


def _misused(operation: Operation, reason: str) -> BundleError:
    return BundleError(f"the package's operator {operation.name} ({operation.kind}): {reason}", hint=BROKEN)


def _last_uses(function: Function) -> dict[str, int]:
    """The operation after which a value is not needed; one beyond the last for outputs."""
    uses = {name: index for index, each in enumerate(function.operations) for name in each.names()}
    return uses | dict.fromkeys(function.signature.outputs, len(function.operations))


def _updated_in_place(function: Function, last_use: Mapping[str, int]) -> set[int]:
    """The `slice_update`s that may write into the state that they were read from, rather than into a copy of all of it.

    Nothing may read any value that shares the state's memory after it but what it returns itself, and the state must be
    written before it is read again.
    """
    state_of: dict[str, str] = {}  # a value that may share a state's memory -> the state
    found = set[int]()
    for index, operation in enumerate(function.operations):
        source = operation.inputs.get("input" if operation.kind == "read_state" else "x", ("",))[0]
        if operation.kind == "read_state":
            state = source
        elif operation.kind in MOVING and source in state_of:
            state = state_of[source]
        else:
            continue
        sharing = [name for name, owner in state_of.items() if owner == state]
        if operation.kind == "slice_update" and all(last_use.get(name, -1) <= index for name in sharing):
            following = (each for each in function.operations[index + 1 :] if state in each.names())
            if getattr(next(following, None), "kind", None) == "write_state":
                found.add(index)
        state_of |= {name: state for name, _ in operation.outputs}
    return found
