"""Choosing the next token from a row of logits, for every backend.

What is done to a row, in this order, which is that of transformers where it has the step:

1. `penalties`: logit bias, repetition penalty, presence and frequency penalty, end tokens before min_tokens.
2. `logit_filters`: temperature, top-k, top-p, min-p, typical-p. Greedy decoding (temperature 0) skips them.
3. A number from [0, 1) picks the first token, by rising id, at which the running sum of the probabilities passes it.

A structure forbids tokens in the logits themselves, before all of this.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from edgekit.session import GenerateOptions

from .logit_filters import Floats, Ids, as_row, check_peak, draw_place, filter_scores
from .penalties import Penalties

__all__ = ["Sampler"]


class Sampler:
    """Picks the tokens of one reply.

    Tell it the prompt once with `observe`. `next` picks a token and accepts it: the generation loop needs no more. Who
    picks another way, from `distribution` and `uniform`, tells it with `accept`, in the order of the text. The same seed,
    options and logits give the same tokens. All that a choice depends on is the options, the tokens observed and accepted,
    and the numbers drawn. Not safe to share between threads.

    Args:
        options: Reads temperature, top_k, top_p, min_p, typical_p, min_tokens, repetition_penalty, presence_penalty,
            frequency_penalty, logit_bias, stop_tokens and seed.
        end_tokens: The model's end tokens, which min_tokens forbids together with stop_tokens.
        stream: Of several replies with one seed, the number of this one: each draws its own numbers. None is the stream of
            a single reply, which is none of those.
    """

    def __init__(
        self, options: GenerateOptions, end_tokens: frozenset[int] = frozenset(), *, stream: int | None = None
    ) -> None:
        self._options = options
        # a spawn key, not a longer seed: numpy takes the seeds 5 and (5, 0) for the same
        key = () if stream is None else (stream,)
        self._random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(options.seed, spawn_key=key)))
        self._penalties = Penalties(options, end_tokens)
        # memory of a vocabulary's size, allocated anew, costs more in page faults than all arithmetic on it
        self._buffer: Floats = np.empty(0, dtype=np.float32)

    def observe(self, tokens: Iterable[int]) -> None:
        """Mark tokens of the prompt, for the repetition penalty; each counts once however often it comes.

        Raises:
            ValueError: A token is negative.
        """
        self._penalties.observe(tokens)

    def accept(self, token: int) -> None:
        """Mark a token of the reply: all penalties and min_tokens count it.

        Raises:
            ValueError: It is negative.
        """
        self._penalties.accept(token)

    def uniform(self) -> float:
        """Draw the next number of the stream: from [0, 1), 53 bits of one step of the generator."""
        return float(self._random.random())

    def next(self, logits: Floats) -> int:
        """Pick the next token and accept it. Greedy decoding draws no number.

        Args:
            logits: float32 [vocab], left unchanged. Minus infinity forbids a token.

        Raises:
            GenerationError: The logits hold NaN or plus infinity or forbid every token, the options forbid all that they
                allow, or logit_bias or stop_tokens name a token outside the vocabulary.
            ValueError: The shape is not [vocab], or an observed or accepted token is outside of it.
        """
        token = self.pick(logits, 0.0 if self._options.temperature == 0 else self.uniform())
        self.accept(token)
        return token

    def pick(self, logits: Floats, uniform: float) -> int:
        """Return the token that `next` picks if the stream gives this number. Changes nothing; raises what `next` does."""
        if self._options.temperature == 0:
            scores = self._penalized(logits)
            token = int(scores.argmax())  # the first of equals, and NaN for the greatest
            check_peak(float(scores[token]))
            return token
        scores, peak = self._penalize(logits)
        ids, weights = filter_scores(scores, peak, self._options, self._buffer)
        place = draw_place(weights, uniform)
        return place if ids is None else int(ids[place])

    def distribution(self, logits: Floats) -> tuple[Ids, NDArray[np.float64]]:
        """Return what `next` draws from: the kept token ids, int64 [kept] ascending, and their probabilities.

        EdgeKit does not generate with it: its tests compare it with other implementations. Greedy decoding keeps one
        token. Takes the logits of `next`, changes nothing and raises the same errors.
        """
        scores, peak = self._penalize(logits)
        if self._options.temperature == 0:
            return np.array([scores.argmax()], dtype=np.int64), np.ones(1)
        ids, weights = filter_scores(scores, peak, self._options, self._buffer)
        probabilities = weights.astype(np.float64)
        probabilities /= probabilities.sum()
        return np.arange(len(weights), dtype=np.int64) if ids is None else ids, probabilities

    def _penalize(self, logits: Floats) -> tuple[Floats, np.float32]:
        """Return the logits with the penalties, and the greatest of them."""
        scores = self._penalized(logits)
        peak = scores.max()
        check_peak(float(peak))
        return scores, peak

    def _penalized(self, logits: Floats) -> Floats:
        row = as_row(logits)
        if len(self._buffer) != len(row):
            self._buffer = np.empty_like(row)
        return self._penalties.apply(row, self._buffer)
