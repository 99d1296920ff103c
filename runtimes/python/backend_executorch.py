"""ExecuTorch: one method, whose memory holds the cache of one sequence at a time.

A method that is loaded again packs its weights again. So there is one, and sessions take turns: who computes has its keys and
values in the method's own buffers; who does not has a copy of them. A turn costs a copy of the tokens that are new since the
last one, and of all tokens on the way back.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekit.errors import BundleError, GenerationError, first_line
from edgekit.graph import Graph
from edgekit.runtime_options import RuntimeOptions

from .backend import Runtime
from .executorch_runtime import ProgramFile, executorch_version, set_threads
from .program_trial import Trial, try_out
from .pte_file import check_pte

__all__ = ["ExecuTorchBackend"]

PROBE = "edgekit.runtimes.pte_probe"
_LONG, _FLOAT = 4, 6  # runtime/core/portable_type/scalar_type.h
FIRST_CAPACITY = 512
_THREADS = threading.Lock()  # whose numbers are the process's: one model computes at a time


class ExecuTorchBackend:
    """A loaded program.

    Args:
        directory: The bundle.
        graph: The program's description.
        context: Tokens of the cache, fixed when the program was exported.
        options: How to load it.
        tried: The program is known not to crash, or this is the process that finds out.

    Raises:
        BundleError: ExecuTorch does not load the program, or it is not what the manifest describes.
    """

    runtime = Runtime("executorch")

    def __init__(
        self, directory: Path, graph: Graph, *, context: int, options: RuntimeOptions, tried: bool = False
    ) -> None:
        path = directory / graph.files[0]
        check_pte(path)
        if not tried:
            try_out(path, Trial("ExecuTorch", executorch_version(), PROBE))
        self._method: ExecuTorchMethod | None = ExecuTorchMethod(path, graph, context, options)
        self.end_tokens = self._method.end_tokens

    def decoder(self) -> ExecuTorchDecoder:
        """A new sequence.

        Raises:
            GenerationError: The model is closed.
        """
        if self._method is None:
            raise GenerationError("the model is closed", hint="load it again")
        return ExecuTorchDecoder(self._method)

    def release(self) -> None:
        """See `Backend.release`: there is nothing here that is known to be free."""

    def close(self) -> None:
        """Free the weights, once every decoder is closed too."""
        self._method = None


class ExecuTorchMethod:
    """The program's `forward(tokens [rows, new], start_pos [1]) -> logits [1, rows, vocabulary]`, and who holds its cache.

    Programs whose rotation depends on how long the sequence gets take that as well: `rope_length [1]`.

    Of the tokens the first row is read; how many rows there are says of how many of the last tokens logits are wanted, so
    that the stock runners' [1, new] gets one. It takes `most_tokens` at once, and gives `most_rows`.

    Attributes:
        lock: Held by who computes, or copies from or to the buffers.
        end_tokens: See `Backend.end_tokens`.
        cache: Views of the method's own memory, [kv_heads, context, head_dim]: key and value of each layer in turn.
    """

    def __init__(self, path: Path, graph: Graph, context: int, options: RuntimeOptions) -> None:
        self.graph, self.context, self.lock = graph, context, threading.RLock()
        self._threads = options.threads
        set_threads(self._threads)
        self._file = ProgramFile(path, mapped=options.mapped_weights)
        self._forward = self._file.load_method("forward")
        ends = self._file.constant("get_eos_ids")
        try:
            self.end_tokens = None if ends is None else frozenset(int(token) for token in ends)
            self.most_rows, self.most_tokens = _declared_rows(self._forward.method_meta(), graph)
            self.cache = [_buffer(self._forward, name, graph, context) for name in _buffer_names(graph)]
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise BundleError(
                f"{graph.files[0]} is not the program that the manifest describes", hint="convert the model again"
            ) from error
        self._holder: weakref.ref[ExecuTorchDecoder] | None = None

    @property
    def holder(self) -> ExecuTorchDecoder | None:
        """Whose keys and values are in the buffers."""
        return self._holder() if self._holder is not None else None

    def hold(self, decoder: ExecuTorchDecoder) -> None:
        """Give the buffers to a decoder, after the one that has them has saved what is its."""
        holder = self.holder
        if holder is decoder:
            return
        if holder is not None:
            holder.save()
        self._holder = None
        decoder.restore()
        self._holder = weakref.ref(decoder)

    def free(self, decoder: ExecuTorchDecoder) -> None:
        """The decoder needs the buffers no more, if it has them."""
        if self.holder is decoder:
            self._holder = None

    def compute(self, tokens: NDArray[np.int64], start: int, rows: int, rope_length: int) -> NDArray[np.float32]:
        """One forward of tokens that follow `start` others; logits [rows, vocabulary] in the method's memory."""
        ids = np.zeros((rows, len(tokens)), np.int64)
        ids[0] = tokens
        more = [torch.tensor([rope_length])] if "rope_length" in self.graph.inputs else []
        with _THREADS:
            set_threads(self._threads)
            others = torch.get_num_threads()
            # Small operators would wake PyTorch's threads, which then keep the processor from XNNPACK's.
            torch.set_num_threads(1)
            try:
                found = self._forward([torch.from_numpy(ids), torch.tensor([start]), *more], clone_outputs=False)
            except Exception as error:  # the bindings raise RuntimeError, and what C++ threw
                raise GenerationError(f"ExecuTorch failed: {first_line(error)}") from error
            finally:
                torch.set_num_threads(others)
        logits: NDArray[np.float32] = found[0][0].numpy()
        return logits


def _buffer_names(graph: Graph) -> list[str]:
    layout = graph.cache
    return [name.replace("{}", str(index)) for index in range(layout.layers) for name in layout.past]


def _buffer(method: Any, name: str, graph: Graph, context: int) -> NDArray[np.generic]:
    """A view of one of the method's buffers, [kv_heads, context, head_dim]."""
    tensor, layout = method.get_attribute(name), graph.cache
    heads_first = (layout.kv_heads, context, 1, layout.head_dim)  # earlier programs have tokens first
    tokens_first = (1, context, layout.kv_heads, layout.head_dim)
    expected = layout.dtype == "float32" and tensor.dtype is torch.float32
    if not expected or tensor.shape not in (heads_first, tokens_first):
        raise ValueError(name)
    whole: NDArray[np.generic] = tensor.numpy()
    return whole[:, :, 0] if tensor.shape == heads_first else whole[0].swapaxes(0, 1)


def _declared_rows(meta: Any, graph: Graph) -> tuple[int, int]:
    """Most rows of logits and most tokens of one forward; ValueError where it is not `forward` as this class has it."""
    inputs = 3 if "rope_length" in graph.inputs else 2
    if (meta.num_inputs(), meta.num_outputs()) != (inputs, 1):
        raise ValueError("forward")
    tokens, *numbers = (meta.input_tensor_meta(index) for index in range(inputs))
    logits = meta.output_tensor_meta(0)
    rows, new = tokens.sizes()
    agrees = (
        (tokens.dtype(), logits.dtype()) == (_LONG, _FLOAT)
        and all(number.dtype() == _LONG and tuple(number.sizes()) == (1,) for number in numbers)
        and tuple(logits.sizes()) == (1, rows, graph.vocab_size)
        and min(rows, new) >= 1
    )
    if not agrees:
        raise ValueError("forward")
    return rows, new


class ExecuTorchDecoder:
    """One sequence and, while another one computes, a copy of its cache."""

    def __init__(self, method: ExecuTorchMethod) -> None:
        self._method: ExecuTorchMethod | None = method
        self._lock = method.lock
        self._length = 0
        self._saved: list[NDArray[np.generic]] = []
        self._saved_length = 0  # how much of the copy is as in the buffers
        self._row = np.empty((1, method.graph.vocab_size), np.float32)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    @property
    def cache_bytes(self) -> int:
        """See `Decoder.cache_bytes`: the method's buffers, while it has them, and the copy."""
        method = self._method
        held = method is not None and method.holder is self
        return sum(array.nbytes for array in [*self._saved, *(method.cache if method is not None and held else ())])

    def forward(self, tokens: NDArray[np.int64], *, rows: int, rope_length: int) -> NDArray[np.float32]:
        """See `Decoder.forward`. What is more than the method takes at once is computed in parts.

        Raises:
            GenerationError: ExecuTorch fails, or the decoder is closed.
        """
        method = self._opened()
        if self._length + len(tokens) > method.context:
            raise ValueError(f"{self._length + len(tokens)} tokens in a context of {method.context}")
        if tokens.min() < 0 or tokens.max() >= method.graph.vocab_size:  # ExecuTorch would end the process
            raise ValueError(f"tokens outside of a vocabulary of {method.graph.vocab_size}")
        logits = self._row if rows == 1 else np.empty((rows, method.graph.vocab_size), np.float32)
        with method.lock:
            method.hold(self)
            done = filled = 0
            for new, wanted in _parts(len(tokens), rows, method.most_tokens, method.most_rows):
                part = tokens[done : done + new]
                found = method.compute(part, self._length + done, wanted or 1, rope_length)
                logits[filled : filled + wanted] = found[:wanted]  # others may compute before these are read
                done, filled = done + new, filled + wanted
            self._length += done
        return logits

    def rewind(self, length: int) -> None:
        """See `Decoder.rewind`: what lies beyond is overwritten."""
        if not 0 <= length <= self._length:
            raise ValueError(f"rewind to {length} of {self._length} tokens")
        with self._lock:  # another session may be saving this one meanwhile
            self._length, self._saved_length = length, min(length, self._saved_length)

    def forget(self, count: int) -> None:
        """See `Decoder.forget`: a fixed cache does not slide."""
        raise ValueError(f"forget {count} of {self._length} tokens: the program does not slide")

    def read_cache(self) -> list[NDArray[np.generic]]:
        """See `Decoder.read_cache`: views of the copy, which is made."""
        method = self._opened()
        with method.lock:
            if method.holder is self:
                self.save()
            if not self._saved:
                layout = method.graph.cache
                return [np.zeros((layout.kv_heads, 0, layout.head_dim), layout.dtype)] * (2 * layout.layers)
            return [array[:, : self._length] for array in self._saved]

    def write_cache(self, arrays: Sequence[NDArray[np.generic]], first_position: int = 0) -> None:
        """See `Decoder.write_cache`."""
        if first_position:
            raise ValueError(f"a cache that starts at position {first_position}")
        method = self._opened()
        with method.lock:
            method.free(self)
            self._length = self._saved_length = 0
            self._copy(arrays, arrays[0].shape[1])

    def close(self) -> None:
        """Free the copy, and let go of the weights."""
        method, self._method = self._method, None
        if method is not None:
            with method.lock:
                method.free(self)
                self._length = self._saved_length = 0
                self._saved = []

    def save(self) -> None:
        """Copy what is new in the method's buffers."""
        self._copy(self._opened().cache, self._length)

    def restore(self) -> None:
        """Copy all back into the method's buffers."""
        for buffer, array in zip(self._opened().cache, self._saved, strict=False):
            buffer[:, : self._length] = array[:, : self._length]

    def _copy(self, arrays: Sequence[NDArray[np.generic]], length: int) -> None:
        self._reserve(length)
        new = slice(self._saved_length, length)
        for saved, array in zip(self._saved, arrays, strict=False):  # nothing is reserved for no tokens
            saved[:, new] = array[:, new]
        self._length = self._saved_length = length

    def _reserve(self, length: int) -> None:
        capacity = self._saved[0].shape[1] if self._saved else 0
        if length <= capacity:
            return
        method = self._opened()
        layout, kept = method.graph.cache, self._saved
        capacity = min(max(2 * capacity, FIRST_CAPACITY, length), method.context)
        shape = (layout.kv_heads, capacity, layout.head_dim)
        self._saved = [np.empty(shape, layout.dtype) for _ in range(2 * layout.layers)]
        for new, old in zip(self._saved, kept, strict=False):
            new[:, : self._saved_length] = old[:, : self._saved_length]

    def _opened(self) -> ExecuTorchMethod:
        if self._method is None:
            raise GenerationError("the session is closed", hint="open another one")
        return self._method


def _parts(tokens: int, rows: int, most_tokens: int, most_rows: int) -> list[tuple[int, int]]:
    """How tokens are computed in parts: for each, how many tokens and how many of their last rows are wanted.

    Parts are of like size: one token alone would be computed by another kernel, which rounds otherwise.
    """
    first, *others = _even(rows, min(most_rows, max(most_tokens // 2, 1)))
    # The last one has at least half of `most_tokens`, if there are others.
    *before, last = _even(tokens - rows + first, most_tokens)
    return [*((new, 0) for new in before), (last, first), *((count, count) for count in others)]


def _even(total: int, most: int) -> list[int]:
    count = -(-total // most)
    return [total * (index + 1) // count - total * index // count for index in range(count)]
