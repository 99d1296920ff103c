"""The figures of a comparison, against PyTorch's losses and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.divergence import Divergence, log_probabilities

# Both sides add some hundred products of float64 in another order.
SAME_SUM = 1e-9
# A bootstrap of 2,000 draws finds a bound of 200 normal means to about a tenth of the standard error.
BOOTSTRAP_NOISE = 0.15
VOCABULARY = 37


def _random_unit(random: np.random.Generator, rows: int, spread: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logits = random.normal(0, 3, (rows, VOCABULARY)).astype(np.float32)
    other = (logits + random.normal(0, spread, logits.shape)).astype(np.float32)
    return logits, other, random.integers(VOCABULARY, size=rows)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0.01, 3),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
)
def test_figures_are_pytorchs(seed: int, spread: float, lengths: list[int]) -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    random, divergence = np.random.default_rng(seed), Divergence()
    units = [_random_unit(random, rows, spread) for rows in lengths]
    for logits, other, tokens in units:
        divergence.add(log_probabilities(logits), log_probabilities(other), tokens)
    reference, found, tokens = (torch.from_numpy(np.concatenate(column)) for column in zip(*units, strict=True))
    expected, actual = (functional.log_softmax(rows.double(), -1) for rows in (reference, found))
    kl = functional.kl_div(actual, expected, log_target=True, reduction="none").sum(-1)
    figures, perplexity = divergence.figures(), divergence.perplexity()
    assert figures.positions == sum(lengths)
    assert figures.kl_mean == pytest.approx(float(kl.mean()), abs=SAME_SUM)
    assert figures.kl_p99 == pytest.approx(float(torch.quantile(kl, 0.99)), abs=SAME_SUM)
    assert figures.top1_agreement == pytest.approx(float((expected.argmax(-1) == actual.argmax(-1)).double().mean()))
    assert figures.reference_confidence == pytest.approx(float(expected.max(-1).values.exp().mean()))
    losses = [float(functional.cross_entropy(rows.double(), tokens)) for rows in (found, reference)]
    assert perplexity.perplexity == pytest.approx(math.exp(losses[0]))
    assert perplexity.reference_perplexity == pytest.approx(math.exp(losses[1]))
    assert perplexity.perplexity_ratio == pytest.approx(math.exp(losses[0] - losses[1]))
    assert figures.kl_mean_interval[0] <= figures.kl_mean <= figures.kl_mean_interval[1] or len(lengths) < 3


def test_interval_is_that_of_a_normal_mean() -> None:
    random, divergence = np.random.default_rng(0), Divergence()
    means = random.normal(5, 1, 200)
    for mean in means:  # ten positions that are all alike: only the units count
        divergence.add_compared(np.full(10, mean), np.ones(10, np.bool_), np.ones(10))
    low, high = divergence.figures().kl_mean_interval
    error = 1.96 * means.std() / math.sqrt(len(means))
    assert low == pytest.approx(means.mean() - error, abs=BOOTSTRAP_NOISE * error)
    assert high == pytest.approx(means.mean() + error, abs=BOOTSTRAP_NOISE * error)
    assert divergence.figures().top1_interval == (1.0, 1.0)


def test_ratio_draws_the_same_units_for_both() -> None:
    random, first, second = np.random.default_rng(1), Divergence(), Divergence()
    for mean in random.uniform(0.1, 10, 20):  # far apart: independent draws would give a wide interval
        kl = random.uniform(0, mean, 30)
        first.add_compared(3 * kl, np.ones(30, np.bool_), np.ones(30))
        second.add_compared(kl, np.ones(30, np.bool_), np.ones(30))
    ratio, interval = first.kl_ratio(second)
    assert ratio == pytest.approx(3)
    assert interval == pytest.approx((3, 3))


def test_perplexity_ratio_of_sampled_text_is_the_kl() -> None:
    """On text that the reference samples, the expected log ratio is the KL: drawn here from one known distribution."""
    random, divergence = np.random.default_rng(2), Divergence()
    logits, other, _ = _random_unit(random, 1, 0.5)
    expected, found = log_probabilities(logits), log_probabilities(other)
    rows = 40_000
    tokens = random.choice(VOCABULARY, size=rows, p=np.exp(expected[0]))
    for part in np.split(tokens, 100):
        divergence.add(np.repeat(expected, len(part), 0), np.repeat(found, len(part), 0), part)
    low, high = divergence.perplexity().perplexity_ratio_interval
    assert low <= math.exp(divergence.figures().kl_mean) <= high


def test_equal_models_do_not_diverge() -> None:
    divergence = Divergence()
    rows = log_probabilities(np.random.default_rng(3).normal(0, 5, (50, VOCABULARY)).astype(np.float32))
    divergence.add(rows, rows, np.zeros(50, np.int64))
    figures = divergence.figures().rounded()
    assert (figures.kl_mean, figures.kl_p99, figures.top1_agreement) == (0.0, 0.0, 1.0)
    assert divergence.perplexity().perplexity_ratio == 1.0


def test_a_surprise_without_bounds_is_a_large_number_still() -> None:
    logits = np.array([[5000.0, 0.0], [0.0, 5000.0]], np.float32)
    divergence = Divergence()
    divergence.add(log_probabilities(logits[::-1]), log_probabilities(logits), np.array([1, 0]))
    assert all(
        math.isfinite(value) for value in (divergence.perplexity().perplexity, divergence.perplexity().perplexity_ratio)
    )
