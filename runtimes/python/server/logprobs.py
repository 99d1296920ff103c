"""Log-probabilities as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgekit.session import TokenLogprob

from .models import ServedModel

__all__ = ["completion_logprobs", "token_logprobs"]

LEAST = -9999.0  # JSON has no infinity; OpenAI writes this


def token_logprobs(model: ServedModel, entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """For `/v1/chat/completions` and `/v1/responses`."""
    return [
        _entry(model, entry.token, entry.logprob)
        | {"top_logprobs": [_entry(model, token, logprob) for token, logprob in entry.alternatives]}
        for entry in entries
    ]


def completion_logprobs(model: ServedModel, entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """For `/v1/completions`.

    Args:
        offset: Of the first token in the text of the choice, in characters.
    """
    texts = [_text(model, entry.token) for entry in entries]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": [
            {_text(model, token): _finite(logprob) for token, logprob in reversed(entry.alternatives)}
            for entry in entries
        ],
        "text_offset": offsets,
    }


def _entry(model: ServedModel, token: int, logprob: float) -> dict[str, Any]:
    written = model.token_bytes(token)
    return {"token": written.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(written)}


def _text(model: ServedModel, token: int) -> str:
    written = model.token_bytes(token)
    try:
        return written.decode()
    except UnicodeDecodeError:  # a part of a character, in OpenAI's notation
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
