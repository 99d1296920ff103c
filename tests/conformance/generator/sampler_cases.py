"""sampler.json: logits and options to the distribution, and a number from [0, 1) to the token.

Reference: `reference.distribution`, in float64 and again in float32. A case is refused here if the two keep other tokens,
if a small change of an option does, or if a number falls near the border of two tokens: float32 must not decide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from logits import from_formula, row
from reference import Question, distribution

TOLERANCE = 1e-5
MARGIN = 1e-4
NUMBERS = (0.0, 0.07, 0.21, 0.38, 0.5, 0.63, 0.77, 0.9, 0.98, 0.9999999999999999)
SMALL, MEDIUM, WIDE = row(8, 37, 101), row(16, 29, 67), row(64, 53, 131)
FLAT = row(32, 11, 37, divisor=32)
LARGE = {"size": 150_000, "multiplier": 7919, "modulus": 150_001, "offset": 150_000, "divisor": 64}

Options = dict[str, Any]
FILTERS: dict[str, list[Options]] = {
    "temperature": [{"temperature": value} for value in (1.0, 0.5, 0.7, 2.0)],
    "top_k": [{"temperature": 1.0, "top_k": value} for value in (1, 2, 5, 1000)],
    "top_p": [{"temperature": 1.0, "top_p": value} for value in (0.01, 0.5, 0.9, 0.95)],
    "min_p": [{"temperature": 1.0, "min_p": value} for value in (0.02, 0.1, 0.5, 1.0)],
    "typical_p": [{"temperature": 1.0, "typical_p": value} for value in (0.2, 0.5, 0.9, 0.95)],
    "all filters": [
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 12, "min_p": 0.1, "typical_p": 0.9},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.92, "min_p": 0.02, "typical_p": 0.8},
    ],
}
PENALTIES: dict[str, list[Options]] = {
    "repetition_penalty": [{"repetition_penalty": value} for value in (1.1, 2.0, 0.7)],
    "presence_penalty": [{"presence_penalty": value} for value in (0.6, 2.0, -1.0)],
    "frequency_penalty": [{"frequency_penalty": value} for value in (0.4, 1.5, -0.5)],
    "logit_bias": [{"logit_bias": {"2": 1.5, "5": -2.25}}, {"logit_bias": {"0": None, "3": 4.0}}],
    "all penalties": [
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.25},
        {
            "repetition_penalty": 1.3,
            "presence_penalty": -0.5,
            "frequency_penalty": 0.75,
            "logit_bias": {"1": 2.0, "6": -1.0},
        },
    ],
}
HISTORIES: tuple[tuple[list[int], list[int]], ...] = (
    ([], []),
    ([1, 1, 4], []),
    ([], [2, 3, 2, 2]),
    ([1, 4, 6], [3, 0, 3, 1]),
)
ALL_OPTIONS: Options = {
    "temperature": 0.9,
    "top_k": 10,
    "top_p": 0.93,
    "min_p": 0.03,
    "typical_p": 0.9,
    "repetition_penalty": 1.15,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "logit_bias": {"4": 1.25, "7": -3.0, "9": None},
    "min_tokens": 6,
}


def suite() -> dict[str, Any]:
    """The file."""
    cases = [*_filter_cases(), *_penalty_cases(), *_end_token_cases(), *_greedy_cases(), *_tie_cases()]
    cases += [*_mixed_cases(), *_forbidden_cases(), *_large_cases(), *_error_cases()]
    return {"suite": "sampler", "version": 1, "tolerance": TOLERANCE, "cases": cases}


def _filter_cases() -> list[Options]:
    rows = {"8 tokens": SMALL, "16 tokens": MEDIUM, "flat": FLAT, "64 tokens": WIDE}
    return [
        _case(f"{_shown(options)}, {shape}", logits, options)
        for group in FILTERS.values()
        for options in group
        for shape, logits in rows.items()
        if _is_clear(Question(logits, options))
    ]


def _penalty_cases() -> list[Options]:
    return [
        _case(f"{_shown(options)}, prompt {prompt}, generated {generated}", MEDIUM, options, prompt, generated)
        for group in PENALTIES.values()
        for base in group
        for options in (base, {**base, "temperature": 1.0})
        for prompt, generated in HISTORIES
    ]


def _end_token_cases() -> list[Options]:
    best = max(range(len(SMALL)), key=SMALL.__getitem__)
    found = []
    for count, temperature in itertools.product((0, 1, 2, 3), (0.0, 1.0)):
        generated, options = [0, 3, 0][:count], {"temperature": temperature, "min_tokens": 2}
        name = f"min_tokens 2 after {count}, temperature {temperature:g}"
        found.append(_case(name, SMALL, options, [1], generated, [best]))
    both = {"min_tokens": 3, "temperature": 1.0, "stop_tokens": [1, 2]}
    found.append(_case("min_tokens forbids stop tokens and end tokens", SMALL, both, [], [4], [best, 6]))
    unused = {"temperature": 1.0, "stop_tokens": [1, 2]}
    found.append(_case("stop tokens without min_tokens stay", SMALL, unused, [], [], [best]))
    raised = {"temperature": 1.0, "min_tokens": 1, "logit_bias": {str(best): 50.0}}
    found.append(_case("a bias does not bring back a forbidden end token", SMALL, raised, [], [], [best]))
    return found


def _greedy_cases() -> list[Options]:
    ignored = {"temperature": 0.0, "top_k": 2, "top_p": 0.5, "min_p": 0.9, "typical_p": 0.1}
    return [
        _case("greedy", MEDIUM, {}),
        _case("greedy is temperature 0", WIDE, {"temperature": 0.0}),
        _case("greedy takes the first of equals", [1.0, 5.0, 5.0, 2.0, 5.0], {}),
        _case("greedy of all equal", [0.0] * 8, {}),
        _case("greedy has no use for filters", MEDIUM, ignored),
        _case("greedy of one token", [-3.5], {}),
        _case("greedy by penalties", [3.0, 4.0, -1.0], {"repetition_penalty": 2.0}, [], [1]),
        _case("repetition makes negative logits smaller", [-1.5, -1.0, -9.0], {"repetition_penalty": 2.0}, [1], []),
        _case("repetition counts a token once", [4.5, 2.0, 1.0], {"repetition_penalty": 2.0}, [0, 0, 0], [0]),
    ]


def _tie_cases() -> list[Options]:
    """By hand: which of equals transformers keeps is left to its sort. The first ones are kept by top-p, all by the others."""
    zeros = [0.0] * 8
    top_p = _stated(
        "top_p keeps the first of equals", zeros, {"temperature": 1.0, "top_p": 0.6}, list(range(5)), [0.2] * 5
    )
    pairs = [math.log(2), 0.0, math.log(2), 0.0]  # probabilities 1/3, 1/6, 1/3, 1/6
    some = _stated(
        "top_p keeps the first of equals at its border",
        pairs,
        {"temperature": 1.0, "top_p": 0.8},
        [0, 1, 2],
        [0.4, 0.2, 0.4],
    )
    return [
        top_p,
        some,
        _case("top_k keeps all equals at its border", [3.0, 1.0, 2.0, 2.0, 2.0, 0.0], {"temperature": 1.0, "top_k": 2}),
        _case("min_p 1 keeps all of the greatest", [3.0, 1.0, 3.0, 2.0], {"temperature": 1.0, "min_p": 1.0}),
        _case("typical_p keeps all equals at its border", zeros, {"temperature": 1.0, "typical_p": 0.5}),
    ]


def _mixed_cases() -> list[Options]:
    rows = {"16 tokens": MEDIUM, "flat": FLAT, "64 tokens": WIDE}
    return [
        _case(
            f"every option at once, {shape}, prompt {prompt}, generated {generated}",
            logits,
            ALL_OPTIONS,
            prompt,
            generated,
            [5],
        )
        for shape, logits in rows.items()
        for prompt, generated in HISTORIES
        if _is_clear(Question(logits, ALL_OPTIONS, prompt, generated, [5]))
    ]


def _forbidden_cases() -> list[Options]:
    forbidden = {"minus_infinity": [0, 3, 7, 12]}
    found = [
        _case(f"forbidden tokens are never kept, {_shown(options)}", MEDIUM, options, marks=forbidden)
        for options in (
            {},
            {"temperature": 1.0},
            {"temperature": 1.0, "top_k": 14},
            {"temperature": 1.0, "top_p": 0.99},
            {"temperature": 1.0, "min_p": 0.001},
            {"temperature": 1.0, "typical_p": 0.9},
            {"temperature": 1.0, "logit_bias": {"3": 10.0}},
            {"temperature": 1.0, "repetition_penalty": 0.5},
        )
    ]
    one = {"minus_infinity": [0, 1, 3, 4, 5, 6, 7]}
    return [*found, _case("one token is left", SMALL, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}, marks=one)]


def _large_cases() -> list[Options]:
    settings: tuple[Options, ...] = (
        {},
        {"temperature": 1.0, "top_k": 50},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.7, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 40, "typical_p": 0.6},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
    )
    logits, prompt = from_formula(LARGE), list(range(0, 5000, 499))
    return [_case(f"150,000 tokens, {_shown(options)}", logits, options, prompt, formula=LARGE) for options in settings]


def _error_cases() -> list[Options]:
    def refused(name: str, logits: Sequence[float], options: Options, **more: Any) -> Options:
        return {
            "name": name,
            "logits": list(logits),
            **more,
            "options": options,
            "expect": {"error": "GenerationError"},
        }

    found = []
    for temperature in (0.0, 1.0):
        options = {"temperature": temperature, "top_k": 2}
        said = f"temperature {temperature:g}"
        found += [
            refused(f"every token forbidden, {said}", [0.0, 0.0], options, minus_infinity=[0, 1]),
            refused(f"NaN, {said}", [0.0, 0.0, 9.0], options, nan=[1]),
            refused(f"NaN among forbidden tokens, {said}", [0.0, 0.0, 9.0], options, nan=[0], minus_infinity=[1, 2]),
            refused(f"plus infinity, {said}", [0.0, 0.0, 9.0], options, plus_infinity=[1]),
            refused(
                f"a bias forbids every token, {said}",
                [0.0, 1.0],
                {"temperature": temperature, "logit_bias": {"0": None, "1": None}},
            ),
            refused(
                f"min_tokens forbids every token, {said}",
                [0.0, 1.0],
                {"temperature": temperature, "min_tokens": 1},
                end_tokens=[0, 1],
            ),
        ]
    found.append(refused("a bias for a token outside the vocabulary", SMALL, {"logit_bias": {"8": 1.0}}))
    found.append(refused("a stop token outside the vocabulary", SMALL, {"stop_tokens": [8]}))
    return found


def _case(
    name: str,
    logits: Sequence[float],
    options: Options,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    end_tokens: Sequence[int] = (),
    *,
    marks: Mapping[str, list[int]] | None = None,
    formula: Mapping[str, int] | None = None,
) -> Options:
    marks = marks or {}
    values = [-math.inf if token in marks.get("minus_infinity", ()) else value for token, value in enumerate(logits)]
    question = Question(values, options, prompt, generated, end_tokens)
    if not _is_clear(question) and not name.startswith("typical_p keeps all"):
        raise AssertionError(f"{name}: float32 would decide")
    ids, probabilities = distribution(question)
    shown: Options = {"logits_formula": dict(formula)} if formula else {"logits": list(logits)}
    tokens = {"prompt": list(prompt), "generated": list(generated), "end_tokens": list(end_tokens)}
    given = {"name": name, **shown, **marks, **{key: value for key, value in tokens.items() if value}}
    return {**given, "options": options, "expect": _expected(ids, probabilities)}


def _stated(
    name: str, logits: Sequence[float], options: Options, ids: list[int], probabilities: list[float]
) -> Options:
    return {"name": name, "logits": list(logits), "options": options, "expect": _expected(ids, probabilities)}


def _expected(ids: list[int], probabilities: list[float]) -> Options:
    sums = list(itertools.accumulate(probabilities))
    borders = sums[:-1]
    clear = [number for number in NUMBERS if all(abs(border - number) > MARGIN for border in borders)]
    picked = [ids[sum(border <= number for border in borders)] for number in clear]
    short = [float(f"{value:.9g}") for value in probabilities]
    return {"ids": ids, "probabilities": short, "numbers": clear, "tokens": picked}


def _is_clear(question: Question) -> bool:
    """Whether neither float32 nor a slightly other option keeps other tokens."""
    kept = distribution(question)[0]
    single = distribution(question, torch.float32)[0]
    others = [
        distribution(Question(question.logits, changed, question.prompt, question.generated, question.end_tokens))[0]
        for changed in _nearby(question.options)
    ]
    return all(other == kept for other in (single, *others))


def _nearby(options: Mapping[str, Any]) -> list[Options]:
    found = []
    for key, factor in itertools.product(("top_p", "min_p", "typical_p"), (1 - MARGIN, 1 + MARGIN)):
        value = options.get(key, 0)
        if 0 < value < 1 and 0 < value * factor < 1:
            found.append({**options, key: value * factor})
    return found


def _shown(options: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return " ".join(f"{key}:{'forbidden' if item is None else f'{item:g}'}" for key, item in value.items())
        return f"{value:g}"

    return ", ".join(f"{key} {text(value)}" for key, value in options.items()) or "greedy"
