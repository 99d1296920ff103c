from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.generation import logits_process

from edgekit.errors import GenerationError
from edgekit.runtimes.sampling import Sampler
from edgekit.session import GenerateOptions

PROBABILITY_TOLERANCE = 2e-6
BORDER_TOLERANCE = 1e-5
NEGLIGIBLE = 1e-30  # float32 ends there, the reference computes its last step in float64
DRAWS = 20_000
FREQUENCY_TOLERANCE = 5 / DRAWS**0.5
LARGE_VOCAB = 150_000

Floats = NDArray[np.float32]


def random_logits(seed: int, size: int, *, spread: float = 3.0) -> Floats:
    return (np.random.default_rng(seed).normal(size=size) * spread).astype(np.float32)


def reference_distribution(options: GenerateOptions, logits: Floats, seen: list[int]) -> NDArray[np.float64]:
    """The probabilities of transformers' processors, in the order in which its generation loop applies them."""
    processors: list[Any] = []
    if options.repetition_penalty != 1:
        processors.append(logits_process.RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    processors.append(logits_process.TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k:
        processors.append(logits_process.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(logits_process.TopPLogitsWarper(options.top_p))
    if options.min_p:
        processors.append(logits_process.MinPLogitsWarper(options.min_p))
    scores = torch.from_numpy(logits.copy())[None]
    for processor in processors:
        scores = processor(torch.tensor([seen], dtype=torch.long), scores)
    result: NDArray[np.float64] = scores[0].double().softmax(-1).numpy()
    return result


def our_distribution(options: GenerateOptions, logits: Floats, seen: list[int]) -> NDArray[np.float64]:
    sampler = Sampler(options)
    sampler.observe(seen)
    ids, probabilities = sampler.distribution(logits)
    assert (np.diff(ids) > 0).all()
    dense = np.zeros(len(logits))
    dense[ids] = probabilities
    return dense


def is_on_a_border(options: GenerateOptions, logits: Floats, seen: list[int]) -> bool:
    """Whether a token is so close to the edge of a filter that float32 rounding may decide either way."""
    plain = GenerateOptions(
        temperature=options.temperature, top_k=options.top_k, repetition_penalty=options.repetition_penalty
    )
    probabilities = reference_distribution(plain, logits, seen)
    masses = np.sort(probabilities)[::-1].cumsum()
    near_mass = options.top_p < 1 and np.abs(masses - options.top_p).min() < BORDER_TOLERANCE
    ratios = probabilities[probabilities < probabilities.max()] / probabilities.max()
    return bool(near_mass or (np.abs(ratios - options.min_p) < BORDER_TOLERANCE * options.min_p).any())


all_options = st.builds(
    GenerateOptions,
    temperature=st.floats(0.05, 4),
    top_k=st.sampled_from([0, 1, 2, 7, 50, 5000]),
    top_p=st.sampled_from([1.0, 0.95, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.7, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.1, 2.0, 0.7]),
)


@settings(max_examples=300, deadline=None)
@given(all_options, st.integers(1, 400), st.integers(0, 2**32), st.floats(0.1, 10), st.data())
def test_distribution_is_that_of_transformers(
    options: GenerateOptions, size: int, seed: int, spread: float, data: st.DataObject
) -> None:
    logits = random_logits(seed, size, spread=spread)
    seen = data.draw(st.lists(st.integers(0, size - 1), max_size=20))
    if is_on_a_border(options, logits, seen):
        return
    expected, got = reference_distribution(options, logits, seen), our_distribution(options, logits, seen)
    np.testing.assert_array_equal(got > NEGLIGIBLE, expected > NEGLIGIBLE)
    np.testing.assert_allclose(got, expected, atol=PROBABILITY_TOLERANCE)


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(
    "options",
    [
        GenerateOptions(temperature=0.8, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.1),
        GenerateOptions(temperature=1.0, top_k=3000, top_p=0.99),
        GenerateOptions(temperature=1.0, top_p=0.9),
        GenerateOptions(temperature=1.0, top_p=0.9, min_p=0.02),
        GenerateOptions(temperature=1.0),
    ],
    ids=str,
)
def test_distribution_is_that_of_transformers_for_a_large_vocabulary(options: GenerateOptions, spread: float) -> None:
    logits = random_logits(3, LARGE_VOCAB, spread=spread)
    seen = list(range(0, 5000, 7))
    expected, got = reference_distribution(options, logits, seen), our_distribution(options, logits, seen)
    # torch sums 150,000 float32 probabilities: its own border moves by this share of them
    differing = np.count_nonzero((got > 0) != (expected > 0))
    assert differing <= 1 + 1e-4 * np.count_nonzero(expected)
    np.testing.assert_allclose(got, expected, atol=PROBABILITY_TOLERANCE)


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0]), min_size=1, max_size=30), all_options)
@settings(max_examples=200, deadline=None)
def test_as_many_ties_are_kept_as_by_transformers(values: list[float], options: GenerateOptions) -> None:
    logits = np.array(values, dtype=np.float32)
    if is_on_a_border(options, logits, []):
        return
    expected, got = reference_distribution(options, logits, []), our_distribution(options, logits, [])
    # which of equals at the border stay is not defined there
    np.testing.assert_allclose(np.sort(got), np.sort(expected), atol=PROBABILITY_TOLERANCE)


def test_the_first_of_equals_at_the_border_are_kept() -> None:
    sampler = Sampler(GenerateOptions(temperature=1.0, top_p=0.6))
    assert sampler.distribution(np.zeros(8, dtype=np.float32))[0].tolist() == [0, 1, 2, 3, 4]


def test_nucleus_of_a_large_uniform_distribution_has_the_right_size() -> None:
    sampler = Sampler(GenerateOptions(temperature=1.0, top_p=0.25))
    assert len(sampler.distribution(np.zeros(LARGE_VOCAB, dtype=np.float32))[0]) == LARGE_VOCAB // 4


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    assert Sampler(GenerateOptions()).next(np.array([1, 5, 5, 2], dtype=np.float32)) == 1


def test_greedy_applies_the_repetition_penalty_to_what_it_picked() -> None:
    sampler = Sampler(GenerateOptions(repetition_penalty=2.0))
    logits = np.array([3, 4, -1], dtype=np.float32)
    assert [sampler.next(logits) for _ in range(3)] == [1, 0, 1]


def test_penalty_counts_a_token_once() -> None:
    sampler = Sampler(GenerateOptions(repetition_penalty=2.0))
    sampler.observe([0, 0, 0])
    sampler.observe([0])
    assert sampler.next(np.array([4.2, 2, 1], dtype=np.float32)) == 0


def test_penalty_makes_negative_logits_smaller() -> None:
    sampler = Sampler(GenerateOptions(repetition_penalty=2.0))
    sampler.observe([1])
    assert sampler.next(np.array([-1.5, -1, -9], dtype=np.float32)) == 0


@given(st.lists(st.lists(st.integers(0, 3000), max_size=40), max_size=8))
@settings(deadline=None)
def test_observing_in_pieces_is_observing_at_once(pieces: list[list[int]]) -> None:
    options = GenerateOptions(temperature=1.0, repetition_penalty=1.3)
    logits = random_logits(0, 3001)
    whole, parts = Sampler(options), Sampler(options)
    whole.observe([token for piece in pieces for token in piece])
    for piece in pieces:
        parts.observe(piece)
    np.testing.assert_array_equal(whole.distribution(logits)[1], parts.distribution(logits)[1])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_next_leaves_the_logits_unchanged(temperature: float, penalty: float) -> None:
    logits = random_logits(1, 500)
    before = logits.copy()
    logits.setflags(write=False)
    sampler = Sampler(GenerateOptions(temperature=temperature, repetition_penalty=penalty, top_k=5, top_p=0.9))
    sampler.observe([1, 2, 3])
    sampler.next(logits)
    np.testing.assert_array_equal(logits, before)


def test_same_seed_gives_the_same_tokens() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(GenerateOptions(temperature=1.0, top_k=40, seed=seed))
        return [sampler.next(random_logits(step, 1000)) for step in range(50)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_seed_gives_the_same_tokens_in_every_release() -> None:
    sampler = Sampler(GenerateOptions(temperature=1.0, seed=42))
    assert [sampler.next(np.zeros(1000, dtype=np.float32)) for _ in range(4)] == [773, 438, 858, 697]


def test_without_a_seed_two_samplers_differ() -> None:
    logits = np.zeros(100_000, dtype=np.float32)
    first, second = Sampler(GenerateOptions(temperature=1.0)), Sampler(GenerateOptions(temperature=1.0))
    assert [first.next(logits) for _ in range(4)] != [second.next(logits) for _ in range(4)]


@pytest.mark.parametrize("size", [6, 256, 700])
def test_tokens_are_drawn_as_often_as_they_are_probable(size: int) -> None:
    logits = random_logits(5, size, spread=2.0)
    sampler = Sampler(GenerateOptions(temperature=1.0, seed=0))
    counts = np.bincount([sampler.next(logits) for _ in range(DRAWS)], minlength=size)
    expected = torch.from_numpy(logits).double().softmax(0).numpy()
    np.testing.assert_allclose(counts / DRAWS, expected, atol=FREQUENCY_TOLERANCE)


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = np.full(1000, -np.inf, dtype=np.float32)
    logits[[3, 700]] = 0.0
    sampler = Sampler(GenerateOptions(temperature=1.0, top_k=50, top_p=0.99, seed=0))
    assert {sampler.next(logits) for _ in range(100)} == {3, 700}


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e30])
def test_extreme_temperatures_do_not_overflow(temperature: float) -> None:
    logits = np.array([-3e38, 5, 3e38, -np.inf], dtype=np.float32)
    token = Sampler(GenerateOptions(temperature=temperature, seed=0)).next(logits)
    assert token in ({2} if temperature < 1 else {0, 1, 2})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, np.nan, 9], "the model's logits contain nan"),
        ([0, np.inf, 9], "the model's logits contain inf"),
        ([-np.inf, -np.inf], "the model's logits forbid every token"),
    ],
)
def test_broken_logits_are_refused(values: list[float], message: str, temperature: float) -> None:
    sampler = Sampler(GenerateOptions(temperature=temperature, top_k=2, top_p=0.5))
    with pytest.raises(GenerationError, match=message) as caught:
        sampler.next(np.array(values, dtype=np.float32))
    assert caught.value.hint is not None


@pytest.mark.parametrize("shape", [(0,), (1, 5), ()])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[vocab\]"):
        Sampler(GenerateOptions()).next(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize("token", [10, 5000])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    sampler = Sampler(GenerateOptions(repetition_penalty=1.1))
    sampler.observe([token])
    with pytest.raises(ValueError, match="outside the 10"):
        sampler.next(np.zeros(10, dtype=np.float32))


def test_negative_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="token -1 is negative"):
        Sampler(GenerateOptions(repetition_penalty=1.1)).observe([3, -1])
