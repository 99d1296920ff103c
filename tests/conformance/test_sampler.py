from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.runtimes.sampling import Sampler
from edgekit.session import GenerateOptions

SUITE = "sampler"


def test_case(case: dict[str, Any], suite: dict[str, Any], outcome: Any, options_of: Any, logits_of: Any) -> None:
    def sampler() -> Sampler:
        made = Sampler(options_of(case["options"]), frozenset(case.get("end_tokens", [])))
        made.observe(case.get("prompt", []))
        for token in case.get("generated", []):
            made.accept(token)
        return made

    logits, expect = logits_of(case), case["expect"]
    if "error" in expect:
        assert outcome(lambda: sampler().distribution(logits)) == expect
        assert outcome(lambda: sampler().next(logits)) == expect
        return
    ids, probabilities = sampler().distribution(logits)
    kept = probabilities > 0
    assert ids[kept].tolist() == expect["ids"]
    np.testing.assert_allclose(probabilities[kept], expect["probabilities"], rtol=0, atol=suite["tolerance"])
    assert [sampler().pick(logits, number) for number in expect["numbers"]] == expect["tokens"]


def test_the_stream_picks_by_its_numbers() -> None:
    """`next` picks what `pick` does with the number drawn: so the cases pin it too."""
    logits = np.linspace(-2, 2, 40, dtype=np.float32)
    options = GenerateOptions(temperature=1.0, top_p=0.9, seed=3)
    numbers, drawing = Sampler(options), Sampler(options)
    for _ in range(50):
        assert drawing.pick(logits, numbers.uniform()) == drawing.next(logits)
