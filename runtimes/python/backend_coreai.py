"""Core AI: an .aimodel run by the operating system's runtime on macOS 27, and by Core AI's reference interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import GenerationError, first_line
from edgekit.graph import Graph
from edgekit.quiet import quieted
from edgekit.runtime_options import RuntimeOptions

from .backend import Runtime

with quieted():
    from coreai.runtime import NDArray as CoreAIArray

    from .coreai_program import USES_SYSTEM, OpenProgram, open_program, wait_for

__all__ = ["CoreAIBackend"]

_FIRST_CAPACITY = 256  # tokens; doubled as it fills, as Apple's own runtime for language models does


class CoreAIBackend:
    """A loaded program.

    Args:
        directory: The bundle.
        graph: The program's description.
        context: Most tokens of a cache.
        options: Not used: Core AI chooses itself.

    Raises:
        BundleError: The program is not taken, or is not what the manifest describes.
    """

    end_tokens = None  # of the bundle, which this format does not name
    runtime = (
        Runtime("coreai")
        if USES_SYSTEM
        else Runtime(
            "coreai-linux", "Core AI's reference interpreter: it has a device's numbers, not its speed", is_slow=True
        )
    )

    def __init__(self, directory: Path, graph: Graph, *, context: int, options: RuntimeOptions) -> None:
        self.graph, self.context = graph, context
        with quieted():
            self._program: OpenProgram | None = wait_for(open_program((directory / graph.files[0]).parent, graph))

    def decoder(self) -> CoreAIDecoder:
        """A new sequence.

        Raises:
            GenerationError: The model is closed.
        """
        if self._program is None:
            raise GenerationError("the model is closed", hint="load it again")
        return CoreAIDecoder(self.graph, self._program, self.context)

    def release(self) -> None:
        """See `Backend.release`: there is nothing here that is known to be free."""

    def close(self) -> None:
        """Free the weights, once every decoder is closed too."""
        self._program = None


class CoreAIDecoder:
    """One sequence and its cache, which grows."""

    def __init__(self, graph: Graph, program: OpenProgram, context: int) -> None:
        self._graph, self._context = graph, context
        self._program: OpenProgram | None = program
        self._states: dict[str, CoreAIArray] = {}  # keys and values, [layers, 1, kv_heads, capacity, head_dim]
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    @property
    def cache_bytes(self) -> int:
        """See `Decoder.cache_bytes`."""
        return sum(cache.nbytes for cache in self._caches())

    def forward(self, tokens: NDArray[np.int64], *, rows: int, rope_length: int) -> NDArray[np.float32]:
        """See `Decoder.forward`.

        Raises:
            GenerationError: Core AI fails, or the decoder is closed.
        """
        program, end = self._open_program(), self._length + len(tokens)
        if end > self._context:
            raise ValueError(f"{end} tokens in a context of {self._context}")
        self._reserve(end)
        numbers = {
            "tokens": tokens[None],
            "positions": np.arange(end)[None],
            "rope_length": np.array([max(rope_length, end)]),
        }
        inputs = {name: numbers[meaning].astype(np.int32) for meaning, name in self._graph.inputs.items()}
        try:
            found = wait_for(program.run(inputs, self._states))
        except RuntimeError as error:
            raise GenerationError(f"Core AI failed: {first_line(error)}") from error
        self._length = end
        return found[self._graph.outputs["logits"]][0, -rows:].astype(np.float32)

    def rewind(self, length: int) -> None:
        """See `Decoder.rewind`."""
        if not 0 <= length <= self._length:
            raise ValueError(f"rewind to {length} of {self._length} tokens")
        self._length = length

    def forget(self, count: int) -> None:
        """See `Decoder.forget`: positions are those of the cache here."""
        raise ValueError("Core AI programs do not slide")

    def read_cache(self) -> list[NDArray[np.generic]]:
        """See `Decoder.read_cache`: views of the buffers."""
        self._reserve(self._length)
        layers = range(self._graph.cache.layers)
        return [cache[layer, 0, :, : self._length] for layer in layers for cache in self._caches()]

    def write_cache(self, arrays: Sequence[NDArray[np.generic]], first_position: int = 0) -> None:
        """See `Decoder.write_cache`."""
        if first_position:
            raise ValueError(f"a cache that starts at position {first_position}")
        self._open_program()
        self._length, length = 0, arrays[0].shape[1]
        new = self._empty(length)
        for index, array in enumerate(arrays):
            new[index % 2][index // 2, 0, :, :length] = array
        self._hold(new)
        self._length = length

    def close(self) -> None:
        """Free the cache and let go of the weights."""
        self._program = None
        self._states, self._length = {}, 0

    def _open_program(self) -> OpenProgram:
        if self._program is None:
            raise GenerationError("the session is closed", hint="open another one")
        return self._program

    def _caches(self) -> list[NDArray[Any]]:
        """What is in the states now: a call may put others in their place."""
        return [state.numpy() for state in self._states.values()]

    def _reserve(self, tokens: int) -> None:
        """Make room for as many tokens; those that are there are kept."""
        caches = self._caches()
        if caches and tokens <= caches[0].shape[3]:
            return
        new = self._empty(tokens)
        for cache, old in zip(new, caches, strict=False):
            cache[..., : self._length, :] = old[..., : self._length, :]
        self._hold(new)

    def _empty(self, tokens: int) -> list[NDArray[Any]]:
        """Caches of zeros with room for as many tokens."""
        capacity, layout = min(_FIRST_CAPACITY, self._context), self._graph.cache
        while capacity < tokens:
            capacity = min(2 * capacity, self._context)
        shape = (layout.layers, 1, layout.kv_heads, capacity, layout.head_dim)
        return [np.zeros(shape, layout.dtype) for _ in layout.past]

    def _hold(self, caches: list[NDArray[Any]]) -> None:
        names = self._graph.cache.past
        self._states = {name: CoreAIArray(cache) for name, cache in zip(names, caches, strict=True)}
