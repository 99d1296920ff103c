"""`/v1/completions`: texts to continue, without the chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from edgekit.session import GenerateOptions, TokenLogprob

from .api_error import ApiError
from .chat import DONE
from .endpoint import frame
from .logprobs import completion_logprobs
from .models import Piece, ServedModel, Work
from .schemas import LARGEST_N, Count, Request, StreamOptions
from .usage import Usage

__all__ = ["Completions"]

DEFAULT_TOKENS = 16  # OpenAI's
MOST_PROMPTS = 64


class CompletionRequest(Request):
    """The body."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
    n: Annotated[int, Field(ge=1, le=LARGEST_N)] = 1
    best_of: Count | None = None
    max_tokens: Count = DEFAULT_TOKENS
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts to continue."""
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)


class Completions:
    """The endpoint."""

    path: ClassVar[str] = "/v1/completions"
    schema: ClassVar[type[Request]] = CompletionRequest
    unsupported: ClassVar[Mapping[str, str]] = {"suffix": "the models continue texts, they do not fill gaps"}

    @staticmethod
    def work(request: CompletionRequest, model: ServedModel, temperature: float) -> Work:
        """What the request asks of the model."""
        if request.best_of not in (None, request.n):
            raise ApiError(400, "best_of is not supported: use n", code="unsupported_parameter", param="best_of")
        echoed = request.logprobs if request.echo else None
        options = {"raw": True, "max_tokens": request.max_tokens, "logprobs": request.logprobs}
        return Work(
            model,
            request.prompts,
            request.sampling(temperature) | options | {"prompt_logprobs": echoed},
            n=request.n,
            param="prompt",
        )

    @staticmethod
    def answer(request: CompletionRequest, work: Work) -> CompletionAnswer:
        """An answer to fill."""
        return CompletionAnswer(request, work)


class CompletionAnswer:
    """Chunks or a whole completion."""

    def __init__(self, request: CompletionRequest, work: Work) -> None:
        self._request = request
        self._work = work
        self._include_usage = request.stream_options is not None and request.stream_options.include_usage
        self.usage = Usage(work)
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": work.model.name,
        }
        self.keeps = not request.stream
        self._choices = [_Choice() for _ in range(work.choices)]

    def begin(self) -> Iterator[bytes]:
        """Nothing."""
        return iter(())

    def add(self, piece: Piece) -> Iterator[bytes]:
        """A part of a choice; the first one begins with the prompt where it is echoed."""
        choice, chunk = self._choices[piece.index], piece.chunk
        self.usage.add(piece)
        text, offset, logprobs = chunk.text, choice.length, list(chunk.logprobs)
        rendered = self._render(logprobs, offset)
        if not choice.begun and self._request.echo:
            prompt = self._request.prompts[piece.index // self._work.n]
            text = prompt + text
            if rendered is not None:
                rendered = _joined(
                    self._render_prompt(prompt, chunk.prompt_logprobs), self._render(logprobs, len(prompt))
                )
        choice.begun = True
        choice.length += len(text)
        part = {"index": piece.index, "text": text, "logprobs": rendered, "finish_reason": chunk.finish_reason}
        if self.keeps:
            choice.parts.append(part)
        if text or chunk.finish_reason or logprobs:
            more = {"usage": None} if self._include_usage else {}
            if chunk.finish_reason is not None:
                more |= self.usage.dropped_json()
            yield frame(self._head | {"choices": [part]} | more)

    def end(self) -> Iterator[bytes]:
        """Usage, where it was asked for, and the mark of the end."""
        if self._include_usage:
            yield frame(self._head | {"choices": [], "usage": self.usage.completion_json()})
        yield DONE

    def fail(self, error: ApiError) -> Iterator[bytes]:
        """The error's object as an event: clients raise it."""
        yield frame(error.body())

    def whole(self) -> dict[str, Any]:
        """A `text_completion`."""
        choices = [choice.to_json(index) for index, choice in enumerate(self._choices)]
        return self._head | {"choices": choices, "usage": self.usage.completion_json()} | self.usage.dropped_json()

    def _render(self, entries: list[TokenLogprob], offset: int) -> dict[str, Any] | None:
        return None if self._request.logprobs is None else completion_logprobs(self._work.model, entries, offset)

    def _render_prompt(self, prompt: str, entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        """Nothing comes before the first token: it has no log-probability."""
        first = self._work.model.model.encode(prompt, GenerateOptions(raw=True)).tokens[0]
        rendered = completion_logprobs(self._work.model, [TokenLogprob(first, 0.0), *entries], 0)
        rendered["token_logprobs"][0] = rendered["top_logprobs"][0] = None
        return rendered


class _Choice:
    """The parts of one reply, where it is sent whole."""

    def __init__(self) -> None:
        self.begun = False
        self.length = 0
        self.parts: list[dict[str, Any]] = []

    def to_json(self, index: int) -> dict[str, Any]:
        logprobs = None
        for part in self.parts:
            logprobs = _joined(logprobs, part["logprobs"])
        return {
            "index": index,
            "text": "".join(part["text"] for part in self.parts),
            "logprobs": logprobs,
            "finish_reason": self.parts[-1]["finish_reason"],
        }


def _joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    if first is None or second is None:
        return first or second
    return {name: values + second[name] for name, values in first.items()}
