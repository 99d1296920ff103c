"""Core ML programs: on macOS Core ML itself runs them, elsewhere the MIL evaluator executes what the package says.

A package has three functions that share weights and states. `prefill` computes a chunk of tokens and the logits of one of its
rows, `score` those of all rows, `decode` takes one token. All shapes are fixed: a chunk that is not full is filled up at its
end with tokens that nothing sees; where a whole chunk does not fit the context any more, tokens go through `decode`.
The states hold keys and values of each position, so that a sequence goes back by counting from an earlier position on.
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
        if not graph.chunk or not _agrees(read_signatures(package), graph, context):
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
    layout, meanings = graph.cache, {"prefill": ("logits_start",), "score": (), "decode": ()}
    state = TensorType(layout.dtype, (layout.layers, layout.kv_heads, context, layout.head_dim))
    always = ("past_length", *(["rope_length"] if "rope_length" in graph.inputs else []))
    for name, more in meanings.items():
        if name not in signatures or not graph.inputs.keys() >= {"tokens", *always, *more}:
            return False
        found, new = signatures[name], 1 if name == "decode" else graph.chunk
        inputs = {graph.inputs[meaning]: TensorType("int32", (1,)) for meaning in (*always, *more)}
        inputs[graph.inputs["tokens"]] = TensorType("int32", (1, new))
        logits = found.outputs.get(graph.outputs["logits"])
        if (
            found.inputs != inputs
            or found.states != dict.fromkeys(layout.past, state)
            or logits is None
            or logits.shape != (1, new if name == "score" else 1, graph.vocab_size)
        ):
            return False
    return True


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


class CoreMLDecoder:
    """One sequence."""

    def __init__(self, program: CoreMLProgram, graph: Graph, context: int) -> None:
        self._program: CoreMLProgram | None = program
        self._graph, self._context = graph, context
        self._length = 0
        self._states: Any = None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    @property
    def cache_bytes(self) -> int:
        """See `Decoder.cache_bytes`: the whole context from the first token on."""
        return 0 if self._states is None else self._graph.cache.token_bytes * self._context

    def forward(self, tokens: NDArray[np.int64], *, rows: int, rope_length: int) -> NDArray[np.float32]:
        """See `Decoder.forward`.

        Raises:
            GenerationError: A function can't be run, or the decoder is closed.
        """
        program = self._open()
        if self._length + len(tokens) > self._context:
            raise ValueError(f"{self._length + len(tokens)} tokens in a context of {self._context}")
        before, done, logits = self._length, 0, list[NDArray[np.float32]]()
        try:
            while done < len(tokens):
                part = tokens[done : done + self._step_size(len(tokens) - done)]
                wanted = min(rows - (len(tokens) - done - len(part)), len(part))
                found = self._step(program, part, wanted, rope_length)
                if wanted > 0:
                    logits.append(found[-wanted:])
                done += len(part)
                self._length += len(part)
        except BaseException:  # an interrupt too: a part of the tokens must not stay
            self._length = before
            raise
        return np.concatenate(logits)

    def rewind(self, length: int) -> None:
        """See `Decoder.rewind`: what lies beyond is overwritten."""
        if not 0 <= length <= self._length:
            raise ValueError(f"rewind to {length} of {self._length} tokens")
        self._length = length

    def forget(self, count: int) -> None:
        """See `Decoder.forget`: these programs do not slide."""
        raise ValueError(f"forget {count} tokens of a program that does not slide")

    def read_cache(self) -> list[NDArray[np.generic]]:
        """See `Decoder.read_cache`."""
        program, layout = self._open(), self._graph.cache
        states = [program.read_state(self._states, name) for name in layout.past]
        return [
            state[layer, :, : self._length].astype(layout.dtype) for layer in range(layout.layers) for state in states
        ]

    def write_cache(self, arrays: Sequence[NDArray[np.generic]], first_position: int = 0) -> None:
        """See `Decoder.write_cache`."""
        if first_position:
            raise ValueError(f"a cache that starts at position {first_position}")
        program, layout, length = self._open(), self._graph.cache, arrays[0].shape[1]
        self._length = 0
        for number, name in enumerate(layout.past):
            state = np.array(program.read_state(self._states, name))
            state[:, :, :length] = np.stack(arrays[number::2])
            program.write_state(self._states, name, state)
        self._length = length

    def close(self) -> None:
        """Free the cache and let go of the weights."""
        self._program = self._states = None
        self._length = 0

    def _open(self) -> CoreMLProgram:
        if self._program is None:
            raise GenerationError("the session is closed", hint="open another one")
        if self._states is None:
            self._states = self._program.new_states()
        return self._program

    def _step_size(self, left: int) -> int:
        """How many tokens the next call takes: one where no chunk fits any more, or one is all there is."""
        fits = self._length + self._graph.chunk <= self._context
        return min(left, self._graph.chunk) if fits else 1

    def _step(
        self, program: CoreMLProgram, tokens: NDArray[np.int64], wanted: int, rope_length: int
    ) -> NDArray[np.float32]:
        """Compute tokens; logits [rows, vocabulary] of their last rows, at least `wanted`."""
        graph, new = self._graph, len(tokens)
        function, size = ("decode", 1) if new == 1 else ("score" if wanted > 1 else "prefill", graph.chunk)
        padded = np.zeros((1, size), np.int32)
        padded[0, :new] = tokens
        numbers = {"past_length": self._length, "rope_length": rope_length}
        if function == "prefill":
            numbers["logits_start"] = new - 1
        inputs = {graph.inputs["tokens"]: padded} | {
            graph.inputs[meaning]: np.array([number], np.int32)
            for meaning, number in numbers.items()
            if meaning in graph.inputs
        }
        logits = program.run(function, inputs, self._states, graph.outputs["logits"])[0]
        found: NDArray[np.float32] = logits[:new] if function == "score" else logits
        return found.astype(np.float32, copy=False)
