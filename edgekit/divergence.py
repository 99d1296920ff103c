"""How far one model's predictions are from another's on the same text: KL divergence, agreement and perplexity, with intervals.

KL is of the reference against the measured model, over the whole vocabulary, in nats. The perplexity ratio is the measured
model's perplexity of the text that was read divided by the reference's: on text that the reference itself sampled, its
expectation is exp(mean KL). Intervals hold the true value with 95%: percentiles of a bootstrap that draws whole units, as
neighbouring positions are not independent (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13).
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = "NDArray[np.float64]"

__all__ = ["Divergence", "Figures", "Interval", "Perplexity", "log_probabilities"]

Interval: TypeAlias = tuple[float, float]
DRAWS, SEED = 2000, 20261122
COVERED = (2.5, 97.5)  # percentiles


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured over all positions. KL in nats; agreement is the share of positions with the same best token;
    confidence the mean probability that the reference gives its best token: how often its own samples agree with it.
    """

    positions: int
    kl_mean: float
    kl_mean_interval: Interval
    kl_p99: float
    top1_agreement: float
    top1_interval: Interval
    reference_confidence: float

    def rounded(self) -> Figures:
        """To four digits, so that the last bits of a sum do not change what is written."""
        low, high = self.kl_mean_interval
        return Figures(
            positions=self.positions,
            kl_mean=_four_digits(self.kl_mean),
            kl_mean_interval=(_four_digits(low), _four_digits(high)),
            kl_p99=_four_digits(self.kl_p99),
            top1_agreement=round(self.top1_agreement, 4),
            top1_interval=(round(self.top1_interval[0], 4), round(self.top1_interval[1], 4)),
            reference_confidence=round(self.reference_confidence, 4),
        )

    def to_json(self) -> dict[str, Any]:
        """As the manifest and `verify --json` have it."""
        return asdict(self) | {
            "kl_mean_interval": list(self.kl_mean_interval),
            "top1_interval": list(self.top1_interval),
        }


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Of the text that was read: the measured model's, the reference's, and the first divided by the second."""

    perplexity: float
    reference_perplexity: float
    perplexity_ratio: float
    perplexity_ratio_interval: Interval


@dataclass(slots=True)
class Divergence:
    """Collects positions, one unit at a time: a text, or a part of one that is long beside what its positions share."""

    _kl: list[Floats] = field(default_factory=list)
    _same: list[NDArray[np.bool_]] = field(default_factory=list)
    _confidence: list[Floats] = field(default_factory=list)
    _surprise: list[Floats] = field(default_factory=list)
    _reference_surprise: list[Floats] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self._kl)

    def add(self, expected: Floats, found: Floats, tokens: NDArray[np.int64]) -> None:
        """Compare one unit.

        Args:
            expected: The reference's log-probabilities [positions, vocabulary].
            found: The measured model's.
            tokens: The token of the text that follows each position, [positions].
        """
        import numpy as np

        rows = np.arange(len(tokens))
        probabilities = np.exp(expected)
        kl = (probabilities * (expected - found)).sum(-1)
        self.add_compared(kl, expected.argmax(-1) == found.argmax(-1), probabilities.max(-1))
        self._surprise.append(-found[rows, tokens])
        self._reference_surprise.append(-expected[rows, tokens])

    def add_compared(self, kl: Floats, same: NDArray[np.bool_], confidence: Floats) -> None:
        """Add a unit whose figures at each position are known; such units have no perplexity."""
        self._kl.append(kl)
        self._same.append(same)
        self._confidence.append(confidence)

    def figures(self) -> Figures:
        """KL and agreement."""
        import numpy as np

        kl = np.concatenate(self._kl)
        return Figures(
            positions=len(kl),
            kl_mean=float(kl.mean()),
            kl_mean_interval=_percentiles(_means(self._kl)),
            kl_p99=float(np.quantile(kl, 0.99)),
            top1_agreement=float(np.concatenate(self._same).mean()),
            top1_interval=_percentiles(_means(self._same)),
            reference_confidence=float(np.concatenate(self._confidence).mean()),
        )

    def perplexity(self) -> Perplexity:
        """Perplexity and its ratio to the reference's."""
        import numpy as np

        mean, reference = (float(np.concatenate(units).mean()) for units in (self._surprise, self._reference_surprise))
        excess = [a - b for a, b in zip(self._surprise, self._reference_surprise, strict=True)]
        low, high = _percentiles(_means(excess))
        return Perplexity(_exp(mean), _exp(reference), _exp(mean - reference), (_exp(low), _exp(high)))

    def kl_ratio(self, other: Divergence) -> tuple[float, Interval]:
        """This mean KL divided by another's on the same units, and its interval; the same units are drawn for both."""
        import numpy as np

        ratio = float(np.concatenate(self._kl).mean() / np.concatenate(other._kl).mean())
        return ratio, _percentiles(_means(self._kl) / _means(other._kl))


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


def _percentiles(values: Floats) -> Interval:
    import numpy as np

    low, high = np.percentile(values, COVERED)
    return float(low), float(high)


def _exp(value: float) -> float:
    """e^value, or the largest number where that is larger: a broken program may be surprised without bounds."""
    return math.exp(min(value, math.log(sys.float_info.max)))


def _four_digits(value: float) -> float:
    return float(f"{max(value, 0.0):.4g}")  # rounding can take a KL of 0 under it
