"""ONNX Runtime: key-value buffers bound once as past and present, logits of the last rows only."""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.errors import BundleError, GenerationError, first_line
from edgekit.graph import Graph
from edgekit.runtime_options import RuntimeOptions

from .process_memory import release_pages, unchanged_mappings
from .session_options import session_options

__all__ = ["OnnxRuntimeBackend"]

FIRST_CAPACITY = 512
_CACHE_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}
# Windows' are private in any case.
_PRIVATE: dict[str, int] = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
_MAPPING = threading.Lock()  # no session comes or goes while pages of mappings are let go of
_QUIET = 3  # ONNX Runtime's severity "error": its warnings are for the program's author


class OnnxRuntimeBackend:
    """A loaded ONNX program.

    Args:
        directory: The bundle.
        graph: The program's description.
        context: Most tokens of one sequence.
        options: How to load it.

    Raises:
        BundleError: ONNX Runtime does not load the program.
    """

    runtime = None
    end_tokens = None

    def __init__(self, directory: Path, graph: Graph, *, context: int, options: RuntimeOptions) -> None:
        settings = session_options(options)
        settings.log_severity_level = _QUIET
        try:
            self._weights = {} if options.mapped_weights else _read_weights(directory, graph)
            if self._weights:
                sizes = [len(data) for data in self._weights.values()]
                settings.add_external_initializers_from_files_in_memory(
                    list(self._weights), list(self._weights.values()), sizes
                )
            files = [directory / name for name in graph.files]
            with _MAPPING:  # what is mapped meanwhile is this session's, and stays as long as it
                before = unchanged_mappings(files)
                self.session: Any = ort.InferenceSession(files[0], settings, providers=["CPUExecutionProvider"])
                self._mappings = unchanged_mappings(files) - before
        except Exception as error:  # ONNX Runtime's errors share no base class but this
            raise BundleError(
                f"{graph.files[0]} is not loaded by ONNX Runtime {ort.__version__}: {first_line(error)}",
                hint="convert the model again with this version of EdgeKit",
            ) from error
        _check_declared(self.session, graph)
        self.graph = graph
        self.context = context

    def decoder(self) -> OnnxRuntimeDecoder:
        """A new sequence.

        Raises:
            GenerationError: The model is closed.
        """
        if self.session is None:
            raise GenerationError("the model is closed", hint="load it again")
        return OnnxRuntimeDecoder(self)

    def close(self) -> None:
        """Free the weights, once every decoder is closed too."""
        with _MAPPING:
            self.session = None

    def release(self) -> None:
        """See `Backend.release`: mapped weights that were only read to be packed, and rows that were looked up."""
        with _MAPPING:
            if self.session is not None:
                release_pages(self._mappings)


def _read_weights(directory: Path, graph: Graph) -> dict[str, bytes]:
    """The files beside the program, by the name that it calls them; its tensors lie in these bytes as long as it is loaded."""
    return {Path(name).name: (directory / name).read_bytes() for name in graph.files[1:]}


def _untouched(shape: tuple[int, ...], dtype: str) -> NDArray[np.generic]:
    """Zeros that take memory only where they are written to, and give it back when they go: malloc promises neither."""
    pages = mmap.mmap(-1, max(prod(shape) * np.dtype(dtype).itemsize, 1), **_PRIVATE)
    return np.frombuffer(pages, dtype, count=prod(shape)).reshape(shape)


def _check_declared(session: Any, graph: Graph) -> None:
    """Compare what the manifest says of the program with the program."""
    layout, kind = graph.cache, _CACHE_TYPES.get(graph.cache.dtype)
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    layers = range(min(layout.layers, len(inputs)))
    names = [name.replace("{}", str(index)) for index in layers for name in layout.past]
    written = [name.replace("{}", str(index)) for index in layers for name in layout.present]
    agrees = (
        not graph.chunk
        and inputs.keys() == {*graph.inputs.values(), *names}
        and outputs.keys() == {*graph.outputs.values(), *written}
        and len(inputs) == len(graph.inputs) + len(names)
        and outputs[graph.outputs["logits"]].shape[-1] == graph.vocab_size
        and all(
            value.type == kind and (value.shape[1], value.shape[3]) == (layout.kv_heads, layout.head_dim)
            for value in (*(inputs[name] for name in names), *(outputs[name] for name in written))
        )
    )
    if not agrees:
        raise BundleError(
            f"{graph.files[0]} is not the program that the manifest describes", hint="convert the model again"
        )


class OnnxRuntimeDecoder:
    """One sequence. Its buffers double as it grows, up to the context."""

    def __init__(self, backend: OnnxRuntimeBackend) -> None:
        graph = backend.graph
        self._session, self._graph, self._context = backend.session, graph, backend.context
        self._binding = self._session.io_binding()
        self._length = 0
        self._capacity = 0
        self._cache: dict[str, NDArray[np.generic]] = {}
        self._total = self._bind_input(graph.inputs["length"], np.zeros((), np.int32))
        self._start = self._bind_input(graph.inputs["logits_start"], np.zeros(1, np.int64))
        self._rope_length: NDArray[np.int64] | None = None
        if "rope_length" in graph.inputs:
            self._rope_length = self._bind_input(graph.inputs["rope_length"], np.zeros((), np.int64))
        self._first_position: NDArray[np.int64] | None = None
        if "first_position" in graph.inputs:
            self._first_position = self._bind_input(graph.inputs["first_position"], np.zeros((), np.int64))
        self._one_token = np.zeros((1, 1), np.int64)
        self._shapes: tuple[int, int] = (0, 0)
        self._one_row: NDArray[np.float32] = np.empty((1, 1, graph.vocab_size), np.float32)
        self._logits = self._one_row

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    @property
    def cache_bytes(self) -> int:
        """See `Decoder.cache_bytes`."""
        return sum(buffer.nbytes for buffer in list(self._cache.values()))  # other threads ask while it grows

    def forward(self, tokens: NDArray[np.int64], *, rows: int, rope_length: int) -> NDArray[np.float32]:
        """See `Decoder.forward`.

        Raises:
            GenerationError: ONNX Runtime fails, for want of memory as a rule, or the decoder is closed.
        """
        if self._session is None:
            raise GenerationError("the session is closed", hint="open another one")
        new = len(tokens)
        self._reserve(self._length + new)
        self._total[...] = self._length + new
        self._start[0] = new - rows
        if self._rope_length is not None:
            self._rope_length[...] = rope_length
        if (new, rows) != self._shapes:
            self._bind_tokens(new, rows)
        if new == 1:
            self._one_token[0, 0] = tokens[0]
        else:
            self._tokens[0, :] = tokens
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's errors share no base class but this
            raise GenerationError(f"ONNX Runtime failed: {first_line(error)}") from error
        self._length += new
        rows_found: NDArray[np.float32] = self._logits[0]
        return rows_found

    def rewind(self, length: int) -> None:
        """Forget all tokens from `length` on: the buffers stay, what lies beyond is overwritten."""
        if not 0 <= length <= self._length:
            raise ValueError(f"rewind to {length} of {self._length} tokens")
        self._length = length
        if not length and self._first_position is not None:
            self._first_position[...] = 0

    def forget(self, count: int) -> None:
        """See `Decoder.forget`: what is left moves to the front of the buffers."""
        if self._first_position is None or not 0 <= count <= self._length:
            raise ValueError(f"forget {count} of {self._length} tokens")
        kept, end, self._length = self._length - count, self._length, 0  # nothing is there if an interrupt comes
        for buffer in self._cache.values():
            buffer[:, :, :kept] = buffer[:, :, count:end]  # numpy copies overlapping parts aside
        self._first_position[...] += count
        self._length = kept

    def read_cache(self) -> list[NDArray[np.generic]]:
        """See `Decoder.read_cache`: views of the buffers."""
        layout = self._graph.cache
        if not self._length:
            return [np.zeros((layout.kv_heads, 0, layout.head_dim), layout.dtype)] * (2 * layout.layers)
        return [self._cache[name][0, :, : self._length] for name in self._past_names()]

    def write_cache(self, arrays: Sequence[NDArray[np.generic]], first_position: int = 0) -> None:
        """See `Decoder.write_cache`."""
        if first_position and self._first_position is None:
            raise ValueError(f"a cache that starts at position {first_position}")
        if self._session is None:
            raise GenerationError("the session is closed", hint="open another one")
        self._length = 0
        length = arrays[0].shape[1]
        self._reserve(length)
        if length:
            for name, array in zip(self._past_names(), arrays, strict=True):
                self._cache[name][0, :, :length] = array
        self._length = length
        if self._first_position is not None:
            self._first_position[...] = first_position

    def close(self) -> None:
        """Free the cache and let go of the weights."""
        self._session = self._binding = None
        self._cache.clear()
        self._length = self._capacity = 0

    def _past_names(self) -> list[str]:
        layout = self._graph.cache
        return [past.replace("{}", str(index)) for index in range(layout.layers) for past in layout.past]

    def _bind_tokens(self, new: int, rows: int) -> None:
        self._tokens = self._one_token if new == 1 else np.empty((1, new), np.int64)
        self._logits = self._one_row if rows == 1 else np.empty((1, rows, self._one_row.shape[2]), np.float32)
        self._bind_input(self._graph.inputs["tokens"], self._tokens)
        self._bind_output(self._graph.outputs["logits"], self._logits)
        self._shapes = (new, rows)

    def _reserve(self, length: int) -> None:
        if length <= self._capacity:
            return
        if length > self._context:
            raise ValueError(f"{length} tokens in a context of {self._context}")
        layout = self._graph.cache
        capacity = min(max(2 * self._capacity, FIRST_CAPACITY, length), self._context)
        for index in range(layout.layers):
            for past, present in zip(layout.past, layout.present, strict=True):
                name = past.replace("{}", str(index))
                buffer = _untouched((1, layout.kv_heads, capacity, layout.head_dim), layout.dtype)
                if self._length:
                    buffer[:, :, : self._length] = self._cache[name][:, :, : self._length]
                self._cache[name] = buffer
                self._bind_input(name, buffer)
                self._bind_output(present.replace("{}", str(index)), buffer)
        self._capacity = capacity

    def _bind_input(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        self._binding.bind_ortvalue_input(name, self._value_of(array))
        return array

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_ortvalue_output(name, self._value_of(array))

    @staticmethod
    def _value_of(array: NDArray[Any]) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(array)  # a view: the array's memory is the tensor's
