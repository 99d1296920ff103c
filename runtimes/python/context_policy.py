"""What happens when a prompt does not fit the context; never in silence."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgekit.bundle import Program
from edgekit.errors import GenerationError
from edgekit.session import ContextPolicy, Message

__all__ = [
    "EncodedPrompt",
    "FittedPrompt",
    "check_policy",
    "check_room",
    "drop_oldest_turns",
    "last_position",
    "reply_reserve",
]

RESERVED_SHARE = 4  # a reply may keep a quarter of the context free
STEP_SHARE = 8  # turns go until the next eighth of the context is free
_SYSTEM_ROLES = {"system", "developer"}


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the model reads it: its text and token ids, and whether the chat template wrote them."""

    text: str
    tokens: list[int]
    is_templated: bool = False


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    """A prompt that fits, and the positions of the messages that were left out of it."""

    prompt: EncodedPrompt
    dropped_messages: tuple[int, ...] = ()


def check_policy(policy: ContextPolicy, program: Program) -> None:
    """Refuse a policy that the model was not trained for.

    Raises:
        GenerationError: "sliding", for a program whose layers do not all slide, or whose window is as long as its context.
    """
    window, context = program.graph.window, program.context
    if policy != "sliding":
        return
    if not window:
        raise GenerationError(
            "this model was not trained with a sliding window in every layer: it would lose its way",
            hint="use the context policy drop-oldest-turns",
        )
    if window >= context:
        raise GenerationError(
            f"the sliding window of {window:,} tokens does not fit the context of {context:,}",
            hint=f"convert with --context {2 * window} or so, or use the context policy drop-oldest-turns",
        )


def last_position(policy: ContextPolicy, program: Program) -> int:
    """Tokens that prompt and reply may reach together."""
    return max(program.graph.positions, program.context) if policy == "sliding" else program.context


def reply_reserve(max_tokens: int | None, context: int) -> int:
    """Tokens that "drop-oldest-turns" keeps free for the reply: `max_tokens`, but at most a quarter of the context."""
    most = max(context // RESERVED_SHARE, 1)
    return most if max_tokens is None else min(max_tokens, most)


def check_room(tokens: int, most: int) -> None:
    """Refuse a prompt that is empty, or leaves no room for a token.

    Raises:
        GenerationError: Says how many tokens are too many.
    """
    if not tokens:
        raise GenerationError("the prompt is empty", hint="give at least one character")
    if tokens >= most:
        raise GenerationError(
            f"the prompt is {tokens:,} tokens, the context of {most:,} has room for {most - 1:,}: "
            f"{tokens - most + 1:,} too many",
            hint="shorten the prompt, choose another context policy, or convert with a longer --context",
        )


def drop_oldest_turns(
    messages: Sequence[Message],
    encode: Callable[[Sequence[Message]], EncodedPrompt],
    max_tokens: int | None,
    context: int,
) -> FittedPrompt:
    """Leave out the oldest turns of a conversation that does not fit.

    A turn is a user message with all that follows it up to the next one, tool calls and their results among them. System
    messages and the last turn always stay. Turns go until the prompt leaves `reply_reserve` free; if not even the last
    turn alone does, it has all the room there is. So that the cache of what stays serves the next turns too, they go in
    steps of an eighth of the context: as the conversation grows, the same ones are left out for a while.

    Raises:
        GenerationError: System messages and the last turn alone do not fit.
    """
    turns = _turns(messages)
    attempts: dict[int, EncodedPrompt] = {}

    def size(dropped: int) -> int:
        if dropped not in attempts:
            attempts[dropped] = encode(_without(messages, turns[:dropped]))
        return len(attempts[dropped].tokens)

    limit, last = context - reply_reserve(max_tokens, context), max(len(turns) - 1, 0)
    surplus = (limit - size(0)) % max(context // STEP_SHARE, 1)
    dropped = 0
    if size(0) > limit:  # the more turns go, the shorter it gets: the fewest that must are found by bisection
        for room in (limit - surplus, limit):
            dropped = min(bisect_left(range(last + 1), -room, key=lambda count: -size(count)), last)
            if size(dropped) <= room:
                break
    check_room(size(dropped), context)
    return FittedPrompt(attempts[dropped], tuple(place for turn in turns[:dropped] for place in turn))


def _turns(messages: Sequence[Message]) -> list[list[int]]:
    """Positions of the messages of each turn, but for system messages."""
    turns: list[list[int]] = []
    for place, message in enumerate(messages):
        role = message.get("role")
        if role in _SYSTEM_ROLES:
            continue
        if role == "user" or not turns:
            turns.append([])
        turns[-1].append(place)
    return turns


def _without(messages: Sequence[Message], turns: Sequence[Sequence[int]]) -> list[Message]:
    gone = {place for turn in turns for place in turn}
    return [message for place, message in enumerate(messages) if place not in gone]
