from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.errors import GenerationError
from edgekit.runtimes.logprobs import token_logprob

FLOAT32_EXP = 1e-6  # relative error of the sum of float32 exponentials
FORBIDDEN = -np.inf
values = st.one_of(st.floats(-50, 50, width=32), st.sampled_from([0.0, -0.0, 1.0, FORBIDDEN, -3e38]))


def row(*numbers: float) -> NDArray[np.float32]:
    return np.array(numbers, dtype=np.float32)


def reference(logits: NDArray[np.float32]) -> list[float]:
    result: list[float] = torch.from_numpy(logits).double().log_softmax(0).tolist()
    return result


@settings(max_examples=300, deadline=None)
@given(st.lists(values, min_size=1, max_size=60), st.integers(0, 70), st.data())
def test_logprobs_are_those_of_torch(numbers: list[float], alternatives: int, data: st.DataObject) -> None:
    logits = row(*numbers, 0.5)
    token = data.draw(st.integers(0, len(logits) - 1))
    expected = reference(logits)
    got = token_logprob(logits, token, alternatives)
    ranked = sorted((-logit, place) for place, logit in enumerate(logits.tolist()) if logit > FORBIDDEN)
    assert got.token == token
    assert got.logprob == pytest.approx(expected[token], rel=FLOAT32_EXP, abs=FLOAT32_EXP)
    assert [place for place, _ in got.alternatives] == [place for _, place in ranked[:alternatives]]
    for place, logprob in got.alternatives:
        assert logprob == pytest.approx(expected[place], rel=FLOAT32_EXP, abs=FLOAT32_EXP)


@pytest.mark.parametrize("alternatives", [1, 20, 100])
def test_alternatives_of_a_large_vocabulary_are_the_largest(alternatives: int) -> None:
    logits = np.random.default_rng(1).normal(size=150_000).astype(np.float32).round(2)  # with many ties
    expected = np.argsort(-logits, kind="stable")[:alternatives].tolist()
    got = token_logprob(logits, 7, alternatives)
    assert [place for place, _ in got.alternatives] == expected
    assert got.logprob == pytest.approx(reference(logits)[7], rel=FLOAT32_EXP)


def test_of_equals_the_lower_ids_are_listed() -> None:
    got = token_logprob(np.zeros(150_000, dtype=np.float32), 9, 3)
    assert got.alternatives == tuple((place, got.logprob) for place in range(3))


def test_a_nearly_certain_token_keeps_its_precision() -> None:
    got = token_logprob(row(1000, 980), 0, 0)
    assert got.logprob == pytest.approx(-math.exp(-20), rel=1e-5)


def test_the_chosen_token_has_the_logprob_of_its_alternative() -> None:
    got = token_logprob(row(1, 3, 2), 1, 2)
    assert got.alternatives[0] == (1, got.logprob)


def test_a_forbidden_token_has_minus_infinity_and_is_no_alternative() -> None:
    got = token_logprob(row(0, FORBIDDEN), 1, 5)
    assert got.logprob == FORBIDDEN
    assert got.alternatives == ((0, 0.0),)


def test_the_logits_are_left_unchanged() -> None:
    logits = row(3, 1, 2)
    logits.setflags(write=False)
    token_logprob(logits, 0, 2)
    assert logits.tolist() == [3, 1, 2]


@pytest.mark.parametrize("numbers", [(0, np.nan), (np.inf, 0), (FORBIDDEN, FORBIDDEN)])
def test_broken_logits_are_refused(numbers: tuple[float, ...]) -> None:
    with pytest.raises(GenerationError, match="the model's logits"):
        token_logprob(row(*numbers), 0, 1)


@pytest.mark.parametrize("token", [-1, 3])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match="outside the 3"):
        token_logprob(row(0, 1, 2), token, 0)
