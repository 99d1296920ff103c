"""What a conversation with a loaded model looks like, on every backend.

`Model` and `Session` are protocols: `edgekit.load` returns an implementation from `edgekit.runtimes`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, TypeAlias

from edgekit.errors import GenerationError
from edgekit.structure import Structure

__all__ = [
    "Chunk",
    "ContextPolicy",
    "FinishReason",
    "GenerateOptions",
    "Message",
    "Model",
    "Prompt",
    "Reply",
    "Session",
    "Stats",
    "TokenLogprob",
    "ToolCall",
]

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "cancelled"]
ContextPolicy: TypeAlias = Literal["error", "drop-oldest-turns", "sliding"]
Message: TypeAlias = Mapping[str, object]
Prompt: TypeAlias = str | Sequence[Message]
POLICIES = ("error", "drop-oldest-turns", "sliding")
MAX_ALTERNATIVES = 100


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How to continue a prompt. The defaults are greedy decoding.

    Attributes:
        max_tokens: Upper bound of new tokens; None runs to the end of the context.
        min_tokens: No end token before this many new tokens; at most max_tokens, and not with a structure.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Keep the k most probable tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches top_p; 1 keeps all.
        min_p: Drop tokens less probable than min_p times the most probable one; 0 keeps all.
        typical_p: Keep the tokens whose information is nearest to the entropy until their probability reaches typical_p
            (arXiv:2202.00666); 1 keeps all.
        repetition_penalty: Divide positive and multiply negative logits of tokens already seen by this (CTRL,
            arXiv:1909.05858); 1 is off.
        presence_penalty: Subtracted from the logits of tokens already generated; 0 is off.
        frequency_penalty: Subtracted from a token's logit for each time it was generated; 0 is off.
        logit_bias: Added to the logits of these tokens; minus infinity forbids one.
        seed: Of the sampler; None draws one from the system.
        logprobs: Report the log-probability of each new token and of this many alternatives; None reports nothing.
        prompt_logprobs: The same for the prompt's tokens but the first: computes the whole prompt again.
        stop: Strings that end the reply; they are not part of its text.
        stop_tokens: Token ids that end the reply, besides the model's own.
        raw: Feed a text prompt as it is, without the chat template.
        system: A system message put before a text prompt.
        structure: What the text must be an instance of: JsonSchema, Regex, Lark or Choice.
        tools: Functions that the model may call, in OpenAI's form: {"type": "function", "function": {"name", ...}}.
        tool_choice: "auto", "none", "required" or the name of the tool to call.
        speculate: Draft tokens from the text so far and check several in one forward, where that is measured to pay. A
            sampled reply with a seed drafts nothing: what is computed together rounds together, and what pays depends on
            measured times, but a seed shall give the same tokens each time.
        context_policy: What happens when the prompt, or the reply, does not fit the context. "error" refuses the prompt and
            ends the reply with `length`; "drop-oldest-turns" leaves out the oldest turns, never the system message, until
            a quarter of the context, or `max_tokens` where that is less, is free for the reply; "sliding" lets go of the
            oldest tokens, up to the length that the model was trained for, where every layer has a sliding window.

    Raises:
        GenerationError: A value is outside its range.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    raw: bool = False
    system: str | None = None
    structure: Structure | None = None
    tools: tuple[Mapping[str, object], ...] = ()
    tool_choice: str = "auto"
    speculate: bool = True
    context_policy: ContextPolicy = "error"

    def __post_init__(self) -> None:
        infinity = float("inf")
        rules: tuple[tuple[bool, str, object, str], ...] = (
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1"),
            (self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 or more"),
            (
                self.max_tokens is None or self.min_tokens <= self.max_tokens,
                "min_tokens",
                self.min_tokens,
                f"at most max_tokens, {self.max_tokens}",
            ),
            (0 <= self.temperature < infinity, "temperature", self.temperature, "0 or more"),
            (self.top_k >= 0, "top_k", self.top_k, "0 or more"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "over 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1"),
            (0 < self.typical_p <= 1, "typical_p", self.typical_p, "over 0 and at most 1"),
            (0 < self.repetition_penalty < infinity, "repetition_penalty", self.repetition_penalty, "over 0"),
            (abs(self.presence_penalty) < infinity, "presence_penalty", self.presence_penalty, "a finite number"),
            (abs(self.frequency_penalty) < infinity, "frequency_penalty", self.frequency_penalty, "a finite number"),
            (
                all(token >= 0 and bias < infinity for token, bias in self.logit_bias.items()),
                "logit_bias",
                dict(self.logit_bias),
                "token ids with numbers below plus infinity",
            ),
            (self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more"),
            *(
                (value is None or 0 <= value <= MAX_ALTERNATIVES, name, value, f"from 0 to {MAX_ALTERNATIVES}")
                for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs))
            ),
            (all(self.stop), "stop", self.stop, "texts of at least one character"),
            (all(token >= 0 for token in self.stop_tokens), "stop_tokens", self.stop_tokens, "token ids"),
            (self.context_policy in POLICIES, "context_policy", self.context_policy, " or ".join(POLICIES)),
        )
        for valid, name, value, expected in rules:
            if not valid:
                raise GenerationError(f"{name} is {value!r}, expected {expected}")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a token under the model's own distribution: before penalties, temperature and filters.

    `alternatives` are the most probable tokens and theirs, falling.
    """

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for. `arguments` are parsed JSON."""

    id: str
    name: str
    arguments: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Stats:
    """How one reply was produced. Times are in seconds, sizes in bytes.

    Attributes:
        cached_tokens: Of the prompt's tokens, those found in the cache.
        new_tokens: Tokens of the reply, the end token not among them.
        decode_passes: Forwards after the prefill; fewer than new tokens where drafts were accepted.
        drafted_tokens: Tokens that speculation proposed; 0 says that it was not used.
        accepted_tokens: Drafted tokens that became part of the reply.
        dropped_messages: Positions of the messages that "drop-oldest-turns" left out.
        dropped_tokens: Tokens that "sliding" forgot.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    load_s: float
    ttft_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_rss_bytes: int
    decode_passes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    dropped_messages: tuple[int, ...] = ()
    dropped_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a reply. The last chunk carries the finish reason and the stats.

    `text` is the answer; `reasoning` is what the model wrote between its thinking marks. A tool call comes whole.
    `prompt_logprobs` come with the first chunk.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stats: Stats | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply: the chunks of a stream put together."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats = field(repr=False)
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)
    prompt_logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)


class Session(Protocol):
    """One conversation and its key-value cache.

    One stream runs at a time: a second one is a GenerationError. `cancel` may come from any thread.
    """

    @property
    def tokens(self) -> tuple[int, ...]:
        """What has been computed: prompts and replies."""
        ...

    def stream(self, prompt: Prompt, **options: object) -> Iterator[Chunk]:
        """Continue `prompt`, a text or a list of chat messages; see GenerateOptions for the options."""
        ...

    def generate(self, prompt: Prompt, **options: object) -> Reply:
        """Like `stream`, put together."""
        ...

    def astream(self, prompt: Prompt, **options: object) -> AsyncIterator[Chunk]:
        """Like `stream`, for asyncio: the model computes in a thread. Leaving the loop cancels."""
        ...

    def fork(self) -> Session:
        """Another session with a copy of this one's cache."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        ...

    def save(self, path: str | Path) -> None:
        """Write tokens and cache to a file, for `Model.restore` with the same bundle."""
        ...

    def cancel(self) -> None:
        """End the running stream after its current token; may be called from another thread."""
        ...

    def close(self) -> None:
        """Free the cache, or leave it to the model to share. A running stream ends as cancelled first."""
        ...


class Model(Protocol):
    """Loaded weights, tokenizer and chat template. Opens many sessions."""

    def session(self) -> Session:
        """Open a conversation with an empty cache. Its first prompt takes what it shares with other sessions."""
        ...

    def restore(self, path: str | Path) -> Session:
        """Open a saved session.

        Raises:
            GenerationError: The file is damaged, or of another bundle.
        """
        ...

    def stream(self, prompt: Prompt, **options: object) -> Iterator[Chunk]:
        """Continue `prompt` in a session of its own."""
        ...

    def generate(self, prompt: Prompt, **options: object) -> Reply:
        """Like `stream`, put together."""
        ...

    def generate_many(self, prompt: Prompt, n: int, **options: object) -> tuple[Reply, ...]:
        """`n` replies to one prompt, which is computed once; with a seed, reply i draws from (seed, i)."""
        ...

    def astream(self, prompt: Prompt, **options: object) -> AsyncIterator[Chunk]:
        """Like `stream`, for asyncio: the model computes in a thread. Leaving the loop cancels."""
        ...

    def close(self) -> None:
        """Free the weights."""
        ...

    def __enter__(self) -> Model: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
