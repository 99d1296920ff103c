from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from edgekit.runtimes.context_policy import (
    EncodedPrompt,
    FittedPrompt,
    check_policy,
    check_room,
    drop_oldest_turns,
    last_position,
)
from edgekit.session import GenerateOptions, Message

SUITE = "context"


def fit(case: dict[str, Any]) -> dict[str, Any]:
    """What the policy makes of messages that are a number of tokens long."""
    options = GenerateOptions(max_tokens=case["max_tokens"], context_policy=case["context_policy"])
    graph = SimpleNamespace(window=case.get("window", 0), positions=case.get("positions", 0))
    program: Any = SimpleNamespace(context=case["context"], graph=graph)

    def encode(messages: Sequence[Message]) -> EncodedPrompt:
        counts = [message["tokens"] for message in messages]
        return EncodedPrompt(
            "", [0] * (case["template_tokens"] + sum(count for count in counts if isinstance(count, int)))
        )

    check_policy(options.context_policy, program)
    if options.context_policy == "drop-oldest-turns":
        fitted = drop_oldest_turns(case["messages"], encode, options.max_tokens, program.context)
    else:
        fitted = FittedPrompt(encode(case["messages"]))
    check_room(len(fitted.prompt.tokens), last_position(options.context_policy, program))
    return {"prompt_tokens": len(fitted.prompt.tokens), "dropped_messages": list(fitted.dropped_messages)}


def test_case(case: dict[str, Any], outcome: Any) -> None:
    assert outcome(lambda: fit(case)) == case["expect"]
