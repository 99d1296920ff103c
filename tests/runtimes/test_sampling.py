from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import logits_process

from edgekit.errors import GenerationError
from edgekit.runtimes.sampling import Sampler
from edgekit.session import GenerateOptions

PROBABILITY_TOLERANCE = 2e-6
BORDER_TOLERANCE = 1e-5
NEGLIGIBLE = 1e-30  # float32 ends there, the reference computes its last step in float64
DRAWS = 20_000
SUM_TOLERANCE = 1e-12
FREQUENCY_TOLERANCE = 5 / DRAWS**0.5
LARGE_VOCAB = 150_000

END = 11

Floats: TypeAlias = NDArray[np.float32]
History: TypeAlias = tuple[list[int], list[int]]  # prompt, generated


def random_logits(seed: int, size: int, *, spread: float = 3.0) -> Floats:
    return (np.random.default_rng(seed).normal(size=size) * spread).astype(np.float32)


class Generator(GenerationMixin):  # type: ignore[misc]
    config = SimpleNamespace(is_encoder_decoder=False)


class PresenceAndFrequency(logits_process.LogitsProcessor):  # type: ignore[misc]
    """OpenAI's definition, in the place and order of vLLM: transformers has neither."""

    def __init__(self, options: GenerateOptions, prompt_length: int) -> None:
        self.options, self.prompt_length = options, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self.prompt_length :], minlength=scores.shape[-1])
        scores = scores - self.options.frequency_penalty * counts
        return scores - self.options.presence_penalty * (counts > 0)


def reference_processors(options: GenerateOptions, prompt_length: int) -> list[Any]:
    """What transformers' generate applies, put together and ordered by itself; our two penalties after its own."""
    config = GenerationConfig(
        do_sample=options.temperature > 0,
        repetition_penalty=float(options.repetition_penalty),
        sequence_bias={(token,): float(bias) for token, bias in options.logit_bias.items()} or None,
        min_new_tokens=options.min_tokens or None,
    )
    if options.temperature > 0:
        config.update(temperature=float(options.temperature), top_k=options.top_k, top_p=options.top_p)
        config.update(min_p=options.min_p or None, typical_p=options.typical_p)
    config._eos_token_tensor = torch.tensor(sorted({END, *options.stop_tokens}))
    processors = list(Generator()._get_logits_processor(config, prompt_length, device="cpu"))
    own = (logits_process.SequenceBiasLogitsProcessor, logits_process.RepetitionPenaltyLogitsProcessor)
    place = sum(isinstance(processor, own) for processor in processors)
    return [*processors[:place], PresenceAndFrequency(options, prompt_length), *processors[place:]]


def reference_scores(options: GenerateOptions, logits: NDArray[np.floating], history: History) -> torch.Tensor:
    prompt, generated = history
    tokens = torch.tensor([prompt + generated], dtype=torch.long)
    scores = torch.from_numpy(logits.copy())[None]
    for processor in reference_processors(options, len(prompt)):
        scores = processor(tokens, scores)
    return scores[0]


def reference_distribution(
    options: GenerateOptions, logits: NDArray[np.floating], history: History
) -> NDArray[np.float64]:
    result: NDArray[np.float64] = reference_scores(options, logits, history).double().softmax(-1).numpy()
    return result


def sampler_after(options: GenerateOptions, history: History) -> Sampler:
    sampler = Sampler(options, frozenset({END}))
    sampler.observe(history[0])
    for token in history[1]:
        sampler.accept(token)
    return sampler


def our_distribution(options: GenerateOptions, logits: Floats, history: History) -> NDArray[np.float64]:
    ids, probabilities = sampler_after(options, history).distribution(logits)
    assert (np.diff(ids) > 0).all()
    dense = np.zeros(len(logits))
    dense[ids] = probabilities
    return dense


def is_on_a_border(options: GenerateOptions, logits: Floats, history: History) -> bool:
    """Whether a token is so close to the edge of a filter that float32 rounding may decide either way."""
    plain = replace(options, top_p=1.0, min_p=0.0, typical_p=1.0)
    probabilities = reference_distribution(plain, logits, history)
    masses = np.sort(probabilities)[::-1].cumsum()
    near_mass = options.top_p < 1 and np.abs(masses - options.top_p).min() < BORDER_TOLERANCE
    ratios = probabilities[probabilities < probabilities.max()] / probabilities.max()
    near_ratio = bool((np.abs(ratios - options.min_p) < BORDER_TOLERANCE * options.min_p).any())
    return near_mass or near_ratio or (options.typical_p < 1 and is_on_typical_border(options, logits, history))


def is_on_typical_border(options: GenerateOptions, logits: Floats, history: History) -> bool:
    probabilities = reference_distribution(replace(options, typical_p=1.0), logits, history)
    probabilities = probabilities[probabilities > 0]
    information = -np.log(probabilities)
    distances = np.abs(information - (probabilities * information).sum())
    order = np.argsort(distances)
    masses = probabilities[order].cumsum()
    border = order[min(int(masses.searchsorted(options.typical_p)), len(order) - 1)]
    rivals = np.abs(distances - distances[border]) < BORDER_TOLERANCE * max(1.0, information[border])
    equals = np.isclose(probabilities, probabilities[border], rtol=1e-12)
    return bool(np.abs(masses - options.typical_p).min() < BORDER_TOLERANCE or (rivals & ~equals).any())


penalties = {
    "repetition_penalty": st.sampled_from([1.0, 1.1, 2.0, 0.7]),
    "presence_penalty": st.sampled_from([0.0, 0.5, -1.5]),
    "frequency_penalty": st.sampled_from([0.0, 0.3, -0.2]),
    "min_tokens": st.sampled_from([0, 3, 9]),
    "stop_tokens": st.sampled_from([(), (2, 5)]),
    "logit_bias": st.dictionaries(st.integers(0, 7), st.sampled_from([-100.0, -1.5, 0.7, 5.0, -np.inf]), max_size=3),
}
all_options = st.builds(
    GenerateOptions,
    temperature=st.floats(0.05, 4),
    top_k=st.sampled_from([0, 1, 2, 7, 50, 5000]),
    top_p=st.sampled_from([1.0, 0.95, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.7, 1.0]),
    typical_p=st.sampled_from([1.0, 0.95, 0.5, 0.2, 0.01]),
    **penalties,
)
greedy_options = st.builds(GenerateOptions, **penalties)


@st.composite
def histories(draw: st.DrawFn, size: int) -> History:
    tokens = st.lists(st.integers(0, size - 1), max_size=20)
    return draw(tokens.filter(bool)), draw(tokens)


@settings(max_examples=400, deadline=None)
@given(all_options, st.integers(12, 400), st.integers(0, 2**32), st.floats(0.1, 10), st.data())
def test_distribution_is_that_of_transformers(
    options: GenerateOptions, size: int, seed: int, spread: float, data: st.DataObject
) -> None:
    logits = random_logits(seed, size, spread=spread)
    history = data.draw(histories(size))
    if is_on_a_border(options, logits, history):
        return
    expected, got = reference_distribution(options, logits, history), our_distribution(options, logits, history)
    np.testing.assert_array_equal(got > NEGLIGIBLE, expected > NEGLIGIBLE)
    np.testing.assert_allclose(got, expected, atol=PROBABILITY_TOLERANCE)


@settings(max_examples=200, deadline=None)
@given(greedy_options, st.integers(12, 400), st.integers(0, 2**32), st.floats(0.1, 10), st.data())
def test_greedy_choice_is_that_of_transformers(
    options: GenerateOptions, size: int, seed: int, spread: float, data: st.DataObject
) -> None:
    logits = random_logits(seed, size, spread=spread)
    history = data.draw(histories(size))
    scores = reference_scores(options, logits, history)
    first, second = scores.topk(2).values.tolist()
    token = sampler_after(options, history).next(logits)
    assert float(scores[token]) == first or first - second < BORDER_TOLERANCE * abs(first)


def changes(value: object) -> str:
    names = [item.name for item in fields(GenerateOptions)]
    differing = [name for name in names if getattr(value, name, None) != getattr(GenerateOptions(), name)]
    return ",".join(f"{name}={getattr(value, name)}" for name in differing)


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(
    "options",
    [
        GenerateOptions(temperature=0.8, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.1),
        GenerateOptions(temperature=1.0, top_k=3000, top_p=0.99),
        GenerateOptions(temperature=1.0, top_p=0.9),
        GenerateOptions(temperature=1.0, top_p=0.9, min_p=0.02),
        GenerateOptions(temperature=1.0),
        GenerateOptions(temperature=1.0, top_p=0.99),
        GenerateOptions(temperature=1.0, typical_p=0.9),
        GenerateOptions(temperature=0.8, top_k=40, top_p=0.9, typical_p=0.5, frequency_penalty=0.2),
    ],
    ids=changes,
)
def test_distribution_is_that_of_transformers_for_a_large_vocabulary(options: GenerateOptions, spread: float) -> None:
    logits = random_logits(3, LARGE_VOCAB, spread=spread)
    history = (list(range(0, 5000, 7)), list(range(0, 3000, 11)))
    # in float32, torch's own borders move: it sums 150,000 probabilities one by one
    expected = reference_distribution(options, logits.astype(np.float64), history)
    got = our_distribution(options, logits, history)
    np.testing.assert_array_equal(got > 0, expected > 0)
    np.testing.assert_allclose(got, expected, atol=PROBABILITY_TOLERANCE)


@given(st.lists(st.sampled_from([-1.0, 0.0, -0.0, 1.0, 2.0, -np.inf, -3e38]), min_size=12, max_size=30), all_options)
@settings(max_examples=300, deadline=None)
def test_as_many_ties_are_kept_as_by_transformers(values: list[float], options: GenerateOptions) -> None:
    logits = np.array([*values, 0.0], dtype=np.float32)
    if is_on_a_border(options, logits, ([0], [])):
        return
    expected, got = reference_distribution(options, logits, ([0], [])), our_distribution(options, logits, ([0], []))
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


@settings(max_examples=100, deadline=None)
@given(all_options | greedy_options, st.integers(12, 3000), st.integers(0, 2**32), st.data())
def test_the_logits_are_never_written_to(options: GenerateOptions, size: int, seed: int, data: st.DataObject) -> None:
    logits = random_logits(seed, size)
    before = logits.copy()
    logits.setflags(write=False)
    sampler = sampler_after(options, data.draw(histories(size)))
    ids, probabilities = sampler.distribution(logits)
    kept = ids.copy(), probabilities.copy()
    sampler.next(logits)
    sampler.distribution(-logits)
    np.testing.assert_array_equal(logits, before)
    # nor is what was returned, by the calls that follow
    np.testing.assert_array_equal(ids, kept[0])
    np.testing.assert_array_equal(probabilities, kept[1])


@settings(max_examples=200, deadline=None)
@given(all_options, st.integers(12, 3000), st.integers(0, 2**32), st.floats(0, 1, exclude_max=True), st.data())
def test_distribution_is_what_next_draws_from(
    options: GenerateOptions, size: int, seed: int, uniform: float, data: st.DataObject
) -> None:
    logits = random_logits(seed, size)
    sampler = sampler_after(options, data.draw(histories(size)))
    ids, probabilities = sampler.distribution(logits)
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    ends = dict(zip(ids.tolist(), probabilities.cumsum().tolist(), strict=True))
    token = sampler.pick(logits, uniform)
    width = float(probabilities[ids.searchsorted(token)])
    assert width > 0
    assert ends[token] - width - SUM_TOLERANCE <= uniform <= ends[token] + SUM_TOLERANCE


@settings(max_examples=50, deadline=None)
@given(all_options, st.integers(0, 1000))
def test_drawing_from_distribution_and_accepting_is_next(options: GenerateOptions, seed: int) -> None:
    # how speculation goes: no step needs to be taken back
    options = replace(options, seed=seed)
    stepwise, whole = Sampler(options, frozenset({END})), Sampler(options, frozenset({END}))
    for step in range(12):
        logits = random_logits(step, 40)
        ids, probabilities = stepwise.distribution(logits)
        token = int(ids[probabilities.cumsum().searchsorted(stepwise.uniform(), side="right")])
        stepwise.accept(token)
        assert whole.next(logits) == token


@settings(max_examples=100, deadline=None)
@given(all_options, st.integers(12, 500), st.integers(0, 2**32))
def test_a_filter_more_keeps_no_token_more(options: GenerateOptions, size: int, seed: int) -> None:
    logits = random_logits(seed, size)
    loose = Sampler(replace(options, typical_p=1.0, min_p=0.0)).distribution(logits)[0]
    strict = Sampler(options).distribution(logits)[0]
    assert set(strict.tolist()) <= set(loose.tolist())


@settings(max_examples=50, deadline=None)
@given(all_options, st.integers(0, 2**32))
def test_forbidding_the_rest_changes_nothing(options: GenerateOptions, seed: int) -> None:
    """A mask of a structure: the same as a vocabulary of the allowed tokens alone."""
    logits = random_logits(seed, 5000)
    masked = np.full(5000, -np.inf, dtype=np.float32)
    masked[:100] = logits[:100]
    ids, probabilities = Sampler(options).distribution(masked)
    alone, expected = Sampler(options).distribution(logits[:100])
    possible = probabilities > 0
    np.testing.assert_array_equal(ids[possible], alone[expected > 0])
    np.testing.assert_allclose(probabilities[possible], expected[expected > 0], rtol=1e-12)


def test_a_number_from_0_to_1_picks_by_rising_id() -> None:
    sampler = Sampler(GenerateOptions(temperature=1.0))
    logits = np.log(np.array([0.125, 0, 0.25, 0.5, 0.125, 0], dtype=np.float64) + 1e-300).astype(np.float32)
    uniforms = (0.0, 0.12, 0.13, 0.37, 0.38, 0.87, 0.88, np.nextafter(1, 0))
    assert [sampler.pick(logits, uniform) for uniform in uniforms] == [0, 0, 2, 2, 3, 3, 4, 4]


def test_same_seed_gives_the_same_tokens() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(GenerateOptions(temperature=1.0, top_k=40, seed=seed))
        return [sampler.next(random_logits(step, 1000)) for step in range(50)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_seed_gives_the_same_tokens_in_every_release() -> None:
    sampler = Sampler(GenerateOptions(temperature=1.0, seed=42))
    assert [sampler.next(np.zeros(1000, dtype=np.float32)) for _ in range(4)] == [773, 438, 858, 697]


def test_streams_of_one_seed_differ_and_are_repeatable() -> None:
    def draw(seed: int | None, stream: int | None) -> tuple[float, ...]:
        sampler = Sampler(GenerateOptions(temperature=1.0, seed=seed), stream=stream)
        return tuple(sampler.uniform() for _ in range(3))

    keys = [(seed, stream) for seed in (0, 1, 5, 5 + (1 << 32)) for stream in (None, 0, 1, 2)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert all(draw(*key) == draw(*key) for key in keys)
    assert draw(None, 0) != draw(None, 0)


def test_streams_give_the_same_numbers_in_every_release() -> None:
    sampler = Sampler(GenerateOptions(seed=42), stream=3)
    assert [sampler.uniform() for _ in range(2)] == [0.7639328676507445, 0.9713361041904083]


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


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6, 1e30, 1e300])
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
