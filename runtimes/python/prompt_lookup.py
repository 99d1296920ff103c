"""Drafts by copying: what followed the last words of a text the last time they were written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeAlias

__all__ = ["Evidence", "Prediction", "PromptLookup"]

Evidence: TypeAlias = Literal["ambiguous", "single", "repeated", "forced"]
_MOST_UPDATED = 8


@dataclass(frozen=True, slots=True)
class Prediction:
    """A token that may come next.

    Attributes:
        match_length: Tokens before it that were followed by it earlier, those predicted before it among them.
        evidence: Whether these were followed by different tokens so far, by this one once, or only by this one several
            times; it says more about the chances than the length does. What a structure demands next is forced.
    """

    token: int
    match_length: int
    evidence: Evidence


class PromptLookup:
    """An index of a growing text that finds the longest of its suffixes which it also holds earlier.

    It is the suffix automaton of the tokens (Blumer et al., 1985; grown one token at a time): exact at any length, in
    amortised constant time and about half a kilobyte a token. Not safe to share between threads.

    Args:
        tokens: What is written so far.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        # by state: transitions, suffix link, longest length, where an occurrence of its strings ends, how many there are
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._end = [-1]
        self._count = [0]
        self._last = 0
        self._source = -1
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> Sequence[int]:
        """The indexed text; not to be changed."""
        return self._tokens

    @property
    def match_length(self) -> int:
        """Tokens in the longest suffix that also occurs earlier; 0 where there is none."""
        return self._length[self._link[self._last]] if self._last else 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            self._append(token)

    def predictions(self) -> Iterator[Prediction]:
        """The tokens that followed the longest match, the latest of several as a rule, one after another without end.

        A match that runs up to the end of the text is continued with the predictions themselves, as repetition goes on.
        """
        if self._source < 0:
            return
        state, length, place = self._link[self._last], self.match_length, self._source
        earlier = self._count[state] - 1  # one of the occurrences is the suffix itself
        while True:
            token, follow = self._tokens[place], self._next[state]
            evidence: Evidence = "ambiguous" if len(follow) > 1 else "repeated" if earlier > 1 else "single"
            yield Prediction(token, length, evidence)
            state = follow.get(token, self._last)  # nothing has followed the end of the text yet
            earlier = self._count[state]
            length += 1
            place = place + 1 if place + 1 < len(self._tokens) else self._source

    def draft(self, most: int) -> list[int]:
        """The first predicted tokens, `most` of them; none without a match."""
        return [prediction.token for prediction in islice(self.predictions(), max(most, 0))]

    def _append(self, token: int) -> None:
        position = len(self._tokens)
        self._tokens.append(token)
        state = self._add_state({}, 0, self._length[self._last] + 1, position, 1)
        follow, link = self._next, self._link
        before = self._last
        while before >= 0 and token not in follow[before]:
            follow[before][token] = state
            before = link[before]
        if before >= 0:
            link[state] = self._state_after(before, token)
        self._last = state
        match = link[state]
        self._source = self._end[match] + 1 if match else -1
        # strings of a state and of its links end here too; only the longest are told, so that the time stays constant
        for _ in range(_MOST_UPDATED):
            if not match:
                break
            self._end[match] = position
            self._count[match] += 1
            match = link[match]

    def _state_after(self, before: int, token: int) -> int:
        """The state of the longest string of `before` with the token behind it, split off where it has longer ones."""
        follow, link = self._next, self._link
        state = follow[before][token]
        length = self._length[before] + 1
        if self._length[state] == length:
            return state
        copy = self._add_state(follow[state].copy(), link[state], length, self._end[state], self._count[state])
        link[state] = copy
        while before >= 0 and follow[before].get(token) == state:
            follow[before][token] = copy
            before = link[before]
        return copy

    def _add_state(self, follow: dict[int, int], link: int, length: int, end: int, count: int) -> int:
        self._next.append(follow)
        self._link.append(link)
        self._length.append(length)
        self._end.append(end)
        self._count.append(count)
        return len(self._next) - 1
