"""logprobs.json: the log-probability of a token and of the most probable ones, of the model's own logits.

Reference: torch's log_softmax in float64; the order of the alternatives by Python's sort.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from logits import row

TOLERANCE = 1e-5


def suite() -> dict[str, Any]:
    """The file."""
    rows = {"8 tokens": row(8, 37, 101), "64 tokens": row(64, 53, 131), "far apart": [90.0, -60.0, 30.0, 89.5]}
    cases = [
        _case(f"{name}, token {token}, {count} alternatives", logits, token, count)
        for name, logits in rows.items()
        for token in (0, len(logits) - 1)
        for count in (0, 1, 3)
    ]
    cases += [
        _case("more alternatives than tokens", rows["8 tokens"], 2, 20),
        _case("equals by rising id", [1.0, 2.0, 2.0, 1.0, 2.0], 4, 4),
        _case("forbidden tokens are no alternatives", rows["8 tokens"], 2, 8, [1, 5]),
        _case("certain", [0.0, 0.0, 0.0], 1, 3, [0, 2]),
    ]
    broken = {"name": "NaN", "logits": [0.0, 1.0], "nan": [1], "token": 0, "alternatives": 1}
    cases.append({**broken, "expect": {"error": "GenerationError"}})
    return {"suite": "logprobs", "version": 1, "tolerance": TOLERANCE, "cases": cases}


def _case(name: str, logits: Sequence[float], token: int, count: int, forbidden: Sequence[int] = ()) -> dict[str, Any]:
    values = [-math.inf if place in forbidden else value for place, value in enumerate(logits)]
    logprobs = torch.tensor(values, dtype=torch.float64).log_softmax(0).tolist()
    order = sorted((place for place in range(len(values)) if values[place] > -math.inf), key=lambda at: -values[at])
    given: dict[str, Any] = {"name": name, "logits": list(logits)} | (
        {"minus_infinity": list(forbidden)} if forbidden else {}
    )
    best = order[:count]
    expect = {
        "logprob": _short(logprobs[token]),
        "alternatives": best,
        "alternative_logprobs": [_short(logprobs[place]) for place in best],
    }
    return {**given, "token": token, "alternatives": count, "expect": expect}


def _short(value: float) -> float:
    return float(f"{value:.9g}") + 0.0  # no minus zero
