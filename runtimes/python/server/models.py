"""The models that a server offers, and how a request becomes steps of one of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any

from edgekit.errors import EdgeKitError
from edgekit.runtimes.engine import LoadedModel
from edgekit.session import Chunk, FinishReason, GenerateOptions, Prompt, TokenLogprob

from .api_error import ApiError, from_edgekit

__all__ = ["Piece", "ServedModel", "Work", "find_model", "steps_of", "weigh"]

_CHUNK_BYTES, _ALTERNATIVE_BYTES = 300, 120  # of the objects, about


class ServedModel:
    """A loaded model under the name by which clients ask for it.

    Args:
        created: Unix time of the bundle.
    """

    def __init__(self, name: str, model: LoadedModel, created: int) -> None:
        self.name = name
        self.model = model
        self.created = created

    def token_bytes(self, token: int) -> bytes:
        """What a token writes; it may be a part of a character."""
        return self.model.tokenizer_info.token_bytes(token)

    def describe(self) -> dict[str, Any]:
        """As `/v1/models` lists it."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "edgekit"}


def find_model(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    """The model that a request names.

    Raises:
        ApiError: There is none.
    """
    if name in models:
        return models[name]
    known = ", ".join(models)
    raise ApiError(404, f"the model {name!r} is not served here, but {known}", code="model_not_found", param="model")


@dataclass(frozen=True, slots=True)
class Work:
    """What one request asks of a model: `n` replies to each prompt.

    `single_call` ends a reply after its first tool call. `param` names the prompt in error messages.
    """

    model: ServedModel
    prompts: tuple[Prompt, ...]
    options: Mapping[str, Any]
    n: int = 1
    single_call: bool = False
    param: str = "messages"

    @property
    def choices(self) -> int:
        """Replies in all."""
        return len(self.prompts) * self.n


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk of the reply number `index`."""

    index: int
    chunk: Chunk


def steps_of(work: Work) -> Iterator[Piece | None]:
    """Generate the replies, one after the other in one session: each prompt is computed once, in one cache.

    Yields:
        None after a step with nothing to show.

    Raises:
        ApiError: The model can't serve the prompt or an option.
        EdgeKitError: A reply fails on its way.
    """
    with closing(work.model.model.session()) as session:
        scores: tuple[TokenLogprob, ...] = ()
        for index in range(work.choices):
            prompt, first = work.prompts[index // work.n], index % work.n == 0
            options = dict(work.options)
            if first:
                scores = ()
            else:
                options["prompt_logprobs"] = None  # those of the first reply are repeated
            try:
                steps = session.steps(prompt, stream=index % work.n if work.n > 1 else None, **options)
            except EdgeKitError as error:
                raise _refusal(error, work, prompt) from error
            repeated = () if first else scores
            with closing(steps):
                for chunk in _until_first_call(steps, session.cancel) if work.single_call else steps:
                    if chunk is None:
                        yield None
                        continue
                    if first and chunk.prompt_logprobs:
                        scores = chunk.prompt_logprobs
                    yield Piece(index, replace(chunk, prompt_logprobs=repeated) if repeated else chunk)
                    repeated = ()


def _refusal(error: EdgeKitError, work: Work, prompt: Prompt) -> ApiError:
    """The answer to a prompt that the model does not take."""
    refusal = from_edgekit(error)
    model, options = work.model.model, GenerateOptions(raw=work.options.get("raw", False))
    with suppress(EdgeKitError):
        if len(model.encode(prompt, options).tokens) >= model.context:
            refusal.code, refusal.param = "context_length_exceeded", work.param
    return refusal


def _until_first_call(chunks: Iterator[Chunk | None], cancel: Callable[[], None]) -> Iterator[Chunk | None]:
    """A reply that ends with its first call."""
    called = False
    for chunk in chunks:
        if chunk is None:
            yield None
        elif called:
            reason: FinishReason | None = chunk.finish_reason and "tool_calls"
            yield replace(chunk, text="", reasoning="", tool_calls=(), finish_reason=reason)
        else:
            yield replace(chunk, tool_calls=chunk.tool_calls[:1])
            if chunk.tool_calls:
                called = True
                cancel()


def weigh(piece: Piece) -> int:
    """Bytes that a piece takes in memory, about."""
    chunk = piece.chunk
    alternatives = sum(1 + len(entry.alternatives) for entry in (*chunk.logprobs, *chunk.prompt_logprobs))
    arguments = sum(len(json.dumps(dict(call.arguments))) for call in chunk.tool_calls)
    return _CHUNK_BYTES + 4 * (len(chunk.text) + len(chunk.reasoning) + arguments) + _ALTERNATIVE_BYTES * alternatives
