"""What is left out of a conversation that does not fit: whole turns, the oldest first, and no more than it must be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import GenerationError
from edgekit.runtimes.context_policy import EncodedPrompt, FittedPrompt, check_room, drop_oldest_turns, reply_reserve
from edgekit.session import Message

CONTEXT = 64


def encode(messages: Sequence[Message]) -> EncodedPrompt:
    """One token a character, and two a message."""
    text = "".join(f"<{message['content']}>" for message in messages)
    return EncodedPrompt(text, [ord(letter) for letter in text])


def fit(messages: Sequence[Message], max_tokens: int | None = None, context: int = CONTEXT) -> FittedPrompt:
    return drop_oldest_turns(messages, encode, max_tokens, context)


def message(role: str, size: int = 8) -> Message:
    """A message of `size` tokens."""
    return {"role": role, "content": "x" * (size - 2)}


ROLES = st.lists(st.sampled_from(["user", "assistant", "tool", "system"]), min_size=1, max_size=30)
SIZES = st.integers(2, 30)


@st.composite
def conversations(draw: Any) -> list[Message]:
    roles = draw(ROLES)
    return [message(role, draw(SIZES)) for role in roles]


@given(conversations(), st.one_of(st.none(), st.integers(1, 100)))
def test_what_is_dropped(messages: list[Message], max_tokens: int | None) -> None:
    try:
        fitted = fit(messages, max_tokens)
    except GenerationError:
        starts = [place for place, item in enumerate(messages) if item["role"] == "user"]
        kept = [
            item for place, item in enumerate(messages) if item["role"] == "system" or place >= max(starts, default=0)
        ]
        assert len(encode(kept).tokens) >= CONTEXT, "not even the last turn fits"
        return
    dropped, others = fitted.dropped_messages, [place for place, m in enumerate(messages) if m["role"] != "system"]
    assert list(dropped) == others[: len(dropped)], "the oldest go, never a system message"
    kept = [item for place, item in enumerate(messages) if place not in dropped]
    assert fitted.prompt == encode(kept)
    assert len(fitted.prompt.tokens) < CONTEXT
    if dropped:
        assert len(encode(messages).tokens) + reply_reserve(max_tokens, CONTEXT) > CONTEXT
        rest = [item for item in kept if item["role"] != "system"]
        assert rest
        assert rest[0]["role"] == "user", "turns go as a whole"


@pytest.mark.parametrize(("size", "dropped"), [(47, ()), (48, ()), (49, (0, 1))])
def test_at_the_limit(size: int, dropped: tuple[int, ...]) -> None:
    """A quarter of 64 is for the reply: a prompt may have 48 tokens."""
    messages = [message("user", 10), message("assistant", 10), message("user", size - 20)]
    assert fit(messages).dropped_messages == dropped
    assert fit(messages, max_tokens=1000).dropped_messages == dropped


def test_small_max_tokens_leave_more_room() -> None:
    messages = [message("user", 20), message("user", 40)]
    assert fit(messages, max_tokens=4).dropped_messages == ()
    assert fit(messages, max_tokens=5).dropped_messages == (0,)


@pytest.mark.parametrize("size", [48, 49, 63])
def test_last_turn_may_use_the_reserve(size: int) -> None:
    assert fit([message("user", 10), message("user", size)]).dropped_messages == (0,)


def test_last_turn_that_does_not_fit_is_refused() -> None:
    with pytest.raises(GenerationError, match="64 tokens, the context of 64 has room for 63: 1 too many"):
        fit([message("user", 10), message("user", 64)])
    with pytest.raises(GenerationError, match="66 tokens"):
        fit([message("system", 33), message("user", 10), message("user", 33)])


def test_tool_results_go_with_their_turn() -> None:
    turn = [message("user"), message("assistant"), message("tool"), message("tool"), message("assistant")]
    messages = [message("system", 4), *turn, *turn]
    assert fit(messages).dropped_messages == (1, 2, 3, 4, 5)


def test_the_same_turns_stay_out_for_a_while() -> None:
    """Else the cache of what is kept would be of no use for the next turn."""
    messages: list[Message] = []
    dropped = []
    for _ in range(60):
        messages += [message("user", 2), message("assistant", 2)]
        dropped.append(len(fit(messages).dropped_messages))
    changes = [(before, after) for before, after in pairwise(dropped) if after != before]
    assert dropped == sorted(dropped)
    assert all(after - before >= CONTEXT // 8 // 2 for before, after in changes)


def test_few_prompts_are_rendered_to_find_the_turns() -> None:
    calls = []

    def counted(messages: Sequence[Message]) -> EncodedPrompt:
        calls.append(len(messages))
        return encode(messages)

    drop_oldest_turns([message("user", 4)] * 1000, counted, None, CONTEXT)
    assert len(calls) <= 12


@pytest.mark.parametrize(("tokens", "fits"), [(0, False), (1, True), (62, True), (63, True), (64, False), (65, False)])
def test_room_for_one_token_must_be_left(tokens: int, fits: bool) -> None:
    if fits:
        check_room(tokens, CONTEXT)
        return
    with pytest.raises(GenerationError, match=f"{tokens - 63} too many" if tokens else "empty"):
        check_room(tokens, CONTEXT)
