"""What a backend must do. Everything above it (sampling, text, templates, sessions) is written once, for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Backend", "Decoder", "Runtime"]


@dataclass(frozen=True, slots=True)
class Runtime:
    """What computes the programs of a backend, here.

    Attributes:
        name: As quality cards have it under `executed`.
        note: What its users must know of it, in one line; empty where there is nothing.
        is_slow: It is there for its numbers, not for its speed: verification compares fewer positions.
    """

    name: str
    note: str = ""
    is_slow: bool = False


class Decoder(Protocol):
    """One sequence and its key-value cache."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Memory that the cache takes, in bytes; more than its tokens need, since it grows in steps."""
        ...

    def forward(self, tokens: NDArray[np.int64], *, rows: int, rope_length: int) -> NDArray[np.float32]:
        """Append tokens; logits [rows, vocabulary] of the last `rows` of them, valid until the next call.

        Args:
            tokens: int64 [new].
            rows: From 1 to the number of tokens.
            rope_length: Length the sequence is known to reach; longer than the program's `rope_switch`, the long rotary
                factors apply. Ignored by programs that have none.
        """
        ...

    def rewind(self, length: int) -> None:
        """Drop all tokens of the cache from `length` on; after `rewind(0)` the next token has position 0."""
        ...

    def forget(self, count: int) -> None:
        """Drop the oldest tokens of the cache. Those left keep their positions, and new ones follow them.

        Only for programs that slide: see `Graph.positions`.
        """
        ...

    def read_cache(self) -> list[NDArray[np.generic]]:
        """The cache, [kv_heads, length, head_dim]: key and value of each layer in turn; valid until the next call."""
        ...

    def write_cache(self, arrays: Sequence[NDArray[np.generic]], first_position: int = 0) -> None:
        """Replace the cache by a copy of what `read_cache` returned, whose oldest token has this position."""
        ...

    def close(self) -> None:
        """Free the cache; may be called again."""
        ...


class Backend(Protocol):
    """Loaded weights."""

    @property
    def runtime(self) -> Runtime | None:
        """What computes; None where it is an execution provider of ONNX Runtime, as `ProviderChoice` has it."""
        ...

    @property
    def end_tokens(self) -> frozenset[int] | None:
        """What ends a reply by what the program itself says, for other runtimes to read; None where it says nothing."""
        ...

    def decoder(self) -> Decoder:
        """A new sequence with an empty cache."""
        ...

    def release(self) -> None:
        """Give back memory that is not needed until the next forward; called when a model is loaded and when a reply ends."""
        ...

    def close(self) -> None:
        """Free the weights."""
        ...
