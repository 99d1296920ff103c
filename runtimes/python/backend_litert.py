"""LiteRT: a .tflite whose three functions (see `static_decoder`) take the cache and return what is new in it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BundleError, GenerationError, first_line
from edgekit.graph import Graph
from edgekit.runtime_options import RuntimeOptions

from .backend import Runtime
from .program_trial import Trial, try_out
from .static_decoder import HostCacheDecoder, function_call, static_functions
from .tflite_file import check_tflite, litert_version, load_functions

__all__ = ["LitertBackend"]

PROBE = "edgekit.runtimes.tflite_probe"
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
        if not _agrees(runners, graph, context):
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
    layout, functions = graph.cache, static_functions(graph)
    if not runners.keys() >= functions.keys():
        return False
    for name, function in functions.items():
        inputs: Types = {given: (shape, "int32") for given, shape in function.inputs.items()}
        outputs: Types = {graph.outputs["logits"]: (function.logits, "float32")}
        for layer in range(layout.layers):
            for past, present in zip(layout.past, layout.present, strict=True):
                inputs[past.replace("{}", str(layer))] = ((layout.kv_heads, context, layout.head_dim), layout.dtype)
                written = (layout.kv_heads, function.new, layout.head_dim)
                outputs[present.replace("{}", str(layer))] = (written, layout.dtype)
        runner = runners[name]
        if (_declared(runner.get_input_details()), _declared(runner.get_output_details())) != (inputs, outputs):
            return False
    return bool(functions)


def _declared(details: dict[str, Any]) -> Types:
    return {name: (tuple(map(int, each["shape"])), np.dtype(each["dtype"]).name) for name, each in details.items()}


class LitertDecoder(HostCacheDecoder[dict[str, Any]]):
    """One sequence.

    Args:
        runners: The functions by name.
        lock: They share one memory.
        graph, context: See `StaticDecoder`.
    """

    def __init__(self, runners: dict[str, Any], lock: threading.Lock, graph: Graph, context: int) -> None:
        super().__init__(runners, graph, context)
        self._lock = lock

    def _step(
        self, program: dict[str, Any], tokens: NDArray[np.int64], wanted: int, rope_length: int
    ) -> NDArray[np.float32]:
        function, inputs = function_call(self._graph, tokens, self._length, wanted, rope_length)
        try:
            with self._lock:
                found = program[function](**inputs, **self._cache)
        except (RuntimeError, ValueError) as error:  # what its bindings raise
            raise GenerationError(f"LiteRT failed: {first_line(error)}") from error
        self._keep(found, len(tokens))
        logits: NDArray[np.float32] = found[self._graph.outputs["logits"]][0]
        return logits[: len(tokens)] if function == "score" else logits
