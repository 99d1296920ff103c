"""context.json: which messages of a conversation go when it does not fit the context, or which error there is.

Reference: the rule as README.md states it, tried out for every number of turns.
"""

from __future__ import annotations

from typing import Any

Turns = list[tuple[str, int]]
TEMPLATE_TOKENS = 3
SYSTEM_ROLES = ("system", "developer")

SYSTEM: Turns = [("system", 20)]
TALK: Turns = [
    ("user", 10),
    ("assistant", 30),
    ("user", 15),
    ("assistant", 25),
    ("user", 12),
    ("assistant", 8),
    ("user", 10),
]
CALLS: Turns = [
    ("user", 10),
    ("assistant", 20),
    ("tool", 30),
    ("assistant", 5),
    ("user", 10),
    ("assistant", 20),
    ("tool", 15),
]
MIDDLE: Turns = [("user", 30), ("assistant", 30), ("system", 5), ("user", 30), ("assistant", 30), ("user", 10)]


def suite() -> dict[str, Any]:
    """The file."""
    cases = [*_error_cases(), *_dropping_cases(), *_border_cases(), *_sliding_cases()]
    return {"suite": "context", "version": 1, "cases": cases}


def _error_cases() -> list[dict[str, Any]]:
    rows = [
        (f"{_size(TALK) - context:+d} of the context", TALK, context)
        for context in (_size(TALK) + by for by in (-1, 0, 1, 2, 50))
    ]
    rows += [("one message, far too long", [("user", 1000)], 64)]
    return [
        _case(f"error: {name}, max_tokens {max_tokens}", messages, context, "error", max_tokens)
        for name, messages, context in rows
        for max_tokens in (None, 8)
    ]


def _dropping_cases() -> list[dict[str, Any]]:
    talks = {
        "a talk": TALK,
        "with a system message": SYSTEM + TALK,
        "with tool calls": SYSTEM + CALLS,
        "a system message amid": MIDDLE,
    }
    return [
        _case(
            f"drop: {name}, context {context}, max_tokens {max_tokens}",
            messages,
            context,
            "drop-oldest-turns",
            max_tokens,
        )
        for name, messages in talks.items()
        for context in (16, 40, 64, 100, 128, 160, 256)
        for max_tokens in (None, 8, 100)
    ]


def _border_cases() -> list[dict[str, Any]]:
    """One token below, at and above what fits, with a reserve of 25 tokens of 100."""
    found = []
    for size in (74, 75, 76, 88, 99, 100, 101):
        messages = (
            [*TALK[:4], ("user", size - _size(TALK[:4]))]
            if size > _size(TALK[:4])
            else [("user", size - TEMPLATE_TOKENS)]
        )
        found.append(_case(f"drop: a talk of {size} in a context of 100", messages, 100, "drop-oldest-turns", None))
        only: Turns = [("user", size - TEMPLATE_TOKENS)]
        found.append(_case(f"drop: one message of {size} in a context of 100", only, 100, "drop-oldest-turns", None))
    too_long: Turns = [("system", 97), ("user", 5), ("assistant", 5), ("user", 5)]
    found.append(_case("drop: the system message leaves no room", too_long, 100, "drop-oldest-turns", 8))
    found.append(_case("drop: a system message alone", [("system", 200)], 100, "drop-oldest-turns", 8))
    found.append(
        _case("drop: the talk begins with an answer", [("assistant", 60), *TALK[:3]], 100, "drop-oldest-turns", 8)
    )
    short: Turns = [("user", 4), ("assistant", 3), ("user", 2), ("assistant", 2), ("user", 84)]
    found.append(
        _case(
            "drop: all turns but the last have the excess, but not in whole steps", short, 100, "drop-oldest-turns", 8
        )
    )
    for size in (80, 82, 85, 87, 90, 94):
        uneven: Turns = [("user", 3), ("assistant", 4), ("user", 2), ("assistant", 1), ("user", size)]
        found.append(_case(f"drop: short turns before one of {size}", uneven, 100, "drop-oldest-turns", 8))
    developer: Turns = [("developer", 20), *TALK]
    return [*found, _case("drop: a developer's message is a system message", developer, 100, "drop-oldest-turns", 8)]


def _sliding_cases() -> list[dict[str, Any]]:
    found = []
    for window, context, positions in ((0, 128, 0), (32, 128, 4096), (32, 128, 0), (128, 128, 0)):
        for name, messages in (
            ("short", TALK[:1]),
            ("a talk", TALK),
            ("long", [("user", 3000)]),
            ("too long", [("user", 5000)]),
        ):
            title = f"sliding: {name}, window {window}, context {context}, positions {positions}"
            found.append(_case(title, messages, context, "sliding", 8, window=window, positions=positions))
    return found


def _case(
    name: str, messages: Turns, context: int, policy: str, max_tokens: int | None, **program: int
) -> dict[str, Any]:
    shown = [{"role": role, "tokens": tokens} for role, tokens in messages]
    given = {"name": name, "messages": shown, "template_tokens": TEMPLATE_TOKENS, "context": context, **program}
    given |= {"context_policy": policy, "max_tokens": max_tokens}
    return given | {"expect": _expected(messages, context, policy, max_tokens, **program)}


def _expected(
    messages: Turns, context: int, policy: str, max_tokens: int | None, window: int = 0, positions: int = 0
) -> dict[str, Any]:
    refused = {"error": "GenerationError"}
    if policy == "sliding" and (not window or window >= context):
        return refused
    dropped = _dropped(messages, context, max_tokens) if policy == "drop-oldest-turns" else []
    size = _size([message for place, message in enumerate(messages) if place not in dropped])
    most = max(positions, context) if policy == "sliding" else context
    return {"prompt_tokens": size, "dropped_messages": dropped} if size < most else refused


def _dropped(messages: Turns, context: int, max_tokens: int | None) -> list[int]:
    """The places of the messages that go."""
    quarter = max(context // 4, 1)
    limit = context - (quarter if max_tokens is None else min(max_tokens, quarter))
    over, step = _size(messages) - limit, max(context // 8, 1)
    if over <= 0:
        return []
    rounded = over if over % step == 0 else over - over % step + step
    starts = [place for place, (role, _) in enumerate(messages) if role == "user"]
    others = [place for place, (role, _) in enumerate(messages) if role not in SYSTEM_ROLES]
    if others and (not starts or others[0] < starts[0]):
        starts.insert(0, others[0])
    for wanted in (rounded, over):
        for start in starts:
            gone = [place for place in others if place < start]
            if sum(messages[place][1] for place in gone) >= wanted:
                return gone
    return [place for place in others if starts and place < starts[-1]]


def _size(messages: Turns) -> int:
    return TEMPLATE_TOKENS + sum(tokens for _, tokens in messages)
