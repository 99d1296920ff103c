"""What holding a reply to a structure costs: per token, and once per model and per reply.

    python tests/benchmarks/structure.py BUNDLE

Prints one JSON object. A token's cost is `mask` and `accept` around the sampler's choice, in CPU time of the thread, so
that other work on the machine does not count, over texts that a model of random logits writes under a medium schema:
the worst case, since a real model comes back to states that are already compiled. speed.py has the time of a decode step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edgekit.runtimes.constraint import Constraint, TokenizerInfo
from edgekit.runtimes.output import make_constraint
from edgekit.session import GenerateOptions
from edgekit.structure import JsonSchema

TEXT = {"type": "string", "maxLength": 40}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "status": {"enum": ["active", "inactive", "banned"]},
        "address": {
            "type": "object",
            "properties": {"street": TEXT, "city": TEXT, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "city", "zip"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 5},
        "orders": {
            "type": "array",
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"id": {"type": "integer"}, "total": {"type": "number"}, "paid": {"type": "boolean"}},
                "required": ["id", "total"],
                "additionalProperties": False,
            },
        },
        "note": {"anyOf": [TEXT, {"type": "null"}]},
    },
    "required": ["name", "age", "status", "address", "tags", "orders"],
    "additionalProperties": False,
}
TOOLS = ({"type": "function", "function": {"name": "save", "parameters": SCHEMA}},)
REPLIES = 60


def main(bundle: str) -> None:
    """Measure and print."""
    directory = Path(bundle)
    manifest = json.loads((directory / "edgekit.json").read_text(encoding="utf-8"))
    vocab_size = manifest["programs"][0]["vocab_size"]
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    info, ends = None, manifest["tokenizer"]["eos_token_ids"]
    ready = []
    for _ in range(5):
        started = time.thread_time()
        info = TokenizerInfo(tokenizer, vocab_size, ends)
        _ = info.matching, info.kept_inside, info.tokens_from(0)
        ready.append(time.thread_time() - started)
    assert info is not None
    starts, steps = measure(lambda: Constraint(JsonSchema(SCHEMA), info), info, REPLIES)
    auto = GenerateOptions(tools=TOOLS)
    auto_starts, auto_steps = measure(lambda: make_constraint(auto, "<tool_call>", "x", info), info, 10, most=200)
    figures = {
        "vocabulary": vocab_size,
        "once per model, ms": summary(ready, 1e3),
        "once per reply, ms": summary(starts, 1e3),
        "per token, us": summary(steps, 1e6),
        "tools auto, once per reply, ms": summary(auto_starts, 1e3),
        "tools auto, per token of free text, us": summary(auto_steps, 1e6),
    }
    print(json.dumps(figures, indent=2))


def measure(make: Any, info: TokenizerInfo, replies: int, most: int = 400) -> tuple[list[float], list[float]]:
    """Seconds per new constraint, and per token."""
    starts, steps = [], []
    for seed in range(replies):
        random = np.random.default_rng(seed)
        started = time.thread_time()
        constraint = make()
        starts.append(time.thread_time() - started)
        for _ in range(most):
            logits = random.normal(size=info.vocab_size).astype(np.float32)
            started = time.thread_time()
            masked = constraint.mask(logits)
            middle = time.thread_time()
            token = int(masked.argmax())
            resumed = time.thread_time()
            constraint.accept(token)
            steps.append(time.thread_time() - resumed + middle - started)
            if constraint.is_complete:
                break
    return starts, steps


def summary(seconds: list[float], unit: float) -> dict[str, float]:
    """Count, mean, median, p99 and maximum in units."""
    median, high, most = (round(float(value) * unit, 2) for value in np.percentile(seconds, [50, 99, 100]))
    mean = round(float(np.mean(seconds)) * unit, 2)
    return {"n": len(seconds), "mean": mean, "median": median, "p99": high, "max": most}


if __name__ == "__main__":
    main(sys.argv[1])
