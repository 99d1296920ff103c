"""A loaded model: prompts in, sessions and replies out, over any backend."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgekit.bundle import Bundle, Program
from edgekit.errors import BundleError, GenerationError
from edgekit.registry import BACKENDS, check_installed, load_attribute
from edgekit.runtime_options import RuntimeOptions, usable_cores
from edgekit.session import Chunk, GenerateOptions, Message, Prompt, Reply

from .backend import Backend
from .chat_template import ChatTemplate
from .constraint import TokenizerInfo
from .context_policy import EncodedPrompt, FittedPrompt, check_policy, check_room, drop_oldest_turns, last_position
from .model_session import ModelSession, put_together
from .output import template_tools
from .process_memory import release_free_memory
from .provider_choice import CPU_ONLY, ProviderChoice, choose_provider, fall_back
from .sequence import PREFILL_CHUNK, TokenSequence
from .session_file import bundle_identity, read_session
from .session_store import SessionStore
from .speculation import ForwardCosts

__all__ = ["LoadedModel", "load_model"]


def load_model(
    bundle: Bundle,
    program: Program,
    *,
    provider: str | None = None,
    choice: ProviderChoice | None = None,
    verifying: bool = False,
    threads: int | None = None,
    mapped: bool = False,
    session_cache_bytes: int | None = 0,
) -> LoadedModel:
    """Load a bundle's program.

    Args:
        provider, verifying: See `choose_provider`.
        choice: What it returned, where that is known.
        threads: For each operator; None takes the program's own number, and no more than there are processors here.
        mapped: Compute from mapped weights without packed copies of them: slower, with little memory.
        session_cache_bytes: See `edgekit.load`.

    Raises:
        BundleError: The runtime does not load it, or the tokenizer is malformed.
        MissingExtraError: What runs programs of this format is not installed.
        UnsupportedError: As `choose_provider`.
        GenerationError: `session_cache_bytes` is negative.
    """
    started = time.perf_counter()
    if session_cache_bytes is not None and session_cache_bytes < 0:
        raise GenerationError(f"session_cache_bytes is {session_cache_bytes}, expected 0 or more")
    _check_runs(program.graph.format)
    final = verifying or provider is not None or choice is not None
    choice = choice or choose_provider(bundle, program, asked=provider, verifying=verifying)
    backend_class = load_attribute(BACKENDS[program.graph.format])
    options = _resolved(program.runtime, threads, mapped)
    tokenizer = _load_tokenizer(bundle.directory / "tokenizer.json")
    release_free_memory()  # what reading the tokenizer took: the weights can have it
    more = {"context": program.context, "options": options}
    choice, backend = _open_backend(partial(backend_class, bundle.directory, program.graph, **more), choice, final)
    try:
        _check_end_tokens(bundle, program, backend)
    except BundleError:
        backend.close()
        raise
    choice = replace(choice, runtime=backend.runtime)
    model = LoadedModel(bundle, program, backend, tokenizer, choice, started, session_cache_bytes)
    model.release_memory()
    return model


def _check_runs(format: str) -> None:
    """Refuse a format that nothing here runs.

    Raises:
        BundleError, MissingExtraError: It is not known, or its extra is not installed.
    """
    if format not in BACKENDS:
        raise BundleError(f"no runtime here runs {format} programs", hint=f"known: {', '.join(BACKENDS)}")
    check_installed(format, to_run=True)


def _resolved(options: RuntimeOptions, threads: int | None, mapped: bool) -> RuntimeOptions:
    """A program's options on this machine."""
    return replace(
        options,
        threads=threads or min(options.threads, usable_cores()),
        prepacking=options.prepacking and not mapped,
    )


def _check_end_tokens(bundle: Bundle, program: Program, backend: Backend) -> None:
    """Refuse a program that ends replies, where others run it, at other tokens than the bundle.

    Raises:
        BundleError: It does.
    """
    own, ends = backend.end_tokens, frozenset(bundle.manifest.eos_token_ids)
    if own is not None and own != ends:
        own_text, text = (", ".join(map(str, sorted(tokens))) or "none" for tokens in (own, ends))
        raise BundleError(
            f"{program.graph.files[0]} has the end tokens {own_text}, the bundle {text}", hint="convert the model again"
        )


def _open_backend(open_: Callable[..., Backend], choice: ProviderChoice, final: bool) -> tuple[ProviderChoice, Backend]:
    """Load on the chosen provider, or on the CPU where that fails and the choice is not `final`; and what was chosen then."""
    if choice is CPU_ONLY:
        return choice, open_()
    try:
        return choice, open_(provider=choice.name)
    except BundleError as error:
        if final or choice.name == "cpu":
            raise
        choice = fall_back(choice, error.message)
        return choice, open_(provider=choice.name)


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

    def __init__(
        self,
        bundle: Bundle,
        program: Program,
        backend: Backend,
        tokenizer: Any,
        provider: ProviderChoice,
        started: float,
        session_cache_bytes: int | None,
    ) -> None:
        manifest, graph = bundle.manifest, program.graph
        self.tokenizer = tokenizer
        self.provider = provider
        self.program = program
        self.context = program.context
        self.end_tokens = frozenset(manifest.eos_token_ids)
        self.backend = backend
        self.vocab_size = graph.vocab_size
        whole_context = graph.cache.token_bytes * program.context
        self.store = SessionStore(whole_context if session_cache_bytes is None else session_cache_bytes)
        self.forward_costs = ForwardCosts()
        self._bundle = bundle
        self.load_s = time.perf_counter() - started

    @property
    def has_chat_template(self) -> bool:
        """False for a base model: it continues texts, and takes no messages."""
        return self._bundle.manifest.chat_template is not None

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, compiled when it is first needed: raw prompts do without.

        Raises:
            GenerationError: There is none, or it is broken.
        """
        manifest = self._bundle.manifest
        if manifest.chat_template is None:
            raise GenerationError("this model has no chat template", hint="it is a base model: give a plain text")
        return ChatTemplate(manifest.chat_template, special_tokens=manifest.special_tokens)

    @property
    def template_source(self) -> str | None:
        """The chat template as the model's makers wrote it."""
        return self._bundle.manifest.chat_template

    @cached_property
    def tokenizer_info(self) -> TokenizerInfo:
        """What structures must know of the tokens."""
        return TokenizerInfo(self.tokenizer, self.vocab_size, self.end_tokens)

    @cached_property
    def identity(self) -> str:
        """What saved sessions are bound to."""
        return bundle_identity(self._bundle, self.program)

    def session(self) -> ModelSession:
        """Open a conversation with an empty cache. Its first prompt takes what it shares with other sessions."""
        sequence = TokenSequence(self.backend, self.program)
        self.store.add(sequence)
        return ModelSession(self, sequence)

    def restore(self, path: str | Path) -> ModelSession:
        """Open a saved session.

        Raises:
            GenerationError: The file can't be read, is damaged, or of another bundle.
        """
        sequence = TokenSequence(self.backend, self.program)
        read_session(Path(path), sequence, self.program, self.identity)
        self.store.add(sequence)
        return ModelSession(self, sequence)

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Chunk]:
        """Continue `prompt` in a session of its own; the options are those of GenerateOptions.

        Raises:
            GenerationError: The prompt does not fit the context, or an option is out of its range.
        """
        return (chunk for chunk in self.steps(prompt, **options) if chunk is not None)

    def steps(self, prompt: Prompt, **options: Any) -> Generator[Chunk | None, None, None]:
        """Like `stream`, one forward at a time; see `ModelSession.steps`."""
        session = self.session()
        return _close_after(session, session.steps(prompt, **options))

    def astream(self, prompt: Prompt, **options: Any) -> AsyncGenerator[Chunk, None]:
        """Like `stream`, for asyncio; see `ModelSession.astream`."""
        from .asynchronous import iterate_in_thread  # asyncio takes 4 MB, and few use it

        return iterate_in_thread(lambda: self.steps(prompt, **options))

    def generate(self, prompt: Prompt, **options: Any) -> Reply:
        """Like `stream`, put together."""
        return put_together(self.stream(prompt, **options))

    def generate_many(self, prompt: Prompt, n: int, **options: Any) -> tuple[Reply, ...]:
        """`n` replies to one prompt, which is computed once; with a seed, reply i draws from (seed, i).

        Raises:
            GenerationError: As `stream`, or n is less than 1.
        """
        with closing(self.session()) as session:
            return session.generate_many(prompt, n, **options)

    def perplexity(self, text: str) -> float:
        """How surprised the model is by a text: e to the mean negative log-probability of its tokens but the first.

        Raises:
            GenerationError: The text is shorter than two tokens, or does not fit the context.
        """
        scores = self.generate(text, raw=True, max_tokens=1, prompt_logprobs=0).prompt_logprobs
        if not scores:
            raise GenerationError("a text of one token has no perplexity", hint="give a longer one")
        return math.exp(-sum(score.logprob for score in scores) / len(scores))

    def fit(self, prompt: Prompt, options: GenerateOptions) -> FittedPrompt:
        """Token ids of a prompt as the context policy lets it through.

        Raises:
            GenerationError: It does not fit, or as `encode`.
        """
        policy = options.context_policy
        check_policy(policy, self.program)
        if policy == "drop-oldest-turns" and not isinstance(prompt, str):
            return drop_oldest_turns(
                prompt, lambda messages: self.encode(messages, options), options.max_tokens, self.context
            )
        encoded = self.encode(prompt, options)
        check_room(len(encoded.tokens), last_position(policy, self.program))
        return FittedPrompt(encoded)

    def encode(self, prompt: Prompt, options: GenerateOptions) -> EncodedPrompt:
        """A prompt as the model reads it: rendered by the chat template, or as it is where there is none or `raw` is set.

        Raises:
            GenerationError: Messages for a model without a template, a system message that can't be placed, tools that are
                malformed, or a token that the model does not have.
        """
        if not (options.raw or (isinstance(prompt, str) and not self.has_chat_template)):
            text = self.render(prompt, options.system, tools=template_tools(options))
            return EncodedPrompt(text, self.token_ids(text, add_special_tokens=False), is_templated=True)
        if not isinstance(prompt, str):
            raise GenerationError("chat messages can't be sent raw", hint="give a text, or leave raw out")
        if options.system is not None:
            raise GenerationError("a raw prompt has no place for a system message", hint="write it into the prompt")
        return EncodedPrompt(prompt, self.token_ids(prompt, add_special_tokens=True))

    def render(
        self,
        prompt: Prompt,
        system: str | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        now: datetime | None = None,
    ) -> str:
        """A prompt in the words of the chat template; `now` is what a template that asks for the date is told."""
        return self.template.render(_messages(prompt, system), tools=tools, now=now)

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

    def release_memory(self) -> None:
        """Give back what loading or a reply took, and what is needed again only with the next one."""
        release_free_memory()
        self.backend.release()

    def close(self) -> None:
        """Free the weights, once every session is closed too."""
        self.store.close()
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


def _close_after(
    session: ModelSession, steps: Generator[Chunk | None, None, None]
) -> Generator[Chunk | None, None, None]:
    try:
        yield from steps
    finally:
        session.close()
