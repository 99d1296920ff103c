"""Model and Session over any backend: prompts in, chunks of text out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgekit.bundle import Bundle, Program
from edgekit.errors import BundleError, GenerationError
from edgekit.registry import BACKENDS, load_attribute
from edgekit.session import Chunk, FinishReason, GenerateOptions, Message, Prompt, Reply, Stats

from .backend import Backend
from .chat_template import ChatTemplate
from .process_memory import peak_rss_bytes
from .sampling import Sampler
from .text import TextStream

__all__ = ["LoadedModel", "ModelSession", "load_model"]

PREFILL_CHUNK = 128  # tokens computed at a time: fastest here, and bounds activations and how long a cancel waits


def load_model(bundle: Bundle, program: Program, *, threads: int | None = None, mapped: bool = False) -> LoadedModel:
    """Load a bundle's program.

    Args:
        threads: For each operator; None leaves it to the backend.
        mapped: Compute from mapped weights: slower, with little memory.

    Raises:
        BundleError: The runtime does not load it, or the tokenizer is malformed.
    """
    started = time.perf_counter()
    if program.graph.format not in BACKENDS:
        raise BundleError(f"no runtime here runs {program.graph.format} programs", hint=f"known: {', '.join(BACKENDS)}")
    backend_class = load_attribute(BACKENDS[program.graph.format])
    backend = backend_class(bundle.directory, program.graph, context=program.context, threads=threads, mapped=mapped)
    return LoadedModel(bundle, program, backend, _load_tokenizer(bundle.directory / "tokenizer.json"), started)


def _load_tokenizer(path: Path) -> Any:
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()  # a prompt is never cut in silence
        tokenizer.no_padding()
        return tokenizer
    except Exception as error:  # the tokenizers library raises plain Exception
        raise BundleError(f"{path.name} is not a tokenizer: {error}", hint="convert the model again") from error


class LoadedModel:
    """Weights, tokenizer and template of one program; see `edgekit.session.Model`."""

    def __init__(self, bundle: Bundle, program: Program, backend: Backend, tokenizer: Any, started: float) -> None:
        manifest = bundle.manifest
        self.tokenizer = tokenizer
        self.context = program.context
        self.end_tokens = frozenset(manifest.eos_token_ids)
        self.rope_switch = program.graph.rope_switch
        self.backend = backend
        self.vocab_size = program.graph.vocab_size
        self._manifest = manifest
        self.load_s = time.perf_counter() - started

    @property
    def has_chat_template(self) -> bool:
        """False for a base model: it continues texts, and takes no messages."""
        return self._manifest.chat_template is not None

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, compiled when it is first needed: raw prompts do without.

        Raises:
            GenerationError: There is none, or it is broken.
        """
        if self._manifest.chat_template is None:
            raise GenerationError("this model has no chat template", hint="it is a base model: give a plain text")
        return ChatTemplate(self._manifest.chat_template, special_tokens=self._manifest.special_tokens)

    def session(self) -> ModelSession:
        """Open a conversation with an empty cache."""
        return ModelSession(self)

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Chunk]:
        """Continue `prompt` in a session of its own; the options are those of GenerateOptions.

        Raises:
            GenerationError: The prompt does not fit the context, or an option is out of its range.
        """
        return self.session().stream(prompt, **options)

    def generate(self, prompt: Prompt, **options: Any) -> Reply:
        """Like `stream`, put together."""
        return self.session().generate(prompt, **options)

    def encode(self, prompt: Prompt, options: GenerateOptions) -> list[int]:
        """Token ids of a prompt: rendered by the chat template, or as it is where there is none or `raw` is set.

        Raises:
            GenerationError: Messages for a model without a template, a system message that can't be placed, or a token that
                the model does not have.
        """
        if not (options.raw or (isinstance(prompt, str) and not self.has_chat_template)):
            return self.token_ids(self.render(prompt, options.system), add_special_tokens=False)
        if not isinstance(prompt, str):
            raise GenerationError("chat messages can't be sent raw", hint="give a text, or leave raw out")
        if options.system is not None:
            raise GenerationError("a raw prompt has no place for a system message", hint="write it into the prompt")
        return self.token_ids(prompt, add_special_tokens=True)

    def render(self, prompt: Prompt, system: str | None = None, *, now: datetime | None = None) -> str:
        """A prompt in the words of the chat template; `now` is what a template that asks for the date is told."""
        return self.template.render(_messages(prompt, system), now=now)

    def token_ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, with or without the tokens that the tokenizer adds itself.

        Raises:
            GenerationError: The text is not valid Unicode, or holds a token that the model does not have.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of a terminal or a file that are not UTF-8
            raise GenerationError("the prompt is not valid Unicode", hint="give it as UTF-8") from error
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        beyond = [token for token in ids if token >= self.vocab_size]
        if beyond:
            raise GenerationError(
                f"the prompt holds the token {self.tokenizer.id_to_token(beyond[0])!r}, which this model has no weights for"
            )
        return ids

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits of every position, float32 [tokens, vocabulary].

        Raises:
            GenerationError: There are no tokens, or more than the context holds.
        """
        if not 1 <= len(tokens) <= self.context:
            raise GenerationError(f"{len(tokens)} tokens, expected 1 to {self.context}")
        decoder, ids = self.backend.decoder(), np.asarray(tokens, np.int64)
        starts = range(0, len(ids), PREFILL_CHUNK)
        chunks = (ids[start : start + PREFILL_CHUNK] for start in starts)
        return np.concatenate([decoder.forward(part, rows=len(part), rope_length=len(ids)).copy() for part in chunks])

    def close(self) -> None:
        """Free the weights."""
        self.backend.close()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _messages(prompt: Prompt, system: str | None) -> list[Message]:
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is None:
        return messages
    if messages and messages[0].get("role") == "system":
        raise GenerationError("there are two system messages", hint="give it as an option or as the first message")
    return [{"role": "system", "content": system}, *messages]


@dataclass(slots=True)
class _Clock:
    """Times of one reply, in seconds of the same clock."""

    started: float
    prefilled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


class ModelSession:
    """One conversation. What a prompt shares with the tokens already in the cache is not computed again."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._decoder = model.backend.decoder()
        self._tokens: list[int] = []
        self._long_rope = False
        self._cancelled = threading.Event()

    def generate(self, prompt: Prompt, **options: Any) -> Reply:
        """Like `stream`, put together."""
        text, tokens = list[str](), list[int]()
        for chunk in self.stream(prompt, **options):
            text.append(chunk.text)
            tokens.extend(chunk.tokens)
        if chunk.finish_reason is None or chunk.stats is None:
            raise RuntimeError("the stream ended without a last chunk")
        return Reply("".join(text), tuple(tokens), chunk.finish_reason, chunk.stats)

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Chunk]:
        """Continue a prompt. Options and prompt are checked before the first chunk is asked for.

        Raises:
            GenerationError: The prompt is empty or does not fit the context, or an option is out of its range.
        """
        started = time.perf_counter()
        if isinstance(options.get("stop"), str):
            options["stop"] = (options["stop"],)
        chosen = GenerateOptions(**options | {"stop": tuple(options.get("stop") or ())})
        tokens, context = self._model.encode(prompt, chosen), self._model.context
        if not tokens:
            raise GenerationError("the prompt is empty", hint="give at least one character")
        if len(tokens) >= context:
            raise GenerationError(
                f"the prompt is {len(tokens):,} tokens, the context of {context:,} has room for {context - 1:,}",
                hint="shorten the prompt, or convert with a longer --context",
            )
        self._cancelled.clear()
        return self._stream(tokens, chosen, _Clock(started))

    def cancel(self) -> None:
        """End the running stream after its current token; may be called from another thread."""
        self._cancelled.set()

    def close(self) -> None:
        """Free the cache."""
        self._tokens = []
        self._decoder.close()

    def _stream(self, prompt: list[int], options: GenerateOptions, clock: _Clock) -> Iterator[Chunk]:
        model = self._model
        cached = self._reuse(prompt)
        sampler, text = Sampler(options), TextStream(model.tokenizer, options.stop, prompt)
        sampler.observe(prompt)
        logits = self._prefill(prompt)
        clock.prefilled = time.perf_counter()
        room = model.context - len(prompt)
        limit = room if options.max_tokens is None else min(options.max_tokens, room)
        pending: list[int] = []
        count = 0
        reason: FinishReason | None = None
        while reason is None:
            if logits is None or self._cancelled.is_set():
                reason = "cancelled"
                break
            token = sampler.next(logits[0])
            clock.last_token = time.perf_counter()
            clock.first_token = clock.first_token or clock.last_token
            if token in model.end_tokens:
                reason = "stop"
                break
            count += 1
            pending.append(token)
            shown = text.push(token)
            reason = "stop" if text.stopped else "length" if count == limit else None
            if shown and reason is None:
                yield Chunk(shown, tuple(pending))
                pending = []
            if reason is None:
                logits = self._append(token)
            elif shown:
                yield Chunk(shown, tuple(pending))
                pending = []
        rest = text.finish()
        reason = "stop" if text.stopped else reason  # the last held-back bytes may complete a stop text
        yield self._last_chunk(rest, pending, reason, clock, (len(prompt), cached, count))

    def _last_chunk(
        self, text: str, tokens: list[int], reason: FinishReason, clock: _Clock, counts: tuple[int, int, int]
    ) -> Chunk:
        prompt_tokens, cached, new = counts
        decode_s = clock.last_token - clock.first_token
        return Chunk(
            text,
            tuple(tokens),
            reason,
            Stats(
                prompt_tokens=prompt_tokens,
                cached_tokens=cached,
                new_tokens=new,
                load_s=self._model.load_s,
                ttft_s=max(clock.first_token - clock.started, 0.0),
                prefill_tokens_per_s=(prompt_tokens - cached) / max(clock.prefilled - clock.started, 1e-9),
                decode_tokens_per_s=(new - 1) / decode_s if new > 1 and decode_s > 0 else 0.0,
                peak_rss_bytes=peak_rss_bytes(),
            ),
        )

    def _reuse(self, prompt: list[int]) -> int:
        """Keep what the cache shares with the prompt (but for its last token, whose logits are needed); its length."""
        pairs = zip(self._tokens, prompt[:-1], strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        long_rope = self._is_long(len(prompt))
        if long_rope != self._long_rope:  # rotated otherwise: nothing can be kept
            shared = 0
        shared = min(shared, self._decoder.length)  # an interrupt may have come between the two
        self._long_rope = long_rope
        self._rewind(shared)
        return shared

    def _is_long(self, length: int) -> bool:
        return 0 < self._model.rope_switch < length

    def _rewind(self, length: int) -> None:
        self._decoder.rewind(length)
        del self._tokens[length:]

    def _prefill(self, tokens: list[int]) -> NDArray[np.float32] | None:
        """Compute what the cache lacks of `tokens`; logits [1, vocabulary], or None where it was cancelled."""
        logits = None
        while len(self._tokens) < len(tokens):
            if self._cancelled.is_set():
                return None
            part = tokens[len(self._tokens) : len(self._tokens) + PREFILL_CHUNK]
            logits = self._decoder.forward(np.asarray(part, np.int64), rows=1, rope_length=len(tokens))
            self._tokens.extend(part)
        return logits

    def _append(self, token: int) -> NDArray[np.float32] | None:
        tokens = [*self._tokens, token] if self._is_long(len(self._tokens) + 1) != self._long_rope else None
        if tokens:  # past the original context the long factors apply: as transformers, compute all again with them
            self._long_rope = True
            self._rewind(0)
            return self._prefill(tokens)
        logits = self._decoder.forward(np.array([token], np.int64), rows=1, rope_length=len(self._tokens) + 1)
        self._tokens.append(token)
        return logits
