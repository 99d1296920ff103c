"""What changes the logits before a token is chosen: biases, penalties on what was said, and a minimum length.

The order is that of the generation loop of transformers where it has them: logit bias (its sequence bias), repetition
penalty (CTRL, arXiv:1909.05858), then presence and frequency penalty as OpenAI defines them, over generated tokens only,
in the place vLLM gives them, then the minimum of new tokens. A token that the model forbids stays forbidden throughout.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import GenerationError
from edgekit.session import GenerateOptions

from .logit_filters import FLOAT32_MAX, Floats, Ids, check_peak, to_float32

__all__ = ["Penalties", "check_token_ids"]


def check_token_ids(options: GenerateOptions, vocab_size: int) -> None:
    """Refuse options that name tokens which the model does not have.

    Raises:
        GenerationError: A token of logit_bias or stop_tokens is outside the vocabulary.
    """
    for name, tokens in (("logit_bias", options.logit_bias), ("stop_tokens", options.stop_tokens)):
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise GenerationError(
                    f"{name} holds the token {token}, the vocabulary has {vocab_size:,}",
                    hint=f"use ids from 0 to {vocab_size - 1}",
                )


class Penalties:
    """The penalties of one reply, and the tokens they depend on.

    Args:
        options: Reads min_tokens, repetition_penalty, presence_penalty, frequency_penalty, logit_bias and stop_tokens.
        end_tokens: Forbidden, like stop_tokens, until min_tokens were accepted. Ids outside the vocabulary do not matter.
    """

    def __init__(self, options: GenerateOptions, end_tokens: frozenset[int]) -> None:
        self._options = options
        self._end_tokens = end_tokens
        self._repetition = options.repetition_penalty != 1
        self._counting = options.presence_penalty != 0 or options.frequency_penalty != 0
        self._changes_anything = (
            self._repetition or self._counting or bool(options.logit_bias) or options.min_tokens > 0
        )
        self._seen = _TokenCounts()
        self._generated = _TokenCounts()
        self._accepted = 0
        self._vocab_size = 0
        self._ends: Ids = np.empty(0, dtype=np.int64)
        self._biased: Ids = np.empty(0, dtype=np.int64)
        self._biases: Floats = np.empty(0, dtype=np.float32)

    def observe(self, tokens: Iterable[int]) -> None:
        """Mark tokens of the prompt: the repetition penalty counts them, each once, nothing else does.

        Raises:
            ValueError: A token is negative.
        """
        if self._repetition:
            for token in dict.fromkeys(tokens):
                self._seen.add(token)

    def accept(self, token: int) -> None:
        """Mark a token of the reply.

        Raises:
            ValueError: It is negative.
        """
        self.observe((token,))
        if self._counting:
            self._generated.add(token)
        self._accepted += 1

    def apply(self, logits: Floats, buffer: Floats) -> Floats:
        """Return the logits with all of them: the array itself if nothing changes, else the buffer.

        Args:
            logits: float32 [vocab], left unchanged.
            buffer: float32 [vocab], overwritten.

        Raises:
            GenerationError: A token of logit_bias or stop_tokens is outside the vocabulary, or the logits are to be
                changed and hold NaN or plus infinity, or forbid every token before or after it.
            ValueError: An observed or accepted token is outside the vocabulary.
        """
        self._prepare(len(logits))
        if not self._changes_anything:
            return logits
        ends = self._ends if self._accepted < self._options.min_tokens else self._ends[:0]
        (seen, _), (generated, counts) = self._seen.view(len(logits)), self._generated.view(len(logits))
        if not (len(self._biased) or len(seen) or len(generated) or len(ends)):
            return logits
        # what the model gets wrong must show as that, not as the options' doing
        check_peak(float(logits.max()))
        np.copyto(buffer, logits)
        with np.errstate(over="ignore", under="ignore"):
            buffer[self._biased] = _lower(buffer[self._biased] + self._biases)
            if len(seen):
                buffer[seen] = self._repeated(buffer[seen])
            if len(generated):
                buffer[generated] = _lower(buffer[generated] - self._amounts(counts))
        buffer[ends] = -np.inf
        if buffer.max() == -np.inf:
            raise self._nothing_left()
        return buffer

    def _repeated(self, values: Floats) -> Floats:
        penalty = to_float32(self._options.repetition_penalty)
        return _lower(np.where(values < 0, values * penalty, values / penalty))

    def _amounts(self, counts: NDArray[np.int64]) -> Floats:
        options = self._options
        amounts = options.presence_penalty + options.frequency_penalty * counts
        limited: Floats = np.clip(amounts, -FLOAT32_MAX, FLOAT32_MAX).astype(np.float32)
        return limited

    def _prepare(self, vocab_size: int) -> None:
        if vocab_size == self._vocab_size:
            return
        options = self._options
        check_token_ids(options, vocab_size)
        ends = self._end_tokens.union(options.stop_tokens)
        self._ends = np.array(sorted(token for token in ends if token < vocab_size), dtype=np.int64)
        self._biased = np.array(list(options.logit_bias), dtype=np.int64)
        # a bias of plus infinity in float32 would make NaN of a forbidden token
        biases = np.array(list(options.logit_bias.values()), dtype=np.float64)
        with np.errstate(over="ignore"):
            self._biases = np.minimum(biases, FLOAT32_MAX).astype(np.float32)
        self._vocab_size = vocab_size

    def _nothing_left(self) -> GenerationError:
        active = (
            ("logit_bias", len(self._biased) > 0),
            ("min_tokens", self._accepted < self._options.min_tokens),
        )
        names = [name for name, is_active in active if is_active] or ["the penalties"]
        parts = ", ".join(["the model", "its structure", *names[:-1]])
        return GenerationError(
            f"no token is left that {parts} and {names[-1]} allow", hint="forbid less, or ask for fewer tokens at least"
        )


class _TokenCounts:
    """Tokens and how often they came, as arrays at any time, so that a step converts nothing."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids: Ids = np.empty(256, dtype=np.int64)
        self._counts: NDArray[np.int64] = np.zeros(256, dtype=np.int64)
        self._greatest = -1

    def add(self, token: int) -> None:
        if token < 0:
            raise ValueError(f"token {token} is negative")
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1
        self._greatest = max(self._greatest, token)

    def view(self, vocab_size: int) -> tuple[Ids, NDArray[np.int64]]:
        if self._greatest >= vocab_size:
            raise ValueError(f"the observed token {self._greatest} is outside the {vocab_size} of the logits")
        return self._ids[: len(self._places)], self._counts[: len(self._places)]


def _lower(values: Floats) -> Floats:
    """Return the values with overflow to plus infinity taken back."""
    lowered: Floats = np.minimum(values, np.float32(FLOAT32_MAX))
    return lowered
