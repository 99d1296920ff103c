"""What a conversation with a loaded model looks like, on every backend.

`Model` and `Session` are protocols: `edgekit.load` returns an implementation from `edgekit.runtimes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol, TypeAlias

from edgekit.errors import GenerationError

__all__ = ["Chunk", "FinishReason", "GenerateOptions", "Message", "Model", "Prompt", "Reply", "Session", "Stats"]

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
Message: TypeAlias = Mapping[str, object]
Prompt: TypeAlias = str | Sequence[Message]


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How to continue a prompt. The defaults are greedy decoding.

    Attributes:
        max_tokens: Upper bound of new tokens; None runs to the end of the context.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Keep the k most probable tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches top_p; 1 keeps all.
        min_p: Drop tokens less probable than min_p times the most probable one; 0 keeps all.
        repetition_penalty: Divide positive and multiply negative logits of tokens already seen by this (CTRL,
            arXiv:1909.05858); 1 is off.
        seed: Of the sampler; None draws one from the system.
        stop: Strings that end the reply; they are not part of its text.
        raw: Feed a text prompt as it is, without the chat template.
        system: A system message put before a text prompt.

    Raises:
        GenerationError: A value is outside its range.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    raw: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        rules: tuple[tuple[bool, str, object, str], ...] = (
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1"),
            (0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 or more"),
            (self.top_k >= 0, "top_k", self.top_k, "0 or more"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "over 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1"),
            (0 < self.repetition_penalty < float("inf"), "repetition_penalty", self.repetition_penalty, "over 0"),
            (self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more"),
            (all(self.stop), "stop", self.stop, "texts of at least one character"),
        )
        for valid, name, value, expected in rules:
            if not valid:
                raise GenerationError(f"{name} is {value!r}, expected {expected}")


@dataclass(frozen=True, slots=True)
class Stats:
    """How one reply was produced. Times are in seconds, sizes in bytes."""

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    load_s: float
    ttft_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a reply. The last chunk carries the finish reason and the stats."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stats: Stats | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply: the chunks of a stream put together."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats = field(repr=False)


class Session(Protocol):
    """One conversation and its key-value cache. Not safe to share between threads, but for `cancel`."""

    def stream(self, prompt: Prompt, **options: object) -> Iterator[Chunk]:
        """Continue `prompt`, a text or a list of chat messages; see GenerateOptions for the options."""
        ...

    def generate(self, prompt: Prompt, **options: object) -> Reply:
        """Like `stream`, put together."""
        ...

    def cancel(self) -> None:
        """End the running stream after its current token; may be called from another thread."""
        ...

    def close(self) -> None:
        """Free the cache."""
        ...


class Model(Protocol):
    """Loaded weights, tokenizer and chat template. Opens many sessions."""

    def session(self) -> Session:
        """Open a conversation with an empty cache."""
        ...

    def stream(self, prompt: Prompt, **options: object) -> Iterator[Chunk]:
        """Continue `prompt` in a session of its own."""
        ...

    def generate(self, prompt: Prompt, **options: object) -> Reply:
        """Like `stream`, put together."""
        ...

    def close(self) -> None:
        """Free the weights."""
        ...

    def __enter__(self) -> Model: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
