"""Log-probabilities of tokens under the model's own distribution."""

from __future__ import annotations

import math

import numpy as np

from edgekit.session import TokenLogprob

from .logit_filters import Floats, Ids, as_row, check_peak, kth_largest

__all__ = ["token_logprob"]


def token_logprob(logits: Floats, token: int, alternatives: int) -> TokenLogprob:
    """Return the log-probability of a token and of the most probable ones.

    Args:
        logits: float32 [vocab] as the model gave them: before structure, penalties and filters. Left unchanged.
        token: The token that was chosen, or that the prompt has.
        alternatives: How many of the most probable tokens to list, of equals those with the lower ids; the token itself is
            listed if it is one of them. Forbidden tokens are not listed, so there may be fewer.

    Raises:
        GenerationError: The logits hold NaN or plus infinity, or forbid every token.
        ValueError: The shape is not [vocab], or the token is outside of it.
    """
    row = as_row(logits)
    if not 0 <= token < len(row):
        raise ValueError(f"token {token} is outside the {len(row)} of the logits")
    peak = row.max()
    check_peak(float(peak))
    with np.errstate(over="ignore", under="ignore"):
        total = np.exp(row - peak).sum(dtype=np.float64)
    # float64 from here: close to 0, the logarithm of a probable token would be lost in the logit's rounding
    log_total = math.log(total)

    def logprob(place: int) -> float:
        return float(row[place]) - float(peak) - log_total

    best = _largest(row, min(alternatives, len(row))) if alternatives else ()
    return TokenLogprob(token, logprob(token), tuple((int(place), logprob(place)) for place in best))


def _largest(row: Floats, count: int) -> Ids:
    """Return the places of the largest values but minus infinity, falling; of equals the first ones."""
    border = kth_largest(row, count)
    places = np.flatnonzero(row > border)
    if border != -np.inf:
        places = np.concatenate([places, np.flatnonzero(row == border)[: count - len(places)]])
    return places[np.argsort(-row[places], kind="stable")]
