"""LiteRT: a .tflite whose functions take the cache and return what is new in it; the cache itself is kept here.

`prefill` computes a chunk of tokens and the logits of one row, `score` those of all rows, `decode` takes one token. Shapes are
fixed: a chunk that is not full is filled up at its end with tokens that nothing sees.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BundleError, GenerationError, first_line
from edgekit.graph import Graph
from edgekit.runtime_options import RuntimeOptions

from .backend import Runtime
from .program_trial import Trial, try_out
from .tflite_file import check_tflite, litert_version, load_functions

__all__ = ["LitertBackend"]

PROBE = "edgekit.runtimes.tflite_probe"
Arrays = dict[str, NDArray[Any]]
Types = dict[str, tuple[tuple[int, ...], str]]  # shape and element type by name


class LitertBackend:
    """A loaded program.

    Args:
        directory: The bundle.
        graph: The program's description.
        context: Tokens of the cache.
        options: How to load it.
        tried: The program is known not to crash.

    Raises:
        BundleError: LiteRT does not load it, or it is not what the manifest describes.
    """

    runtime = Runtime("litert")
    end_tokens = None

    def __init__(
        self, directory: Path, graph: Graph, *, context: int, options: RuntimeOptions, tried: bool = False
    ) -> None:
        path = directory / graph.files[0]
        check_tflite(path)
        if not tried:
            try_out(path, Trial("LiteRT", litert_version(), PROBE))
        self._interpreter, runners = load_functions(path, threads=options.threads)
        if not graph.chunk or not _agrees(runners, graph, context):
            raise BundleError(
                f"{graph.files[0]} is not the program that the manifest describes", hint="convert the model again"
            )
        self.graph, self.context = graph, context
        self._lock = threading.Lock()  # functions share one memory
        self._runners: dict[str, Any] | None = runners

    def decoder(self) -> LitertDecoder:
        """A new sequence.

        Raises:
            GenerationError: The model is closed.
        """
        if self._runners is None:
            raise GenerationError("the model is closed", hint="load it again")
        return LitertDecoder(self._runners, self._lock, self.graph, self.context)

    def release(self) -> None:
        """See `Backend.release`: there is nothing here that is known to be free."""

    def close(self) -> None:
        """Free the weights, once every decoder is closed too."""
        self._runners = self._interpreter = None


def _agrees(runners: dict[str, Any], graph: Graph, context: int) -> bool:
    """Whether the functions take and return what the manifest says of the program."""
    layout, wanted = graph.cache, {"prefill": ("logits_start",), "score": (), "decode": ()}
    always = ("past_length", *(["rope_length"] if "rope_length" in graph.inputs else []))
    for function, more in wanted.items():
        if function not in runners or not graph.inputs.keys() >= {"tokens", *always, *more}:
            return False
        new = 1 if function == "decode" else graph.chunk
        rows = new if function == "score" else 1
        inputs: Types = {graph.inputs[name]: ((1,), "int32") for name in (*always, *more)}
        inputs[graph.inputs["tokens"]] = ((1, new), "int32")
        outputs: Types = {graph.outputs["logits"]: ((1, rows, graph.vocab_size), "float32")}
        for layer in range(layout.layers):
            for past, present in zip(layout.past, layout.present, strict=True):
                inputs[past.replace("{}", str(layer))] = ((layout.kv_heads, context, layout.head_dim), layout.dtype)
                outputs[present.replace("{}", str(layer))] = ((layout.kv_heads, new, layout.head_dim), layout.dtype)
        runner = runners[function]
        if (_declared(runner.get_input_details()), _declared(runner.get_output_details())) != (inputs, outputs):
            return False
    return True


def _declared(details: dict[str, Any]) -> Types:
    return {name: (tuple(map(int, each["shape"])), np.dtype(each["dtype"]).name) for name, each in details.items()}


class LitertDecoder:
    """One sequence."""

    def __init__(self, runners: dict[str, Any], lock: threading.Lock, graph: Graph, context: int) -> None:
        self._runners: dict[str, Any] | None = runners
        self._lock, self._graph, self._context = lock, graph, context
        self._length = 0
        self._cache: Arrays = {}

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    @property
    def cache_bytes(self) -> int:
        """See `Decoder.cache_bytes`."""
        return sum(part.nbytes for part in list(self._cache.values()))

    def forward(self, tokens: NDArray[np.int64], *, rows: int, rope_length: int) -> NDArray[np.float32]:
        """See `Decoder.forward`.

        Raises:
            GenerationError: LiteRT fails, or the decoder is closed.
        """
        runners = self._open()
        if self._length + len(tokens) > self._context:
            raise ValueError(f"{self._length + len(tokens)} tokens in a context of {self._context}")
        if tokens.min() < 0 or tokens.max() >= self._graph.vocab_size:
            raise ValueError(f"tokens outside of a vocabulary of {self._graph.vocab_size}")
        before, logits = self._length, list[NDArray[np.float32]]()
        try:
            for start in range(0, len(tokens), self._graph.chunk):
                part = tokens[start : start + self._graph.chunk]
                wanted = min(rows - (len(tokens) - start - len(part)), len(part))
                found = self._step(runners, part, wanted, rope_length)
                if wanted > 0:
                    logits.append(found[-wanted:])
        except BaseException as error:  # an interrupt too: a part of the tokens must not stay
            self._length = before
            if isinstance(error, RuntimeError | ValueError):
                raise GenerationError(f"LiteRT failed: {first_line(error)}") from error
            raise
        return np.concatenate(logits)

    def rewind(self, length: int) -> None:
        """See `Decoder.rewind`."""
        if not 0 <= length <= self._length:
            raise ValueError(f"rewind to {length} of {self._length} tokens")
        self._length = length

    def forget(self, count: int) -> None:
        """See `Decoder.forget`: these programs do not slide."""
        raise ValueError(f"forget {count} tokens of a program that does not slide")

    def read_cache(self) -> list[NDArray[np.generic]]:
        """See `Decoder.read_cache`: views of the buffers."""
        self._open()
        return [part[:, : self._length] for part in self._cache.values()]

    def write_cache(self, arrays: Sequence[NDArray[np.generic]], first_position: int = 0) -> None:
        """See `Decoder.write_cache`."""
        if first_position:
            raise ValueError(f"a cache that starts at position {first_position}")
        self._open()
        self._length, length = 0, arrays[0].shape[1]
        for part, array in zip(self._cache.values(), arrays, strict=True):
            part[:, :length] = array
        self._length = length

    def close(self) -> None:
        """Free the cache and let go of the weights."""
        self._runners = None
        self._cache = {}
        self._length = 0

    def _open(self) -> dict[str, Any]:
        if self._runners is None:
            raise GenerationError("the session is closed", hint="open another one")
        if not self._cache:
            layout = self._graph.cache
            shape = (layout.kv_heads, self._context, layout.head_dim)
            names = (name.replace("{}", str(layer)) for layer in range(layout.layers) for name in layout.past)
            self._cache = {name: np.zeros(shape, layout.dtype) for name in names}
        return self._runners

    def _step(
        self, runners: dict[str, Any], tokens: NDArray[np.int64], wanted: int, rope_length: int
    ) -> NDArray[np.float32]:
        """Compute up to a chunk of tokens and keep their keys and values; logits of their last rows, at least `wanted`."""
        graph, layout, new = self._graph, self._graph.cache, len(tokens)
        function, size = ("decode", 1) if new == 1 else ("score" if wanted > 1 else "prefill", graph.chunk)
        padded = np.zeros((1, size), np.int32)
        padded[0, :new] = tokens
        numbers = {"past_length": self._length, "rope_length": rope_length}
        if function == "prefill":
            numbers["logits_start"] = new - 1
        inputs = {graph.inputs["tokens"]: padded} | {
            graph.inputs[name]: np.array([number], np.int32) for name, number in numbers.items() if name in graph.inputs
        }
        with self._lock:
            found = runners[function](**inputs, **self._cache)
        end = self._length + new
        for layer in range(layout.layers):
            for past, present in zip(layout.past, layout.present, strict=True):
                written = found[present.replace("{}", str(layer))]
                self._cache[past.replace("{}", str(layer))][:, self._length : end] = written[:, :new]
        self._length = end
        logits: NDArray[np.float32] = found[graph.outputs["logits"]][0]
        return logits[:new] if function == "score" else logits
