"""Counting tokens over the replies of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .models import Piece, Work

__all__ = ["Usage"]


@dataclass(slots=True)
class Usage:
    """Tokens of a request: each prompt counts once, however many replies it has.

    `reasoning` are tokens whose text was reasoning only.
    """

    work: Work
    prompt: int = 0
    cached: int = 0
    new: int = 0
    reasoning: int = 0

    def add(self, piece: Piece) -> None:
        """Count a piece."""
        chunk = piece.chunk
        if chunk.reasoning and not chunk.text:
            self.reasoning += len(chunk.tokens)
        if chunk.stats is not None:
            self.new += chunk.stats.new_tokens
            if piece.index % self.work.n == 0:
                self.prompt += chunk.stats.prompt_tokens
                self.cached += chunk.stats.cached_tokens

    def completion_json(self) -> dict[str, Any]:
        """For `/v1/chat/completions` and `/v1/completions`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
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
