"""One conversation with a loaded model."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgekit.errors import GenerationError
from edgekit.session import Chunk, GenerateOptions, Prompt, Reply

from .generation import Generation
from .sequence import TokenSequence
from .session_file import write_session

if TYPE_CHECKING:
    from .engine import LoadedModel

__all__ = ["ModelSession", "make_options", "put_together"]

_T = TypeVar("_T")


def make_options(options: dict[str, Any]) -> GenerateOptions:
    """Options as they are given to `stream`: lists are taken for tuples, a text for one stop string.

    Raises:
        GenerationError: One is out of its range.
        TypeError: There is no such option.
    """
    stop = options.get("stop")
    changed = {"stop": (stop,) if isinstance(stop, str) else tuple(stop or ())}
    changed |= {name: tuple(options[name] or ()) for name in ("stop_tokens", "tools") if name in options}
    return GenerateOptions(**options | changed)


def _result(steps: Generator[object, None, _T]) -> _T:
    """What a generator returns at its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _T = end.value
            return result


def put_together(chunks: Iterator[Chunk]) -> Reply:
    """The reply that a stream's chunks are parts of."""
    parts = list(chunks)
    last = parts[-1]
    if last.finish_reason is None or last.stats is None:
        raise RuntimeError("the stream ended without a last chunk")
    return Reply(
        "".join(chunk.text for chunk in parts),
        tuple(token for chunk in parts for token in chunk.tokens),
        last.finish_reason,
        last.stats,
        "".join(chunk.reasoning for chunk in parts),
        tuple(call for chunk in parts for call in chunk.tool_calls),
        tuple(logprob for chunk in parts for logprob in chunk.logprobs),
        tuple(logprob for chunk in parts for logprob in chunk.prompt_logprobs),
    )


class ModelSession:
    """One conversation. What a prompt shares with the tokens already in the cache is not computed again.

    A session serves one stream at a time: while one runs, another, `fork`, `rewind` and `save` are a GenerationError.
    `cancel` and `close` may come at any time, from any thread.
    """

    def __init__(self, model: LoadedModel, sequence: TokenSequence) -> None:
        self._model, self._sequence = model, sequence
        self._busy = threading.Lock()
        self._closed = self._is_put_away = False
        self._cancelled = threading.Event()

    @property
    def tokens(self) -> tuple[int, ...]:
        """What has been computed: prompts and replies. Where the cache slides, also what has left it."""
        return () if self._is_put_away else tuple(self._sequence.tokens)

    def generate(self, prompt: Prompt, **options: Any) -> Reply:
        """Like `stream`, put together."""
        return put_together(self.stream(prompt, **options))

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Chunk]:
        """Continue a prompt. Options and prompt are checked before the first chunk is asked for.

        Leaving the loop ends the reply; what was computed of it stays in the cache.

        Raises:
            GenerationError: The prompt is empty or does not fit the context, an option is out of its range, or the session is
                in use.
        """
        return (chunk for chunk in self.steps(prompt, **options) if chunk is not None)

    def steps(
        self, prompt: Prompt, *, stream: int | None = None, **options: Any
    ) -> Generator[Chunk | None, None, None]:
        """Like `stream`, one forward at a time: None where a forward gave nothing to show.

        For schedulers that take turns between sessions; a long prompt is computed in many steps.

        Args:
            stream: Number of the reply among several to one prompt: with a seed it is that of `generate_many`.
        """
        started = time.perf_counter()
        with self._in_use():
            cancelled = self._cancelled = threading.Event()
        chosen = make_options(options)
        fitted = self._model.fit(prompt, chosen)
        generation = Generation(self._model, self._sequence, fitted, chosen, cancelled, started, stream=stream)
        return self._steps(generation, chosen, cancelled)

    def astream(self, prompt: Prompt, **options: Any) -> AsyncGenerator[Chunk, None]:
        """Like `stream`, for asyncio: prompt and model are worked on in a thread, and the event loop never waits for them.

        Leaving the loop, or cancelling the task, cancels the reply.
        """
        from .asynchronous import iterate_in_thread  # asyncio takes 4 MB, and few use it

        return iterate_in_thread(lambda: self.steps(prompt, **options))

    def generate_many(self, prompt: Prompt, n: int, **options: Any) -> tuple[Reply, ...]:
        """`n` replies to one prompt, which is computed once; with a seed, reply i draws from (seed, i).

        Raises:
            GenerationError: As `stream`, or n is less than 1.
        """
        started = time.perf_counter()
        if n < 1:
            raise GenerationError(f"n is {n}, expected at least 1")
        chosen = make_options(options)
        fitted = self._model.fit(prompt, chosen)
        replies, prefilled = list[Reply](), None
        with self._in_use():
            cancelled = self._cancelled = threading.Event()
            self._sequence.slides = chosen.context_policy == "sliding"
            for index in range(n):
                asked = started if index == 0 else time.perf_counter()
                generation = Generation(self._model, self._sequence, fitted, chosen, cancelled, asked, stream=index)
                prefilled = prefilled or _result(generation.prefill())
                if index < n - 1:
                    generation.move_to(self._sequence.fork())
                replies.append(put_together(chunk for chunk in generation.steps(prefilled) if chunk is not None))
                prefilled = prefilled and replace(prefilled, cached=len(fitted.prompt.tokens))
        return tuple(replies)

    def fork(self) -> ModelSession:
        """Another session with a copy of this one's cache.

        Raises:
            GenerationError: The session is in use or closed.
        """
        with self._in_use():
            sequence = self._sequence.fork()
            self._model.store.add(sequence)
            return ModelSession(self._model, sequence)

    def rewind(self, length: int) -> None:
        """Forget all tokens from `length` on.

        Raises:
            GenerationError: There are fewer, or the session is in use or closed.
        """
        with self._in_use():
            self._sequence.rewind(length)

    def save(self, path: str | Path) -> None:
        """Write tokens and cache to a file, for `LoadedModel.restore` with the same bundle.

        The file is written aside and renamed: an interrupt leaves what was there before.

        Raises:
            GenerationError: The session is in use or closed, or the file can't be written.
        """
        with self._in_use():
            write_session(Path(path), self._sequence, self._model.identity)

    def cancel(self) -> None:
        """End the running stream after its current forward; may be called from another thread."""
        self._cancelled.set()

    def close(self) -> None:
        """Free the cache, or leave it to the model's store. A running stream ends as cancelled first, by itself."""
        self._closed = True
        self._cancelled.set()
        self._put_away()

    def _steps(
        self, generation: Generation, options: GenerateOptions, cancelled: threading.Event
    ) -> Generator[Chunk | None, None, None]:
        with self._in_use():
            self._cancelled = cancelled
            self._sequence.slides = options.context_policy == "sliding"
            try:
                yield from generation.steps()
            finally:
                self._model.release_memory()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise GenerationError(
                "the session is in use", hint="wait for its stream to end, or open one session for each thread"
            )
        try:
            if self._closed:
                raise GenerationError("the session is closed", hint="open another one")
            yield
        finally:
            self._busy.release()
            if self._closed:  # meanwhile: `close` could not put it away
                self._put_away()

    def _put_away(self) -> None:
        """Give up the sequence, unless it is in use: whoever uses it does so at the end."""
        if self._busy.acquire(blocking=False):
            try:
                if not self._is_put_away:
                    self._is_put_away = True
                    self._model.store.put_away(self._sequence)
            finally:
                self._busy.release()
