"""What a backend must do. Everything above it (sampling, text, templates, sessions) is written once, for all of them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Backend", "Decoder"]


class Decoder(Protocol):
    """One sequence and its key-value cache."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""
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
        """Forget all tokens from `length` on."""
        ...

    def close(self) -> None:
        """Free the cache; may be called again."""
        ...


class Backend(Protocol):
    """Loaded weights."""

    def decoder(self) -> Decoder:
        """A new sequence with an empty cache."""
        ...

    def close(self) -> None:
        """Free the weights."""
        ...
