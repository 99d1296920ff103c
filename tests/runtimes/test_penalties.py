from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.errors import GenerationError
from edgekit.runtimes.penalties import Penalties, check_token_ids
from edgekit.runtimes.sampling import Sampler
from edgekit.session import GenerateOptions

FORBIDDEN = -np.inf


def row(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def random_logits(seed: int, size: int) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=size) * 3).astype(np.float32)


def penalized(options: GenerateOptions, logits: NDArray[np.float32], *accepted: int) -> list[float]:
    penalties = Penalties(options, frozenset())
    for token in accepted:
        penalties.accept(token)
    result: list[float] = penalties.apply(logits, np.empty_like(logits)).tolist()
    return result


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


@pytest.mark.parametrize("token", [10, 5000])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    sampler = Sampler(GenerateOptions(repetition_penalty=1.1))
    sampler.observe([token])
    with pytest.raises(ValueError, match="outside the 10"):
        sampler.next(np.zeros(10, dtype=np.float32))


def test_negative_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="token -1 is negative"):
        Sampler(GenerateOptions(repetition_penalty=1.1)).observe([3, -1])


def test_without_penalties_the_logits_are_not_copied() -> None:
    logits = row(1, 2, 3)
    penalties = Penalties(GenerateOptions(min_tokens=1), frozenset({2}))
    penalties.accept(1)
    assert penalties.apply(logits, np.empty_like(logits)) is logits


def test_frequency_counts_each_time_and_presence_once() -> None:
    options = GenerateOptions(presence_penalty=0.5, frequency_penalty=0.25)
    assert penalized(options, row(4, 4, 4, FORBIDDEN), 1, 1, 2, 1, 3) == [4, 2.75, 3.25, FORBIDDEN]


def test_negative_penalties_favour_what_was_said() -> None:
    assert penalized(GenerateOptions(presence_penalty=-1, frequency_penalty=-2), row(1, 1), 0, 0) == [6, 1]


def test_the_prompt_counts_for_the_repetition_penalty_only() -> None:
    sampler = Sampler(GenerateOptions(presence_penalty=2, frequency_penalty=2, min_tokens=1), frozenset({0}))
    sampler.observe([1, 1, 1])
    assert sampler.next(row(9, 4, 3)) == 1
    assert sampler.next(row(0, 4, 3)) == 2


def test_penalties_come_in_the_documented_order() -> None:
    # bias, then repetition, then presence: (1 + 3) / 2 - 1 and (-4 + 1) * 2 - 1
    options = GenerateOptions(logit_bias={0: 3, 1: 1}, repetition_penalty=2, presence_penalty=1)
    assert penalized(options, row(1, -4, 0), 0, 1) == [1, -7, 0]


def test_end_tokens_wait_for_min_tokens() -> None:
    sampler = Sampler(GenerateOptions(min_tokens=2, stop_tokens=(1,)), frozenset({2, 999}))
    logits = row(1, 2, 3)
    assert [sampler.next(logits) for _ in range(3)] == [0, 0, 2]


def test_stop_tokens_may_come_where_no_minimum_is_set() -> None:
    assert Sampler(GenerateOptions(stop_tokens=(1,))).next(row(0, 5)) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_forbids_or_forces_a_token(temperature: float) -> None:
    forced = Sampler(GenerateOptions(temperature=temperature, logit_bias={2: 100}))
    barred = Sampler(GenerateOptions(temperature=temperature, logit_bias={0: FORBIDDEN, 1: -1e300}))
    for _ in range(20):
        assert forced.next(row(0, 0, 0)) == 2
        assert barred.next(row(5, 5, 0)) == 2


def test_no_bias_allows_a_token_that_the_model_forbids() -> None:
    assert penalized(GenerateOptions(logit_bias={0: 1e300}), row(FORBIDDEN, 0)) == [FORBIDDEN, 0]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([FORBIDDEN, -3e38, -1.0, -1e-40, 0.0, -0.0, 1e-40, 5.0, 3e38]), min_size=4, max_size=4),
    st.sampled_from([1e-300, 0.5, 1.0, 2.0, 1e300]),
    st.sampled_from([0.0, 1e300, -1e300, 1.0]),
    st.sampled_from([0.0, 1e308, -1e308, 1.0]),
    st.sampled_from([FORBIDDEN, -1e300, 0.0, 1e300]),
)
def test_extreme_penalties_make_no_nan_and_no_infinity(
    values: list[float], repetition: float, presence: float, frequency: float, bias: float
) -> None:
    options = GenerateOptions(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias={0: bias, 2: bias},
    )
    scores = penalized(options, row(*values, 1.0), 0, 1, 0, 1, 2)
    assert all(score < np.inf for score in scores)  # NaN is not below either
    assert all(score == FORBIDDEN for score, value in zip(scores, values, strict=False) if value == FORBIDDEN)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tokens": 1}, "^no token is left that the model, its structure and min_tokens allow"),
        ({"logit_bias": {1: FORBIDDEN}}, "structure and logit_bias allow"),
        ({"logit_bias": {1: FORBIDDEN}, "min_tokens": 5}, "structure, logit_bias and min_tokens allow"),
    ],
)
def test_options_that_leave_no_token_are_named(options: dict[str, object], message: str, temperature: float) -> None:
    sampler = Sampler(GenerateOptions(temperature=temperature, **options), frozenset({1}))  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match=message) as caught:
        sampler.next(row(FORBIDDEN, 0, FORBIDDEN))
    assert caught.value.hint is not None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_logits_are_not_hidden_by_a_bias(value: float) -> None:
    sampler = Sampler(GenerateOptions(logit_bias={0: FORBIDDEN, 1: 1.0}))
    with pytest.raises(GenerationError, match=f"the model's logits contain {value}"):
        sampler.next(row(value, 0, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (GenerateOptions(logit_bias={3: 1.0, 10: 1.0}), "^logit_bias holds the token 10, the vocabulary has 10$"),
        (GenerateOptions(logit_bias={10**30: 1.0}), "^logit_bias holds the token 1000"),
        (GenerateOptions(stop_tokens=(9, 12)), "^stop_tokens holds the token 12, the vocabulary has 10$"),
    ],
)
def test_options_that_name_unknown_tokens_are_refused(options: GenerateOptions, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        check_token_ids(options, 10)
    with pytest.raises(GenerationError, match=message):
        Sampler(options).next(np.zeros(10, dtype=np.float32))


def test_negative_ids_in_a_bias_are_refused() -> None:
    with pytest.raises(GenerationError, match=r"logit_bias is .-1: 1.0., expected token ids"):
        GenerateOptions(logit_bias={-1: 1.0})
