from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.runtimes.prompt_lookup import Prediction
from edgekit.runtimes.sampling import Sampler
from edgekit.runtimes.speculation import (
    FIRST_DRAFT,
    MOST_DRAFTED,
    PRIOR_ACCEPTANCE,
    Acceptance,
    ForwardCosts,
    Speculator,
    verify_draft,
)
from edgekit.session import GenerateOptions

Floats = NDArray[np.float32]
VOCAB = 6
PRIOR_COSTS = {rows: ForwardCosts().ratio(rows) for rows in range(2, 17)}
DRAWS = 5_000
CHI_SQUARE_LIMIT = 36.0  # 35 degrees of freedom: p = 0.42; the draws are seeded, so the outcome is fixed
COST_TOLERANCE = 0.15
WASTE_LIMIT = 0.01  # of the forwards, on text where no draft comes true
END = 5


class Model:
    """Logits of the next token from the last two, as a seeded table: a language that can be computed row by row."""

    def __init__(self, seed: int, *, spread: float = 1.5) -> None:
        self.table = (np.random.default_rng(seed).normal(size=(VOCAB, VOCAB, VOCAB)) * spread).astype(np.float32)

    def rows(self, tokens: Sequence[int], count: int) -> Floats:
        """The logits after each of the last `count` tokens."""
        ends = range(len(tokens) - count, len(tokens))
        return np.stack([self.table[tokens[end - 1], tokens[end]] for end in ends])


def decode(model: Model, prompt: list[int], options: GenerateOptions, new: int, drafts: int) -> list[int]:
    """Decode with drafts of that many tokens, mostly wrong ones among them; 0 decodes plainly."""
    sampler, tokens = Sampler(options), list(prompt)
    sampler.observe(prompt)
    random = np.random.default_rng(1)
    while len(tokens) < len(prompt) + new:
        draft = random.integers(VOCAB, size=drafts).tolist()
        tokens += verify_draft(model.rows([*tokens, *draft], 1 + drafts), draft, sampler)
    return tokens[len(prompt) : len(prompt) + new]


class OnlyTokens:
    """A constraint that admits one text, and is complete at its end."""

    def __init__(self, text: Sequence[int]) -> None:
        self.rest = list(text)

    @property
    def is_complete(self) -> bool:
        return not self.rest

    def mask(self, logits: Floats) -> Floats:
        masked = np.full_like(logits, -np.inf)
        masked[self.rest[0]] = logits[self.rest[0]]
        return masked

    def accept(self, token: int) -> None:
        assert token == self.rest.pop(0)

    def count_valid(self, tokens: Sequence[int]) -> int:
        agree = [a == b for a, b in zip(tokens, self.rest, strict=False)]
        return agree.index(False) if False in agree else len(agree)


OPTIONS = (
    GenerateOptions(),
    GenerateOptions(repetition_penalty=1.3),
    GenerateOptions(temperature=0.8, seed=3),
    GenerateOptions(temperature=1.2, top_k=3, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=4),
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("drafts", [1, 3, 8])
def test_drafts_change_no_token(options: GenerateOptions, drafts: int) -> None:
    for seed in range(20):
        model = Model(seed)
        assert decode(model, [0, 1], options, 40, drafts) == decode(model, [0, 1], options, 40, 0)


def test_greedy_verification_keeps_what_equals_the_argmax() -> None:
    logits = np.zeros((4, VOCAB), np.float32)
    for row, best in enumerate((2, 4, 1, 3)):
        logits[row, best] = 1
    assert verify_draft(logits, [2, 4, 1], Sampler(GenerateOptions())) == [2, 4, 1, 3]
    assert verify_draft(logits, [2, 0, 1], Sampler(GenerateOptions())) == [2, 4]
    assert verify_draft(logits[:1], [], Sampler(GenerateOptions())) == [2]
    with pytest.raises(ValueError, match="rows of logits"):
        verify_draft(logits, [2], Sampler(GenerateOptions()))


class Numbered:
    """Draws with given numbers instead of random ones, by the running sum of the sampler's own distribution."""

    def __init__(self, options: GenerateOptions, numbers: Sequence[float]) -> None:
        self.sampler, self.numbers = Sampler(options), list(numbers)

    def next(self, logits: Floats) -> int:
        ids, probabilities = self.sampler.distribution(logits)
        return int(ids[probabilities.cumsum().searchsorted(self.numbers.pop(0), side="right")])


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), st.integers(0, 2))
def test_acceptance_and_residual_are_the_rejection_rule_in_closed_form(weights: list[int], drafted: int) -> None:
    total = sum(weights)
    logits = np.log(np.array([weights, weights], np.float32))
    # every number of a grid with `total` cells: frequencies are the probabilities themselves, not estimates
    firsts = [
        verify_draft(logits, [drafted], Numbered(GenerateOptions(temperature=1), ((i + 0.5) / total, 0.0)))
        for i in range(total)
    ]
    kept = sum(len(picked) == 2 for picked in firsts)
    assert kept == weights[drafted]  # accepted with p(x) / q(x) = p(x)
    for token in {0, 1, 2} - {drafted}:  # else p without x, in its own proportions
        assert sum(picked == [token] for picked in firsts) == weights[token]


def test_pairs_of_tokens_are_drawn_from_the_joint_distribution() -> None:
    model, options = Model(7), GenerateOptions(temperature=1, seed=11)
    sampler = Sampler(options)
    first = Sampler(options).distribution(model.rows([0, 1], 1)[0])[1]
    counts = np.zeros((VOCAB, VOCAB))
    for draw in range(DRAWS):
        draft = [draw % VOCAB, draw // VOCAB % VOCAB]
        picked = verify_draft(model.rows([0, 1, *draft], 3), draft, sampler)
        if len(picked) == 1:
            picked += verify_draft(model.rows([0, 1, *picked], 1), [], sampler)
        counts[picked[0], picked[1]] += 1
    second = np.stack([Sampler(options).distribution(model.rows([1, token], 1)[0])[1] for token in range(VOCAB)])
    expected = DRAWS * first[:, None] * second
    assert float(((counts - expected) ** 2 / expected).sum()) < CHI_SQUARE_LIMIT


def test_every_row_is_masked_and_nothing_follows_a_complete_text() -> None:
    logits = np.zeros((4, VOCAB), np.float32)
    constraint = OnlyTokens([3, 1, 4, 1])
    assert verify_draft(logits, [3, 1, 0], Sampler(GenerateOptions()), constraint) == [3, 1, 4]
    assert verify_draft(logits, [1, 2, 3], Sampler(GenerateOptions()), constraint) == [1]
    assert constraint.is_complete


def taught_costs(costs: dict[int, float], rounds: int = 30, second: float = 0.01) -> ForwardCosts:
    model = ForwardCosts()
    for _ in range(rounds):
        for rows, cost in costs.items():
            model.observe(rows, cost * second)
    return model


def test_costs_start_from_the_prior() -> None:
    costs = ForwardCosts()
    assert not costs.is_measured
    assert [costs.ratio(rows) for rows in (1, 2, 4, 8, 16)] == pytest.approx([1.0, 1.35, 1.65, 2.25, 3.45])


@pytest.mark.parametrize("factor", [0.1, 1.0, 5.0])
def test_costs_learn_from_some_numbers_of_rows_what_the_others_cost(factor: float) -> None:
    costs = taught_costs({1: 1.0} | {rows: 1 + factor * (PRIOR_COSTS[rows] - 1) for rows in (2, 4, 8)})
    assert costs.is_measured
    assert costs.ratio(6) == pytest.approx(1 + factor * (PRIOR_COSTS[6] - 1), rel=COST_TOLERANCE)


def test_costs_forget_and_one_interruption_is_not_believed() -> None:
    costs = taught_costs({1: 1, 2: 1.4, 4: 1.8})
    before = costs.ratio(4)
    costs.observe(4, 1.0)  # a hundred times as long
    assert costs.ratio(4) < 1.25 * before
    for _ in range(20):
        costs.observe(1, 0.01)
        costs.observe(4, 0.04)
    assert costs.ratio(4) == pytest.approx(4, rel=COST_TOLERANCE)
    for _ in range(4_000):
        costs.observe(1, 0.01)
    assert not costs.is_measured
    assert costs.ratio(4) == pytest.approx(PRIOR_COSTS[4], abs=COST_TOLERANCE)


def test_costs_ignore_several_rows_before_one_row_is_known() -> None:
    costs = ForwardCosts()
    costs.observe(4, 1.0)
    assert not costs.is_measured


def test_acceptance_is_learned_for_each_length_of_match_and_evidence() -> None:
    acceptance = Acceptance()
    right, wrong, other = Prediction(7, 2, "single"), Prediction(7, 9, "single"), Prediction(7, 2, "repeated")
    for prediction, prior in ((right, 1), (wrong, 4)):
        assert acceptance.probability(prediction) == pytest.approx(PRIOR_ACCEPTANCE["single"][prior])
    for _ in range(100):
        acceptance.observe(right, 7)
        acceptance.observe(wrong, 8)
    assert acceptance.probability(right) > 0.95
    assert acceptance.probability(wrong) < 0.05
    assert acceptance.probability(other) == PRIOR_ACCEPTANCE["repeated"][1]


def speculate(prompt: list[int], text: list[int], costs: ForwardCosts, actual: dict[int, float]) -> list[int]:
    """Write a given text, every forward as long as `actual` says; the draft length of every forward."""
    speculator, written, lengths = Speculator(costs, prompt), 1, []
    speculator.record([], text[:1])
    while written < len(text):
        draft = speculator.draft(len(text) - written - 1)
        agree = next((i for i, token in enumerate(draft) if token != text[written + i]), len(draft))
        picked = text[written : written + agree + 1]
        lengths.append(len(draft))
        speculator.record(draft, picked, 0.01 * np.interp(1 + len(draft), list(actual), list(actual.values())))
        written += len(picked)
    assert speculator.drafted == sum(lengths)
    assert speculator.accepted == len(text) - 1 - len(lengths)
    return lengths


def test_drafts_grow_only_after_full_acceptance() -> None:
    text = list(range(100, 400))
    costs = taught_costs({1: 1.0, **PRIOR_COSTS})
    lengths = speculate(text, text, costs, {1: 1.0, **PRIOR_COSTS})
    drafted = [length for length in lengths if length]
    assert drafted[0] <= FIRST_DRAFT
    assert max(drafted) == MOST_DRAFTED
    longest = accumulate(drafted, max)  # all were accepted
    assert all(after <= 2 * before + 1 for before, after in zip(longest, drafted[1:], strict=False))
    assert len(text) / len(lengths) > 5


def test_a_rejection_shortens_the_next_draft() -> None:
    # the text is the prompt with one word in ten changed
    prompt = list(range(1000, 1400))
    text = [token + 5000 if i % 40 == 39 else token for i, token in enumerate(prompt)]
    lengths = speculate(prompt, text, taught_costs({1: 1.0, **PRIOR_COSTS}), {1: 1.0, **PRIOR_COSTS})
    assert max(lengths) > FIRST_DRAFT
    assert len(text) / len(lengths) > 3


def test_nothing_is_drafted_where_lookup_is_never_right() -> None:
    # every pair that comes again goes on otherwise
    random = np.random.default_rng(0)
    seen: dict[tuple[int, int], set[int]] = {}
    text = [0, 1]
    while len(text) < 3_000:
        options = set(range(24)) - seen.setdefault((text[-2], text[-1]), set())
        text.append(int(random.choice(sorted(options or {24 + len(text)}))))
        seen[text[-3], text[-2]].add(text[-1])
    lengths = speculate(text[:500], text[500:], ForwardCosts(), {1: 1.0, **PRIOR_COSTS})
    wasted = sum(length > 0 for length in lengths)
    assert wasted <= WASTE_LIMIT * len(lengths)


def test_little_is_lost_where_several_rows_cost_as_much_as_one_by_one() -> None:
    random = np.random.default_rng(0)
    text = [0]
    while len(text) < 5_000:  # mostly as before: worth copying at any lower cost
        text.append((text[-1] + 1) % 50 if random.random() < 0.8 else int(random.integers(50)))
    actual = {rows: float(rows) for rows in range(1, 17)}
    lengths = speculate(text[:500], text[500:], ForwardCosts(), actual)
    assert sum(1 + length for length in lengths) < (1 + WASTE_LIMIT) * len(text[500:])
    cheap = speculate(text[:500], text[500:], ForwardCosts(), {1: 1.0, **PRIOR_COSTS})
    assert len(cheap) < 0.6 * len(lengths)


def test_end_tokens_are_not_drafted() -> None:
    speculator = Speculator(taught_costs({1: 1.0, 16: 1.1}), [7, 8, 9, END, 4, 7, 8, 9] * 3 + [7], {END})
    speculator.record([], [8])
    assert speculator.draft(8) == [9]


def test_a_draft_is_cut_to_what_the_constraint_admits_and_to_what_is_asked_for() -> None:
    def fresh() -> Speculator:
        speculator = Speculator(taught_costs({1: 1.0, 16: 1.1}), list(range(30, 90)) + list(range(30, 50)))
        speculator.record([], [50])
        return speculator

    assert fresh().draft(8) == [51, 52, 53]
    assert fresh().draft(2) == [51, 52]
    assert fresh().draft(0) == []
    assert fresh().draft(8, OnlyTokens([51, 52, 1])) == [51, 52]
    assert fresh().draft(8, OnlyTokens([1])) == []


def test_what_a_structure_demands_is_drafted_before_lookup_and_learned_apart() -> None:
    speculator = Speculator(taught_costs({1: 1.0, 16: 1.1}), [7, 8, 9, 4, 7])
    speculator.record([], [8])
    assert speculator.draft(8, OnlyTokens([3, 2, 1, 0]), forced=[3, 2, 1]) == [3, 2, 1]
    speculator.record([3, 2, 1], [3, 2, 1])  # the structure was complete
    assert (speculator.drafted, speculator.accepted) == (3, 3)
    for _ in range(50):  # always cut into tokens otherwise
        drafted = speculator.draft(8, None, forced=[3, 2, 1])
        speculator.record(drafted, [4])
    assert drafted == []
