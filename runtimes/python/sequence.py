"""Tokens and their key-value cache: what a conversation has computed so far."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import Program
from edgekit.errors import GenerationError

from .backend import Backend

__all__ = ["PREFILL_CHUNK", "TokenSequence"]

# A row computed alone takes other kernels, which round otherwise, than rows computed together; those do not depend on how
# many there are. Prompts are never computed in single rows: so a reply is the same whether its prompt was cached or not.
LEAST_ROWS = 2
PREFILL_CHUNK = 128  # tokens computed at a time: fastest here, and bounds activations and how long a cancel waits
ROWS_CHUNK = 32  # where each token has a row of logits: half a megabyte each, in a vocabulary of 128,000


class TokenSequence:
    """Tokens and a cache that always agree.

    One thread at a time may change a sequence; any number may copy from it meanwhile (`adopt`, `copy_from`, `snapshot`
    of others wait for the forward that is running, not for the whole reply).

    Attributes:
        tokens: All tokens, also those that have left the cache.
        forgotten: How many of them have left it: only with a sliding window.
        slides: Whether the cache may let go of what is outside of the window, to make room.
    """

    def __init__(self, backend: Backend, program: Program) -> None:
        graph = program.graph
        self.tokens: list[int] = []
        self.forgotten = 0
        self.slides = False
        self.lock = threading.Lock()
        self._backend, self._program = backend, program
        self._decoder = backend.decoder()
        self._context, self._window, self._rope_switch = program.context, graph.window, graph.rope_switch
        self._long_rope = False

    @property
    def cache_bytes(self) -> int:
        """Memory that the cache takes."""
        return self._decoder.cache_bytes

    @property
    def chunk(self) -> int:
        """Most tokens of one forward."""
        if not self.slides:
            return PREFILL_CHUNK
        room = self._context - self._window + 1
        return min(PREFILL_CHUNK, max(room // 2, min(room, LEAST_ROWS)))

    def usable_prefix(self, prompt: Sequence[int]) -> int:
        """How many leading tokens of a prompt need not be computed again, with what is cached here.

        Never all of them: the logits of the last one are needed, and it is not computed alone.
        """
        if self._is_long(len(prompt)) != self._long_rope:  # rotated otherwise: nothing can be kept
            return 0
        return self._shared(prompt[:-LEAST_ROWS])

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep what the cache shares with a prompt; how much that is."""
        with self.lock:
            shared = self.usable_prefix(prompt)
            self._long_rope = self._is_long(len(prompt))
            self._rewind(shared)
            return shared

    def extend(self, new: Sequence[int], *, all_rows: bool = False) -> Iterator[NDArray[np.float32]]:
        """Append tokens, in chunks; the logits of each forward, [rows, vocabulary], valid until the next one.

        Each forward is computed when it is asked for: who stops asking leaves a sequence that holds what is done.

        Args:
            new: What to append. Where this reaches past the model's original context, all is computed again with the long
                rotary factors, as transformers does.
            all_rows: Logits of each token, not only of the last one of each forward.
        """
        total = len(self.tokens) + len(new)
        if self._is_long(total) != self._long_rope:
            new = [*self.tokens, *new]
            with self.lock:
                self._long_rope = self._is_long(total)
                self._rewind(0)
        chunk = min(self.chunk, ROWS_CHUNK) if all_rows else self.chunk
        done = 0
        while done < len(new):
            count = min(chunk, len(new) - done)
            if count > LEAST_ROWS and 0 < len(new) - done - count < LEAST_ROWS:
                count -= 1
            yield self.forward(new[done : done + count], all_rows=all_rows, rope_length=total)
            done += count

    def forward(
        self, new: Sequence[int], *, all_rows: bool = False, rope_length: int | None = None
    ) -> NDArray[np.float32]:
        """Append at most a chunk of tokens that do not cross the switch; see `extend`."""
        with self.lock:
            if self.slides:
                self._make_room(len(new))
            rope_length = rope_length or len(self.tokens) + len(new)
            rows = len(new) if all_rows else 1
            logits = self._decoder.forward(np.array(new, np.int64), rows=rows, rope_length=rope_length)
            self.tokens.extend(new)
            return logits

    def crosses_switch(self, new: int) -> bool:
        """Whether appending this many tokens would change the rotation of all of them."""
        return self._is_long(len(self.tokens) + new) != self._long_rope

    def rewind(self, length: int) -> None:
        """Drop all tokens from `length` on.

        Raises:
            GenerationError: There are fewer tokens, or those that the next one would see have left the cache.
        """
        with self.lock:
            if not 0 <= length <= len(self.tokens):
                raise GenerationError(f"can't rewind to {length} of {len(self.tokens)} tokens")
            if length and not self._sees_its_window(length):
                raise GenerationError(
                    f"can't rewind to {length} tokens: the cache has let go of the first {self.forgotten}",
                    hint="rewind to 0, or use another context policy",
                )
            self._rewind(length)

    def fork(self) -> TokenSequence:
        """A copy."""
        other = TokenSequence(self._backend, self._program)
        other.slides = self.slides
        other.copy_from(self, self.tokens)
        return other

    def copy_from(self, other: TokenSequence, tokens: Sequence[int]) -> None:
        """Copy what another sequence of the same model shares with these tokens."""
        with other.lock, self.lock:
            shared = other._shared(tokens)
            forgotten = other.forgotten if shared else 0
            arrays = [array[:, : shared - forgotten] for array in other._decoder.read_cache()]
            self.tokens = []  # an interrupt must not leave tokens beside another's cache
            self._decoder.write_cache(arrays, forgotten)
            self.tokens, self.forgotten, self._long_rope = other.tokens[:shared], forgotten, other._long_rope

    def adopt(self, other: TokenSequence) -> None:
        """Take over tokens and cache of another sequence of the same model, which is not to be used again."""
        with other.lock, self.lock:
            self.tokens = []
            self._decoder.close()
            self._decoder = other._decoder
            self.tokens, self.forgotten, self._long_rope = other.tokens, other.forgotten, other._long_rope

    def snapshot(self) -> tuple[list[int], int, bool, list[NDArray[np.generic]]]:
        """Tokens, how many of them have left the cache, whether the long rotary factors apply, and the cache."""
        with self.lock:
            self._rewind(self._shared(self.tokens))
            return self.tokens, self.forgotten, self._long_rope, self._decoder.read_cache()

    def load(self, tokens: list[int], forgotten: int, long_rope: bool, cache: list[NDArray[np.generic]]) -> None:
        """The opposite of `snapshot`."""
        with self.lock:
            self._decoder.write_cache(cache, forgotten)
            self.tokens, self.forgotten, self._long_rope = tokens, forgotten, long_rope

    def close(self) -> None:
        """Free the cache."""
        with self.lock:
            self.tokens, self.forgotten = [], 0
            self._decoder.close()

    def _make_room(self, new: int) -> None:
        """Let go of what the new tokens do not see, where they do not fit the cache: seldom, and then much at once.

        Half of what could go stays, so that the end of a reply can be taken back.
        """
        cached, seen = self._decoder.length, self._window - 1
        if cached + new > self._context:
            unseen = cached - seen - (self._context - seen - new) // 2
            self._decoder.forget(unseen)
            self.forgotten += unseen

    def _rewind(self, length: int) -> None:
        if not length:
            self.forgotten = 0
        self._decoder.rewind(length - self.forgotten)
        del self.tokens[length:]

    def _shared(self, tokens: Sequence[int]) -> int:
        """How many leading tokens are the same, and cached so that the next one can be computed."""
        cached = self.forgotten + self._decoder.length
        if self._window and cached < len(self.tokens):
            return 0  # an interrupt came as the cache let go of something: what it holds is not known
        shared = 0
        for mine, wanted in zip(self.tokens[:cached], tokens, strict=False):
            if mine != wanted:
                break
            shared += 1
        return shared if self._sees_its_window(shared) else 0

    def _sees_its_window(self, length: int) -> bool:
        """Whether all that the token at position `length` sees is in the cache."""
        return self.forgotten == 0 or self.forgotten <= length - (self._window - 1)

    def _is_long(self, length: int) -> bool:
        return 0 < self._rope_switch < length
