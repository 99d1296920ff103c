"""The generation loop: one reply, forward by forward."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgekit.session import Chunk, FinishReason, GenerateOptions, Stats, TokenLogprob, ToolCall

from .context_policy import FittedPrompt, last_position
from .logprobs import token_logprob
from .output import Piece, make_constraint, make_parser
from .penalties import check_token_ids
from .process_memory import peak_rss_bytes
from .sampling import Sampler
from .sequence import TokenSequence
from .speculation import Speculator, verify_draft
from .text import TextStream

if TYPE_CHECKING:
    from .engine import LoadedModel

__all__ = ["Generation"]

Logits = NDArray[np.float32]


@dataclass(slots=True)
class _Clock:
    """Times of one reply, in seconds of the same clock."""

    started: float
    prefilled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(slots=True)
class _Pending:
    """What the next chunk will show."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def is_worth_showing(self) -> bool:
        """Tokens without text wait for the next that has some."""
        return bool(self.text or self.reasoning or self.tool_calls or self.prompt_logprobs)

    def add(self, piece: Piece) -> None:
        """Show this too."""
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.tool_calls += piece.tool_calls

    def take(self, reason: FinishReason | None = None, stats: Stats | None = None) -> Chunk:
        """Make it a chunk, and start anew."""
        chunk = Chunk(
            self.text,
            tuple(self.tokens),
            reason,
            stats,
            self.reasoning,
            tuple(self.tool_calls),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
        )
        self.text = self.reasoning = ""
        for shown in (self.tool_calls, self.tokens, self.logprobs, self.prompt_logprobs):
            shown.clear()
        return chunk


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt that has been computed: its last token's logits [1, vocabulary], how much was cached, what it scored."""

    logits: Logits
    cached: int
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class Generation:
    """One reply being written: prefill, then rounds of sampling, showing and one forward.

    Args:
        model: What is common to all replies.
        sequence: Tokens and cache; the reply is appended to it.
        prompt: As it fits the context.
        options: Checked.
        cancelled: Ends the reply when it is set.
        started: When it was asked for, in seconds of `time.perf_counter`.
        stream: Number of the reply among several to one prompt, each with random numbers of its own.

    Raises:
        GenerationError: A structure, a tool or a token id among the options can't be used with this model.
    """

    def __init__(
        self,
        model: LoadedModel,
        sequence: TokenSequence,
        prompt: FittedPrompt,
        options: GenerateOptions,
        cancelled: threading.Event,
        started: float,
        *,
        stream: int | None = None,
    ) -> None:
        self._model, self._sequence, self._options, self._cancelled = model, sequence, options, cancelled
        check_token_ids(options, model.vocab_size)
        encoded = prompt.prompt
        self._prompt, self._dropped = encoded.tokens, prompt.dropped_messages
        template = model.template_source if encoded.is_templated else None
        parts = (options, template, encoded.text, model.tokenizer_info)
        self._constraint, self._parser = make_constraint(*parts), make_parser(*parts)
        self._ends = model.end_tokens | frozenset(options.stop_tokens)
        self._sampler = Sampler(options, self._ends, stream=stream)
        self._text = TextStream(model.tokenizer, options.stop, self._prompt, self._parser.marks)
        self._speculator: Speculator | None = None
        # which rows are computed together depends on measured times, and the last bits of logits on that: with a seed,
        # the same tokens shall come each time
        if options.speculate and (options.temperature == 0 or options.seed is None):
            self._speculator = Speculator(model.forward_costs, self._prompt, self._ends)
        room = last_position(options.context_policy, model.program) - len(self._prompt)
        self._limit = room if options.max_tokens is None else min(options.max_tokens, room)
        self._clock = _Clock(started)
        self._pending = _Pending()
        self._draft: list[int] = []
        self._cached = self._count = self._passes = self._last_token = 0
        self._forward_s: float | None = None
        self._sampler.observe(self._prompt)

    def steps(self, prefilled: Prefilled | None = None) -> Generator[Chunk | None, None, None]:
        """The chunks, and a None after each forward that gave nothing to show.

        Args:
            prefilled: What `prefill` returned for the same prompt, where the sequence holds it already.
        """
        prefilled = prefilled or (yield from self.prefill())
        self._clock.prefilled = time.perf_counter()
        logits: Logits | None = None
        reason: FinishReason | None = "cancelled"
        if prefilled is not None:
            logits, reason = prefilled.logits, None
            self._cached = prefilled.cached
            self._pending.prompt_logprobs.extend(prefilled.prompt_logprobs)
        while logits is not None:
            reason = "cancelled" if self._cancelled.is_set() else self._take(logits)
            if reason is not None:
                break
            yield self._pending.take() if self._pending.is_worth_showing else None
            logits = yield from self._forward()
            reason = "cancelled"
        self._sequence.rewind(min(len(self._sequence.tokens), len(self._prompt) + self._count))
        yield self._last_chunk(reason)

    def move_to(self, copy: TokenSequence) -> None:
        """Go on in a copy of the sequence."""
        self._sequence = copy

    def prefill(self) -> Generator[None, None, Prefilled | None]:
        """Compute what the cache lacks of the prompt, yielding between forwards; returns None where it was cancelled."""
        sequence, prompt, alternatives = self._sequence, self._prompt, self._options.prompt_logprobs
        if alternatives is None:
            self._model.store.lend(prompt, sequence)
        cached = sequence.reuse(prompt)
        if alternatives is not None:  # the cache has no logits
            sequence.rewind(0)
            cached = 0
        scores: list[TokenLogprob] = []

        def score(logits: Logits) -> None:
            following = prompt[len(sequence.tokens) - len(logits) + 1 :]
            pairs = zip(logits, following, strict=False)
            scores.extend(token_logprob(row, token, alternatives or 0) for row, token in pairs)

        logits = yield from self._compute(prompt[cached:], len(prompt), None if alternatives is None else score)
        self._passes = 0
        self._model.store.make_room()
        return None if logits is None else Prefilled(logits[-1:].copy(), cached, tuple(scores))

    def _forward(self) -> Generator[None, None, Logits | None]:
        """Compute the last token, and what is drafted after it; logits [1 + drafted, vocabulary], None where cancelled."""
        sequence, speculator = self._sequence, self._speculator
        if speculator:
            forced = self._constraint.forced_tokens() if self._constraint else ()
            self._draft = speculator.draft(self._most_drafted(), self._constraint, forced)
        new = [self._last_token, *self._draft]
        began = time.perf_counter()
        if not sequence.crosses_switch(len(new)):
            self._passes += 1
            logits = sequence.forward(new, all_rows=len(new) > 1)
            self._forward_s = time.perf_counter() - began
            return logits
        self._forward_s = None
        return (yield from self._compute(new, len(sequence.tokens) + 1))

    def _compute(
        self, new: list[int], total: int, on_logits: Callable[[Logits], None] | None = None
    ) -> Generator[None, None, Logits | None]:
        """Append tokens in chunks until there are `total`, yielding between them; the last logits, None where cancelled."""
        computed = self._sequence.extend(new, all_rows=on_logits is not None)
        while not self._cancelled.is_set():
            logits = next(computed)
            self._passes += 1
            if on_logits:
                on_logits(logits)
            if len(self._sequence.tokens) == total:
                return logits
            yield None
        return None

    def _most_drafted(self) -> int:
        """Draft tokens that the reply, one forward and the rotation have room for."""
        most = min(self._limit - self._count - 1, self._sequence.chunk - 1)
        return 0 if self._sequence.crosses_switch(1 + most) else most

    def _take(self, logits: Logits) -> FinishReason | None:
        """Sample, drop what was drafted in vain, and note what to show; why the reply ends here, or None."""
        if self._draft or self._constraint:
            picked = verify_draft(logits, self._draft, self._sampler, self._constraint)
        else:
            picked = [self._sampler.next(logits[0])]
        refuted = 1 + len(self._draft) - len(picked)
        if refuted:
            self._sequence.rewind(len(self._sequence.tokens) - refuted)
        self._clock.last_token = time.perf_counter()
        self._clock.first_token = self._clock.first_token or self._clock.last_token
        if self._speculator:
            self._speculator.record(self._draft, picked, self._forward_s)
        reason: FinishReason | None = None
        for row, token in zip(logits, picked, strict=False):
            reason = self._note(row, token)
            if reason is not None:
                break
        # asked after all, since the constraint has accepted all
        return "stop" if self._constraint and self._constraint.is_complete else reason

    def _note(self, row: Logits, token: int) -> FinishReason | None:
        if token in self._ends:
            return "stop"
        self._count += 1
        self._last_token = token
        self._pending.tokens.append(token)
        if self._options.logprobs is not None:
            self._pending.logprobs.append(token_logprob(row, token, self._options.logprobs))
        text = self._text.push(token)
        if text:
            self._pending.add(self._parser.push(text))
        if self._text.stopped:
            return "stop"
        return "length" if self._count == self._limit else None

    def _last_chunk(self, reason: FinishReason | None) -> Chunk:
        self._pending.add(self._parser.push(self._text.finish()))
        self._pending.add(self._parser.finish())
        if self._text.stopped:  # the last text held back may complete a stop string
            reason = "stop"
        if reason == "stop" and self._parser.has_calls:
            reason = "tool_calls"
        if self._constraint:
            self._constraint.close()
        return self._pending.take(reason, self._stats())

    def _stats(self) -> Stats:
        clock, prompt_tokens, new = self._clock, len(self._prompt), self._count
        decode_s = clock.last_token - clock.first_token
        return Stats(
            prompt_tokens=prompt_tokens,
            cached_tokens=self._cached,
            new_tokens=new,
            load_s=self._model.load_s,
            ttft_s=max(clock.first_token - clock.started, 0.0),
            prefill_tokens_per_s=(prompt_tokens - self._cached) / max(clock.prefilled - clock.started, 1e-9),
            decode_tokens_per_s=(new - 1) / decode_s if new > 1 and decode_s > 0 else 0.0,
            peak_rss_bytes=peak_rss_bytes(),
            decode_passes=self._passes,
            drafted_tokens=self._speculator.drafted if self._speculator else 0,
            accepted_tokens=self._speculator.accepted if self._speculator else 0,
            dropped_messages=self._dropped,
            dropped_tokens=self._sequence.forgotten,
        )
