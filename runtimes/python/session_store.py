"""Caches of closed sessions, kept under a byte budget so that a prompt that begins alike need not be computed again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

from .sequence import TokenSequence

__all__ = ["SessionStore"]

LEAST_SHARED = 16  # tokens: to compute fewer takes no longer than to look for them


class SessionStore:
    """Looks for prefixes in the sequences of open sessions and in those of closed ones, which it keeps.

    Safe to use from many threads. A sequence's own lock is taken inside of the store's, never the other way round.

    Args:
        budget_bytes: What all caches together may take before kept ones go, the least recently used first. Those of open
            sessions count but never go. 0 keeps and shares nothing.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._open: weakref.WeakSet[TokenSequence] = weakref.WeakSet()
        self._kept: list[TokenSequence] = []  # the most recently used last
        self._lock = threading.Lock()

    @property
    def kept_bytes(self) -> int:
        """Memory that the caches of closed sessions take."""
        return sum(sequence.cache_bytes for sequence in list(self._kept))

    def add(self, sequence: TokenSequence) -> None:
        """Let others share what an open session computes, until it is put away or garbage."""
        if self._budget_bytes:
            with self._lock:
                self._open.add(sequence)

    def lend(self, prompt: Sequence[int], to: TokenSequence) -> None:
        """Give a sequence the longest prefix of a prompt that another one has, unless its own is as long.

        A kept sequence that is a prefix as a whole changes hands; of any other one, the shared part is copied.
        """
        if not self._budget_bytes:
            return
        with self._lock:
            best, most = to, max(to.usable_prefix(prompt), LEAST_SHARED - 1)
            for sequence in (*self._kept, *self._open):
                shared = sequence.usable_prefix(prompt)
                if shared > most:
                    best, most = sequence, shared
            if best is to:
                return
            if best not in self._kept:
                to.copy_from(best, prompt[:most])
                return
            self._kept.remove(best)
            if most == len(best.tokens):
                to.adopt(best)
            else:
                self._kept.append(best)
                to.copy_from(best, prompt[:most])

    def put_away(self, sequence: TokenSequence) -> None:
        """Keep the cache of a session that is closing, where the budget allows it."""
        with self._lock:
            self._open.discard(sequence)
            if not self._budget_bytes or len(sequence.tokens) < LEAST_SHARED:
                sequence.close()
                return
            for kept in [kept for kept in self._kept if sequence.tokens[: len(kept.tokens)] == kept.tokens]:
                self._kept.remove(kept)
                kept.close()
            self._kept.append(sequence)
        self.make_room()

    def make_room(self) -> None:
        """Let kept caches go until all together are within the budget; to be called when one has grown."""
        if not self._kept:
            return
        with self._lock:
            total = sum(sequence.cache_bytes for sequence in (*self._kept, *self._open))
            while self._kept and total > self._budget_bytes:
                oldest = self._kept.pop(0)
                total -= oldest.cache_bytes
                oldest.close()

    def close(self) -> None:
        """Let all kept caches go, and keep none any more."""
        with self._lock:
            self._budget_bytes = 0
            while self._kept:
                self._kept.pop().close()
