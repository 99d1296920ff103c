"""Decoders of programs whose shapes are fixed: one call takes a chunk of tokens, or a single token.

A chunk that is not full is filled up at its end with tokens that nothing sees. Core ML's and LiteRT's programs have three
functions: `prefill` computes a chunk and the logits of one of its rows, `score` those of all rows, `decode` takes one token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import GenerationError
from edgekit.graph import EMPTY_UINT8, Graph

__all__ = ["HostCacheDecoder", "StaticDecoder", "StaticFunction", "function_call", "static_functions"]

Program = TypeVar("Program")


class StaticDecoder(ABC, Generic[Program]):
    """One sequence.

    Args:
        program: What computes; shared by the sequences of a backend.
        graph: Its description.
        context: Tokens of the cache.
    """

    def __init__(self, program: Program, graph: Graph, context: int) -> None:
        self._program: Program | None = program
        self._graph, self._context = graph, context
        self._length = 0

    @abstractmethod
    def _step(self, program: Program, tokens: NDArray[np.int64], wanted: int, rope_length: int) -> NDArray[np.float32]:
        """Compute up to a chunk of tokens behind those of the cache, which keeps their keys and values.

        Returns:
            Logits [rows, vocabulary] of their last rows, at least `wanted`, which may be less than 1.

        Raises:
            GenerationError: The runtime fails.
        """

    @abstractmethod
    def _write(self, program: Program, arrays: Sequence[NDArray[np.generic]]) -> None:
        """Put key and value of each layer in turn, [kv_heads, length, head_dim], at the cache's beginning."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    def forward(self, tokens: NDArray[np.int64], *, rows: int, rope_length: int) -> NDArray[np.float32]:
        """See `Decoder.forward`.

        Raises:
            GenerationError: The runtime fails, or the decoder is closed.
        """
        program = self._open()
        if self._length + len(tokens) > self._context:
            raise ValueError(f"{self._length + len(tokens)} tokens in a context of {self._context}")
        if tokens.min() < 0 or tokens.max() >= self._graph.vocab_size:
            raise ValueError(f"tokens outside of a vocabulary of {self._graph.vocab_size}")
        before, done, logits = self._length, 0, list[NDArray[np.float32]]()
        try:
            while done < len(tokens):
                part = tokens[done : done + self._step_size(len(tokens) - done)]
                done += len(part)
                wanted = min(rows - (len(tokens) - done), len(part))
                found = self._step(program, part, wanted, rope_length)
                self._length += len(part)
                if wanted > 0:
                    logits.append(found[-wanted:])
        except BaseException:  # an interrupt too: a part of the tokens must not stay
            self._length = before
            raise
        return np.concatenate(logits)

    def _step_size(self, left: int) -> int:
        """How many of the tokens that are left the next call takes."""
        return min(left, self._graph.chunk)

    def rewind(self, length: int) -> None:
        """See `Decoder.rewind`: what lies beyond is overwritten."""
        if not 0 <= length <= self._length:
            raise ValueError(f"rewind to {length} of {self._length} tokens")
        self._length = length

    def forget(self, count: int) -> None:
        """See `Decoder.forget`: a program that slides has its own."""
        raise ValueError(f"forget {count} tokens of a program that does not slide")

    def write_cache(self, arrays: Sequence[NDArray[np.generic]], first_position: int = 0) -> None:
        """See `Decoder.write_cache`."""
        if first_position:
            raise ValueError(f"a cache that starts at position {first_position}")
        program = self._open()
        self._length = 0  # nothing is there if an interrupt comes
        self._write(program, arrays)
        self._length = arrays[0].shape[1]

    def close(self) -> None:
        """Free the cache and let go of the weights."""
        self._program = None
        self._length = 0

    def _open(self) -> Program:
        if self._program is None:
            raise GenerationError("the session is closed", hint="open another one")
        return self._program


class HostCacheDecoder(StaticDecoder[Program]):
    """One sequence of a program that takes the cache and returns what is new in it: the cache itself is kept here.

    It holds the whole context from the first token on.
    """

    def __init__(self, program: Program, graph: Graph, context: int) -> None:
        super().__init__(program, graph, context)
        self._cache: dict[str, NDArray[Any]] = {}

    @property
    def cache_bytes(self) -> int:
        """See `Decoder.cache_bytes`."""
        return sum(buffer.nbytes for buffer in list(self._cache.values()))

    def read_cache(self) -> list[NDArray[np.generic]]:
        """See `Decoder.read_cache`: views of the buffers."""
        self._open()
        return [part[:, : self._length] for part in self._parts()]

    def close(self) -> None:
        """See `StaticDecoder.close`."""
        super().close()
        self._cache = {}

    def _write(self, program: Program, arrays: Sequence[NDArray[np.generic]]) -> None:
        for part, array in zip(self._parts(), arrays, strict=True):
            part[:, : array.shape[1]] = array

    def _keep(self, outputs: Mapping[str, NDArray[Any]], new: int) -> None:
        """Put the first `new` tokens' keys and values, of what the program returned, behind those of the cache."""
        layout = self._graph.cache
        names = (name.replace("{}", str(layer)) for layer in range(layout.layers) for name in layout.present)
        for number, (part, name) in enumerate(zip(self._parts(), names, strict=True)):
            part[:, self._length : self._length + new] = self._by_token(outputs[name], number)[:, :new]

    def _open(self) -> Program:
        program = super()._open()
        if not self._cache:
            self._allocate()
        return program

    def _allocate(self) -> None:
        layout = self._graph.cache
        across = (layout.kv_heads, layout.head_dim, self._context) if layout.keys_transposed else None
        along = (layout.kv_heads, self._context, layout.head_dim)
        for layer in range(layout.layers):
            for past, shape in zip(layout.past, (across or along, along), strict=True):
                buffer = np.zeros(shape, layout.dtype)
                if layout.dtype == "uint8":
                    buffer.fill(EMPTY_UINT8)
                self._cache[past.replace("{}", str(layer))] = buffer

    def _parts(self) -> list[NDArray[Any]]:
        """Views of key and value of each layer in turn, [kv_heads, context, head_dim]."""
        return [self._by_token(buffer, number) for number, buffer in enumerate(self._cache.values())]

    def _by_token(self, array: NDArray[Any], number: int) -> NDArray[Any]:
        """An array of the cache [kv_heads, tokens, head_dim], by its number: keys are the even ones."""
        return array.swapaxes(1, 2) if self._graph.cache.keys_transposed and number % 2 == 0 else array


@dataclass(frozen=True, slots=True)
class StaticFunction:
    """A function's int32 inputs by name, how many tokens it takes, and the shape of its logits."""

    inputs: Mapping[str, tuple[int, ...]]
    new: int
    logits: tuple[int, ...]


def static_functions(graph: Graph) -> dict[str, StaticFunction]:
    """The three functions that a manifest describes, without the cache; none where it describes another kind of program."""
    always = ("past_length", *(["rope_length"] if "rope_length" in graph.inputs else []))
    if not graph.chunk or not graph.inputs.keys() >= {"tokens", "logits_start", *always}:
        return {}
    found = {}
    for name, new, rows in (("prefill", graph.chunk, 1), ("score", graph.chunk, graph.chunk), ("decode", 1, 1)):
        numbers = (*always, "logits_start") if name == "prefill" else always
        inputs: dict[str, tuple[int, ...]] = {graph.inputs[meaning]: (1,) for meaning in numbers}
        inputs[graph.inputs["tokens"]] = (1, new)
        found[name] = StaticFunction(inputs, new, (1, rows, graph.vocab_size))
    return found


def function_call(
    graph: Graph, tokens: NDArray[np.int64], length: int, wanted: int, rope_length: int
) -> tuple[str, dict[str, NDArray[np.int32]]]:
    """Which function computes tokens behind `length` others with as many rows of logits, and its inputs without the cache."""
    new = len(tokens)
    function, size = ("decode", 1) if new == 1 else ("score" if wanted > 1 else "prefill", graph.chunk)
    padded = np.zeros((1, size), np.int32)
    padded[0, :new] = tokens
    numbers = {"past_length": length, "rope_length": rope_length}
    if function == "prefill":
        numbers["logits_start"] = new - 1
    inputs = {
        graph.inputs[meaning]: np.array([number], np.int32)
        for meaning, number in numbers.items()
        if meaning in graph.inputs
    }
    return function, inputs | {graph.inputs["tokens"]: padded}
