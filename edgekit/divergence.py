"""How far one model's predictions are from another's on the same text: KL divergence, agreement and perplexity, with intervals.

KL is of the reference against the measured model, over the whole vocabulary, in nats. The perplexity ratio is the measured
model's perplexity of the text that was read divided by the reference's: on text that the reference itself sampled, its
expectation is exp(mean KL). Intervals hold the true value with 95%: percentiles of a bootstrap that draws whole units, as
neighbouring positions are not independent (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = "NDArray[np.float64]"

__all__ = ["Divergence", "Figures", "Interval", "log_probabilities"]

Interval: TypeAlias = tuple[float, float]
DRAWS, SEED = 2000, 20261122
COVERED = (2.5, 97.5)  # percentiles


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured over all positions. KL in nats; agreement is the share of positions with the same best token."""

    positions: int
    kl_mean: float
    kl_mean_interval: Interval
    kl_p99: float
    top1_agreement: float
    top1_interval: Interval


@dataclass(slots=True)
class Divergence:
    """Collects positions, one unit at a time: a text, or a part of one that is long beside what its positions share."""

    kl: list[Floats] = field(default_factory=list)
    same: list[NDArray[np.bool_]] = field(default_factory=list)
    excess: list[Floats] = field(default_factory=list)

    def add(self, expected: Floats, found: Floats, tokens: NDArray[np.int64]) -> None:
        """Compare one unit.

        Args:
            expected: The reference's log-probabilities [positions, vocabulary].
            found: The measured model's.
            tokens: The token of the text that follows each position, [positions].
        """
        import numpy as np

        rows = np.arange(len(tokens))
        self.add_measured(
            (np.exp(expected) * (expected - found)).sum(-1),
            expected.argmax(-1) == found.argmax(-1),
            expected[rows, tokens] - found[rows, tokens],
        )

    def add_measured(self, kl: Floats, same: NDArray[np.bool_], excess: Floats) -> None:
        """Add a unit that was compared elsewhere: KL, agreement, and how much less probable each token is, in nats."""
        self.kl.append(kl)
        self.same.append(same)
        self.excess.append(excess)

    def figures(self) -> Figures:
        """Mean and 99th percentile of the KL, and agreement."""
        import numpy as np

        kl = np.concatenate(self.kl)
        return Figures(
            positions=len(kl),
            kl_mean=float(kl.mean()),
            kl_mean_interval=_interval(self.kl),
            kl_p99=float(np.quantile(kl, 0.99)),
            top1_agreement=float(np.concatenate(self.same).mean()),
            top1_interval=_interval(self.same),
        )

    def perplexity_ratio(self) -> tuple[float, Interval]:
        """The measured model's perplexity divided by the reference's, and its interval."""
        import numpy as np

        low, high = _interval(self.excess)
        return float(np.exp(np.concatenate(self.excess).mean())), (float(np.exp(low)), float(np.exp(high)))

    def kl_ratio(self, other: Divergence) -> tuple[float, Interval]:
        """This mean KL divided by another's on the same units, and its interval; the same units are drawn for both."""
        import numpy as np

        ratio = float(np.concatenate(self.kl).mean() / np.concatenate(other.kl).mean())
        return ratio, _percentiles(_means(self.kl) / _means(other.kl))


def log_probabilities(logits: NDArray[np.float32]) -> Floats:
    """Log-probabilities along the last axis, in float64."""
    import numpy as np

    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def _means(units: list[Floats] | list[NDArray[np.bool_]]) -> Floats:
    """The mean over all positions of each draw of units; the draws depend on the number of units alone."""
    import numpy as np

    sums, counts = np.array([unit.sum() for unit in units]), np.array([len(unit) for unit in units])
    picks = np.random.default_rng(SEED).integers(len(units), size=(DRAWS, len(units)))
    means: Floats = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    return means


def _interval(units: list[Floats] | list[NDArray[np.bool_]]) -> Interval:
    return _percentiles(_means(units))


def _percentiles(values: Floats) -> Interval:
    import numpy as np

    low, high = np.percentile(values, COVERED)
    return float(low), float(high)
