"""What choosing a token costs: median milliseconds a step, for a vocabulary of 150,000.

python tests/benchmarks/sampling.py

Two rows of logits: `flat` is normal with a deviation of 3, where a nucleus of 0.95 holds over ten thousand tokens;
`peaked` has twenty tokens far above the others, as most steps of a language model do.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgekit.runtimes.logprobs import token_logprob
from edgekit.runtimes.sampling import Sampler
from edgekit.session import GenerateOptions

VOCABULARY = 150_000
STEPS = 300
PROMPT = range(0, VOCABULARY, 75)  # 2,000 distinct tokens
REPLY = range(0, VOCABULARY, 300)  # 500
PENALTIES = GenerateOptions(repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1)


def options(**changes: float) -> GenerateOptions:
    """All penalties, and what else is asked for."""
    return GenerateOptions(
        repetition_penalty=PENALTIES.repetition_penalty,
        presence_penalty=PENALTIES.presence_penalty,
        frequency_penalty=PENALTIES.frequency_penalty,
        **changes,  # type: ignore[arg-type]
    )


CASES = {
    "greedy": GenerateOptions(),
    "greedy, 3 penalties": PENALTIES,
    "temperature": GenerateOptions(temperature=1.0),
    "top-k 50, top-p 0.95, min-p 0.05, 3 penalties": options(temperature=0.8, top_k=50, top_p=0.95, min_p=0.05),
    "top-p 0.95, min-p 0.05, 3 penalties": options(temperature=0.8, top_p=0.95, min_p=0.05),
    "top-p 0.95, 3 penalties": options(temperature=0.8, top_p=0.95),
    "top-p 0.99": GenerateOptions(temperature=1.0, top_p=0.99),
    "min-p 0.05": GenerateOptions(temperature=1.0, min_p=0.05),
    "typical-p 0.9": GenerateOptions(temperature=1.0, typical_p=0.9),
    "top-k 50, typical-p 0.9": GenerateOptions(temperature=1.0, top_k=50, typical_p=0.9),
}


def rows() -> dict[str, NDArray[np.float32]]:
    """The two rows of logits, seeded."""
    random = np.random.default_rng(0)
    flat = (random.normal(size=VOCABULARY) * 3).astype(np.float32)
    peaked = flat.copy()
    peaked[random.integers(0, VOCABULARY, 20)] += 12
    return {"flat": flat, "peaked": peaked}


def median_ms(step: Callable[[], object]) -> float:
    """Milliseconds of a step, the median of many."""
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return round(statistics.median(times) * 1e3, 3)


def sampler(chosen: GenerateOptions) -> Sampler:
    """A sampler in the middle of a reply."""
    result = Sampler(chosen)
    result.observe(PROMPT)
    for token in REPLY:
        result.accept(token)
    return result


def main() -> None:
    """Print one JSON object a case."""
    logits = rows()
    for name, chosen in CASES.items():
        following = sampler(chosen)
        figures = {row: median_ms(partial(following.next, values)) for row, values in logits.items()}
        print(json.dumps({"case": name} | figures))
    for count in (0, 5, 20):
        figures = {row: median_ms(partial(token_logprob, values, 7, count)) for row, values in logits.items()}
        print(json.dumps({"case": f"logprobs, {count} alternatives"} | figures))


if __name__ == "__main__":
    main()
