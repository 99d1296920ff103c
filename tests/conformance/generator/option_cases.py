"""options.json: option values that are taken, and such that are a typed error.

Reference: the ranges that the documentation of GenerateOptions states, written out by hand.
"""

from __future__ import annotations

import json
from typing import Any

TAKEN: dict[str, tuple[Any, ...]] = {
    "max_tokens": (1, 100_000, None),
    "min_tokens": (0, 7),
    "temperature": (0, 0.0, 0.7, 100.0),
    "top_k": (0, 1, 1_000_000),
    "top_p": (1, 1.0, 0.5, 1e-9),
    "min_p": (0, 1, 0.05),
    "typical_p": (1.0, 0.2),
    "repetition_penalty": (1, 0.5, 1.3),
    "presence_penalty": (0, -2.0, 2.0),
    "frequency_penalty": (0, -2.0, 2.0),
    "logit_bias": ({}, {"0": 1, "7": -100.0}, {"3": None}),
    "seed": (0, 42, None),
    "logprobs": (0, 5, 100, None),
    "prompt_logprobs": (0, 100, None),
    "stop": ([], ["a"], ["a", "\n\n", "好"]),
    "stop_tokens": ([], [0, 5]),
    "context_policy": ("error", "drop-oldest-turns", "sliding"),
}
REFUSED: dict[str, tuple[Any, ...]] = {
    "max_tokens": (0, -1),
    "min_tokens": (-1,),
    "temperature": (-0.1,),
    "top_k": (-1,),
    "top_p": (0, -0.5, 1.01),
    "min_p": (-0.1, 1.01),
    "typical_p": (0, 1.5),
    "repetition_penalty": (0, -1.0),
    "logit_bias": ({"-1": 1.0},),
    "seed": (-1,),
    "logprobs": (-1, 101),
    "prompt_logprobs": (-1, 101),
    "stop": ([""], ["a", ""]),
    "stop_tokens": ([-1],),
    "context_policy": ("truncate", ""),
}


def suite() -> dict[str, Any]:
    """The file."""
    taken = [_case(name, value, {"accepted": True}) for name, values in TAKEN.items() for value in values]
    refused = [_case(name, value, {"error": "GenerationError"}) for name, values in REFUSED.items() for value in values]
    none: dict[str, Any] = {"name": "no option", "options": {}, "expect": {"accepted": True}}
    longer: dict[str, Any] = {"min_tokens": 9, "max_tokens": 8}
    pairs: list[dict[str, Any]] = [
        {
            "name": "min_tokens as many as max_tokens",
            "options": longer | {"max_tokens": 9},
            "expect": {"accepted": True},
        },
        {"name": "min_tokens over max_tokens", "options": longer, "expect": {"error": "GenerationError"}},
    ]
    return {"suite": "options", "version": 1, "cases": [none, *taken, *refused, *pairs]}


def _case(name: str, value: Any, expect: dict[str, Any]) -> dict[str, Any]:
    return {"name": f"{name} {json.dumps(value, ensure_ascii=False)}", "options": {name: value}, "expect": expect}
