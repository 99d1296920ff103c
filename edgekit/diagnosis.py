"""Diagnosis: what a program that fails its bound is likely to have wrong, from where its predictions depart.

Program and reference predict the same text, and the program predicts it in several ways that must agree: at once, one token at a
time, without the tokens that follow, and on a cache that held something else before. Which of these depart, and from which
position on, tells faults of weights, positions, masks and caches apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.divergence import log_probabilities

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekit.runtimes.backend import Decoder
    from edgekit.runtimes.engine import LoadedModel

__all__ = [
    "ALONE_TIMES",
    "CACHE",
    "LATE",
    "MASK",
    "NOT_FINITE",
    "ROTATION",
    "STALE",
    "WEIGHTS",
    "WINDOW",
    "diagnose",
    "kl_alone",
]

# Mean KL in nats between two ways of one program to predict the same: orders of summation leave far less.
SAME_PROGRAM = 0.02
FIRST_TOKENS, STEPS, TEXT = 6, 8, 1024  # tokens tried alone; decoded one at a time; of the text
SLOW_FIRST_TOKENS, SLOW_STEPS, SLOW_TEXT = 2, 2, 64
AT_ONCE = 64
EDGE = 6  # positions looked at before and behind the end of a window
EARLY = 8  # a fault of every position shows before this one
SHARE_AT_FIRST = 0.1  # of the later divergence: a token alone that has less of it agrees
# A position departs where it has so many times what a token alone has, which is rounding: sound positions of tiny models for
# NPUs have up to 11 times that. Less than what sums in another order cost is never a departure.
ALONE_TIMES, LEAST_DEPARTURE = 16.0, 0.005

WEIGHTS = (
    "it departs at the first token, which attends to nothing but itself: weights are rounded too coarsely, or they, their "
    "scales or places are wrong (embedding, values, outputs, feed-forward, norms or head)"
)
ROTATION = (
    "it agrees at the first token and departs with the next ones: positions (the rotation), queries or keys are wrong"
)
WINDOW = "it agrees until the sliding window of {window} is full and departs then: the mask of the window is wrong"
LATE = "it agrees up to position {position} and departs later: positions, masks or the cache of long texts are wrong"
NOT_FINITE = "it computes values that are not finite numbers"
MASK = "what it predicts after a token depends on tokens that follow it: the mask is wrong"
CACHE = "it agrees on a text at once and departs one token at a time: what is kept in the cache is wrong"
STALE = "it predicts otherwise after a rewind: the cache is stale"


def diagnose(
    model: LoadedModel, reference: LoadedModel, tokens: Sequence[int], *, bound: float, windows: Iterable[int] = ()
) -> str:
    """Name the symptoms, in one clause; empty where no probe departs by more than the bound.

    Args:
        model: The program.
        reference: The same source in full precision.
        tokens: A text of at least two tokens.
        bound: Mean KL that the program may have.
        windows: The model's sliding windows.
    """
    slow = model.provider.is_slow
    probes = _Probes(model, reference, list(tokens)[: SLOW_TEXT if slow else TEXT], bound)
    found = probes.of_itself(SLOW_STEPS if slow else STEPS)
    return found or probes.by_position(kl_alone(model, reference, tokens), windows)


def kl_alone(model: LoadedModel, reference: LoadedModel, tokens: Sequence[int]) -> float:
    """Mean KL after a token alone, of a text's first few: it attends to itself, positions and masks have no part in it."""
    count = SLOW_FIRST_TOKENS if model.provider.is_slow else FIRST_TOKENS
    tried = list(dict.fromkeys(tokens[:count]))
    pairs = [(_fresh(reference, [token], [0]), _fresh(model, [token], [0])) for token in tried]
    return sum(float(_kl(*pair).mean()) for pair in pairs) / len(tried)


@dataclass(frozen=True, slots=True)
class _Probes:
    """One text, as program and reference predict it."""

    model: LoadedModel
    reference: LoadedModel
    text: list[int]
    bound: float

    def of_itself(self, steps: int) -> str:
        """Whether the program agrees with itself, and with the reference in one way but not in another."""
        import numpy as np

        text = self.text[:AT_ONCE]
        half = len(text) // 2
        positions = range(half, min(half + steps, len(text) - 1))
        with closing(self.model.backend.decoder()) as decoder:
            at_once = _predictions(decoder, text, positions)
            _hold_another(decoder, text)
            again = _predictions(decoder, text, positions)
            _hold_another(decoder, text)  # a program's own cache would still have the tokens that follow
            alone = []
            for position in positions:
                decoder.rewind(0)
                alone.append(_predictions(decoder, text[: position + 1], [position]))
        if not np.isfinite(at_once).all():
            return NOT_FINITE
        if _departs(at_once, again, SAME_PROGRAM):
            return STALE
        if _departs(at_once, np.concatenate(alone), SAME_PROGRAM):
            return MASK
        expected, stepped = _fresh(self.reference, text, positions), _stepped(self.model, text, positions)
        if not _departs(expected, at_once, self.bound) and _departs(expected, stepped, self.bound):
            return CACHE
        return ""

    def by_position(self, alone: float, windows: Iterable[int]) -> str:
        """From which position on it departs from the reference.

        Args:
            alone: See `kl_alone`.
        """
        last = len(self.text) - 1
        spread = [1 << power for power in range(last.bit_length())]  # 1, 2, 4, ... up to the last
        full = [window for window in sorted(set(windows)) if EDGE <= window <= last - EDGE]
        edges = {position for window in full for position in range(window - EDGE, window + EDGE)}
        kl = self._by_position(sorted({*spread, *edges}))
        later = sum(kl[position] for position in spread) / len(spread)
        if not alone <= max(self.bound, SHARE_AT_FIRST * later):
            return WEIGHTS
        bound = min(self.bound, max(ALONE_TIMES * alone, LEAST_DEPARTURE))
        for window in full:
            # The position before the window is full may hide one token too many.
            before = max(kl[position] for position in range(window - EDGE, window - 1))
            behind = sum(kl[position] for position in range(window, window + EDGE)) / EDGE
            if before <= bound and not behind <= bound:
                return WINDOW.format(window=window)
        departing = [position for position in spread if not kl[position] <= bound]
        if not departing:
            return ""
        return ROTATION if departing[0] <= EARLY else LATE.format(position=departing[0] // 2)

    def _by_position(self, positions: Sequence[int]) -> dict[int, float]:
        """KL of the program's predictions after some tokens of the text."""
        models = self.reference, self.model
        expected, found = (_fresh(model, self.text, positions, chunk=AT_ONCE) for model in models)
        return dict(zip(positions, _kl(expected, found).tolist(), strict=True))


def _hold_another(decoder: Decoder, text: Sequence[int]) -> None:
    """Fill the cache with another text as long, and rewind."""
    decoder.rewind(0)
    decoder.forward(_array(text[::-1]), rows=1, rope_length=len(text))
    decoder.rewind(0)


def _fresh(model: LoadedModel, text: Sequence[int], positions: Sequence[int], *, chunk: int = 0) -> NDArray[np.float64]:
    """A new sequence's predictions; see `_predictions`."""
    with closing(model.backend.decoder()) as decoder:
        return _predictions(decoder, text, positions, chunk=chunk)


def _predictions(
    decoder: Decoder, text: Sequence[int], positions: Sequence[int], *, chunk: int = 0
) -> NDArray[np.float64]:
    """Log-probabilities after the tokens at the given positions, [positions, vocabulary].

    Args:
        decoder: Of an empty cache.
        text: All of its tokens are read.
        positions: In rising order.
        chunk: Tokens that are read at once; 0: all.
    """
    import numpy as np

    found = []
    for start in range(0, len(text), chunk or len(text)):
        part = _array(text[start : start + (chunk or len(text))])
        wanted = [position - start for position in positions if start <= position < start + len(part)]
        rows = len(part) - wanted[0] if wanted else 1
        logits = decoder.forward(part, rows=rows, rope_length=len(text))
        found += [log_probabilities(logits[position - len(part)]) for position in wanted]
    return np.stack(found)


def _stepped(model: LoadedModel, text: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """The same where the tokens at the given positions, one after the other, are read one at a time."""
    import numpy as np

    first, found = positions[0], []
    with closing(model.backend.decoder()) as decoder:
        decoder.forward(_array(text[:first]), rows=1, rope_length=len(text))
        for position in positions:
            logits = decoder.forward(_array(text[position : position + 1]), rows=1, rope_length=len(text))
            found.append(log_probabilities(logits[0]))
    return np.stack(found)


def _array(tokens: Sequence[int]) -> NDArray[np.int64]:
    import numpy as np

    return np.asarray(tokens, np.int64)


def _kl(expected: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL of each position."""
    import numpy as np

    divergence: NDArray[np.float64] = (np.exp(expected) * (expected - found)).sum(-1)
    return divergence


def _departs(expected: NDArray[np.float64], found: NDArray[np.float64], bound: float) -> bool:
    return not float(_kl(expected, found).mean()) <= bound  # what is not a number departs too
