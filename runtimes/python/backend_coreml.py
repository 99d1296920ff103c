"""Core ML programs: on macOS Core ML itself runs them, elsewhere the MIL evaluator executes what the package says.

A package has three functions that share weights and states; see `static_decoder`. Where a whole chunk does not fit the context
any more, tokens go through `decode`. The states hold keys and values of each position, so that a sequence goes back by counting
from an earlier position on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BundleError, GenerationError
from edgekit.graph import Graph
from edgekit.runtime_options import RuntimeOptions

from .backend import Runtime
from .mil_evaluator import MilFunction, load_functions, new_states
from .mil_package import Package
from .mil_program import Signature, read_signatures
from .mil_types import ArrayLike, TensorType
from .static_decoder import StaticDecoder, function_call, static_functions

__all__ = ["CoreMLBackend", "CoreMLProgram", "EvaluatedProgram"]

FUNCTIONS = ("prefill", "score", "decode")
_MANIFEST = "Manifest.json"


class CoreMLProgram(Protocol):
    """What runs a package's functions. States are what it makes of them itself."""

    runtime: Runtime

    def new_states(self) -> Any:
        """States of a new sequence."""
        ...

    def run(self, function: str, inputs: Mapping[str, NDArray[np.int32]], states: Any, output: str) -> ArrayLike:
        """One output of a function, whose inputs are int32."""
        ...

    def read_state(self, states: Any, name: str) -> ArrayLike:
        """A state's numbers; a copy, or valid until the next call."""
        ...

    def write_state(self, states: Any, name: str, array: ArrayLike) -> None:
        """Replace a state's numbers."""
        ...


class EvaluatedProgram:
    """A package run by the MIL evaluator."""

    runtime = Runtime("mil-evaluator", note="an evaluator of Core ML's programs, for their numbers alone", is_slow=True)

    def __init__(self, functions: Mapping[str, MilFunction]) -> None:
        self._functions = functions
        self._states = functions[FUNCTIONS[0]].signature.states

    def new_states(self) -> dict[str, ArrayLike]:
        """See `CoreMLProgram.new_states`."""
        return new_states(self._states)

    def run(
        self, function: str, inputs: Mapping[str, NDArray[np.int32]], states: dict[str, ArrayLike], output: str
    ) -> ArrayLike:
        """See `CoreMLProgram.run`."""
        return self._functions[function](inputs, states)[output]

    def read_state(self, states: dict[str, ArrayLike], name: str) -> ArrayLike:
        """See `CoreMLProgram.read_state`."""
        return states[name]

    def write_state(self, states: dict[str, ArrayLike], name: str, array: ArrayLike) -> None:
        """See `CoreMLProgram.write_state`."""
        states[name][...] = array


class CoreMLBackend:
    """A loaded package.

    Args:
        directory: The bundle.
        graph: The program's description.
        context: Positions of its states.
        options: Not used: Core ML chooses its threads itself.

    Attributes:
        runtime: Core ML, or the MIL evaluator.
        end_tokens: See `Backend.end_tokens`.

    Raises:
        BundleError: The package is damaged, not what the manifest describes, or has operators that the evaluator lacks.
        MissingExtraError: coremltools is not installed.
    """

    def __init__(self, directory: Path, graph: Graph, *, context: int, options: RuntimeOptions) -> None:
        manifest = directory / graph.files[0]
        if manifest.name != _MANIFEST:
            raise _not_described(graph)
        package = Package(manifest.parent)
        if not _agrees(read_signatures(package), graph, context):
            raise _not_described(graph)
        self.program: CoreMLProgram | None
        if sys.platform == "darwin":
            from .coreml_native import NativeProgram

            self.program = NativeProgram(manifest.parent, FUNCTIONS)
        else:
            self.program = EvaluatedProgram(load_functions(package))
        self.runtime = self.program.runtime
        self.end_tokens = _end_tokens(package, graph)
        self.graph, self.context = graph, context

    def decoder(self) -> CoreMLDecoder:
        """A new sequence.

        Raises:
            GenerationError: The model is closed.
        """
        if self.program is None:
            raise GenerationError("the model is closed", hint="load it again")
        return CoreMLDecoder(self.program, self.graph, self.context)

    def release(self) -> None:
        """See `Backend.release`: decoded weights are needed."""

    def close(self) -> None:
        """Free the weights, once every decoder is closed too."""
        self.program = None


def _agrees(signatures: Mapping[str, Signature], graph: Graph, context: int) -> bool:
    """Whether the functions take and return what the manifest says of the program."""
    layout, functions = graph.cache, static_functions(graph)
    states = dict.fromkeys(
        layout.past, TensorType(layout.dtype, (layout.layers, layout.kv_heads, context, layout.head_dim))
    )
    for name, function in functions.items():
        found = signatures.get(name)
        if found is None or found.states != states:
            return False
        logits = found.outputs.get(graph.outputs["logits"])
        inputs = {given: TensorType("int32", shape) for given, shape in function.inputs.items()}
        if found.inputs != inputs or logits is None or logits.shape != function.logits:
            return False
    return bool(functions)


def _end_tokens(package: Package, graph: Graph) -> frozenset[int] | None:
    """Those that the package's metadata name, which apps read."""
    named = package.model.description.metadata.userDefined.get("eos_token_ids")
    if named is None:
        return None
    try:
        return frozenset(int(token) for token in named.split(",") if token)
    except ValueError as error:
        raise _not_described(graph) from error


def _not_described(graph: Graph) -> BundleError:
    return BundleError(
        f"{graph.files[0]} is not the program that the manifest describes", hint="convert the model again"
    )


class CoreMLDecoder(StaticDecoder[CoreMLProgram]):
    """One sequence."""

    def __init__(self, program: CoreMLProgram, graph: Graph, context: int) -> None:
        super().__init__(program, graph, context)
        self._states: Any = None

    @property
    def cache_bytes(self) -> int:
        """See `Decoder.cache_bytes`: the whole context from the first token on."""
        return 0 if self._states is None else self._graph.cache.token_bytes * self._context

    def read_cache(self) -> list[NDArray[np.generic]]:
        """See `Decoder.read_cache`."""
        program, layout = self._open(), self._graph.cache
        states = [program.read_state(self._states, name) for name in layout.past]
        return [
            state[layer, :, : self._length].astype(layout.dtype) for layer in range(layout.layers) for state in states
        ]

    def close(self) -> None:
        """See `StaticDecoder.close`."""
        super().close()
        self._states = None

    def _open(self) -> CoreMLProgram:
        program = super()._open()
        if self._states is None:
            self._states = program.new_states()
        return program

    def _write(self, program: CoreMLProgram, arrays: Sequence[NDArray[np.generic]]) -> None:
        for number, name in enumerate(self._graph.cache.past):
            state = np.array(program.read_state(self._states, name))
            state[:, :, : arrays[0].shape[1]] = np.stack(arrays[number::2])
            program.write_state(self._states, name, state)

    def _step_size(self, left: int) -> int:
        """One where no chunk fits any more: the states have no place for what it is filled up with."""
        return super()._step_size(left) if self._length + self._graph.chunk <= self._context else 1

    def _step(
        self, program: CoreMLProgram, tokens: NDArray[np.int64], wanted: int, rope_length: int
    ) -> NDArray[np.float32]:
        function, inputs = function_call(self._graph, tokens, self._length, wanted, rope_length)
        logits = program.run(function, inputs, self._states, self._graph.outputs["logits"])[0]
        found: NDArray[np.float32] = logits[: len(tokens)] if function == "score" else logits
        return found.astype(np.float32, copy=False)
