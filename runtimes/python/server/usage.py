"""Counting tokens over the replies of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .models import Piece, Work

__all__ = ["Usage"]


@dataclass(slots=True)
class Usage:
    """Tokens of a request: each prompt counts once, however many replies it has.

    `reasoning` are tokens whose text was reasoning only; `drafted` and `accepted` are speculation's.
    """

    work: Work
    prompt: int = 0
    cached: int = 0
    new: int = 0
    reasoning: int = 0
    drafted: int = 0
    accepted: int = 0
    dropped_messages: tuple[int, ...] = ()
    dropped_tokens: int = 0

    def add(self, piece: Piece) -> None:
        """Count a piece."""
        chunk = piece.chunk
        if chunk.reasoning and not chunk.text:
            self.reasoning += len(chunk.tokens)
        if chunk.stats is not None:
            self.new += chunk.stats.new_tokens
            self.drafted += chunk.stats.drafted_tokens
            self.accepted += chunk.stats.accepted_tokens
            self.dropped_messages = chunk.stats.dropped_messages
            self.dropped_tokens = chunk.stats.dropped_tokens
            if piece.index % self.work.n == 0:
                self.prompt += chunk.stats.prompt_tokens
                self.cached += chunk.stats.cached_tokens

    def dropped_json(self) -> dict[str, Any]:
        """What the context policy left out of the last reply, as a field of EdgeKit's own; nothing where it left out nothing."""
        if not (self.dropped_messages or self.dropped_tokens):
            return {}
        return {"edgekit": {"dropped_messages": list(self.dropped_messages), "dropped_tokens": self.dropped_tokens}}

    def completion_json(self) -> dict[str, Any]:
        """For `/v1/chat/completions` and `/v1/completions`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning,
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
            },
        }

    def response_json(self) -> dict[str, Any]:
        """For `/v1/responses`."""
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached, "cache_write_tokens": 0},
            "output_tokens": self.new,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.prompt + self.new,
        }
