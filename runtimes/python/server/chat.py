"""`/v1/chat/completions`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgekit.session import ToolCall
from edgekit.structure import JsonSchema, Structure

from .api_error import ApiError
from .endpoint import frame
from .logprobs import token_logprobs
from .messages import AnyMessage, to_template
from .models import Piece, ServedModel, Work
from .schemas import (
    LARGEST_N,
    MOST_TOOLS,
    Count,
    JsonFormat,
    ObjectFormat,
    PlainFormat,
    Request,
    StreamOptions,
    Strict,
    Tool,
    ToolChoice,
    check_schemas,
    tool_options,
)
from .usage import Usage

__all__ = ["ChatCompletions"]

DONE = b"data: [DONE]\n\n"


class SchemaFormat(Strict):
    """What a JSON schema admits."""

    type: Literal["json_schema"]
    json_schema: JsonFormat


class ChatRequest(Request):
    """The body."""

    messages: Annotated[list[AnyMessage], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=LARGEST_N)] = 1
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Annotated[PlainFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    stream_options: StreamOptions | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None

    def options(self, temperature: float) -> dict[str, Any]:
        """As GenerateOptions has it."""
        check_schemas(self._schemas())
        choice = self.tool_choice
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools]
        return (
            self.sampling(temperature)
            | tool_options(tools, choice if choice is None or isinstance(choice, str) else choice.function.name)
            | {"max_tokens": self._limit(), "logprobs": self._alternatives(), "structure": self._structure()}
        )

    def _schemas(self) -> Iterator[tuple[str, object]]:
        if isinstance(self.response_format, SchemaFormat):
            yield "response_format.json_schema.schema", self.response_format.json_schema.json_schema
        for place, tool in enumerate(self.tools):
            yield f"tools[{place}].function.parameters", tool.function.parameters

    def _limit(self) -> int | None:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            message = "max_tokens and max_completion_tokens differ: give the latter"
            raise ApiError(400, message, code="invalid_value", param="max_tokens")
        return self.max_completion_tokens or self.max_tokens

    def _alternatives(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs needs logprobs to be true"
            raise ApiError(400, message, code="invalid_value", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def _structure(self) -> Structure | None:
        match self.response_format:
            case ObjectFormat():
                return JsonSchema({"type": "object"})
            case SchemaFormat(json_schema=schema):
                return schema.structure
        return None


class ChatCompletions:
    """The endpoint."""

    path: ClassVar[str] = "/v1/chat/completions"
    schema: ClassVar[type[Request]] = ChatRequest
    unsupported: ClassVar[Mapping[str, str]] = {
        "audio": "EdgeKit serves text",
        "function_call": "use tool_choice",
        "functions": "use tools",
        "moderation": "",
        "prediction": "copied text is drafted without it",
        "prompt_cache_options": "prefixes are cached without it",
        "reasoning_effort": "",
        "web_search_options": "give a tool of your own",
    }

    @staticmethod
    def work(request: ChatRequest, model: ServedModel, temperature: float) -> Work:
        """What the request asks of the model."""
        return Work(
            model,
            (to_template(request.messages),),
            request.options(temperature),
            n=request.n,
            single_call=not request.parallel_tool_calls,
        )

    @staticmethod
    def answer(request: ChatRequest, work: Work) -> ChatAnswer:
        """An answer to fill."""
        return ChatAnswer(request, work)


class ChatAnswer:
    """Chunks or a whole completion."""

    def __init__(self, request: ChatRequest, work: Work) -> None:
        self._work = work
        self._logprobs = request.logprobs
        self._include_usage = request.stream_options is not None and request.stream_options.include_usage
        self.usage = Usage(work)
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self.keeps = not request.stream
        self._choices = [_Choice() for _ in range(work.choices)]

    def begin(self) -> Iterator[bytes]:
        """Nothing: a choice's first delta comes with its first piece."""
        return iter(())

    def add(self, piece: Piece) -> Iterator[bytes]:
        """One delta, or two: the first of a choice tells the role."""
        choice, chunk = self._choices[piece.index], piece.chunk
        self.usage.add(piece)
        if not choice.begun:
            choice.begun = True
            yield self._delta(piece.index, {"role": "assistant", "content": ""})
        delta: dict[str, Any] = {}
        if chunk.reasoning:
            delta["reasoning_content"] = chunk.reasoning
        if chunk.text:
            delta["content"] = chunk.text
        if chunk.tool_calls:
            delta["tool_calls"] = [
                {"index": choice.count_of_calls + place} | call_json(call)
                for place, call in enumerate(chunk.tool_calls)
            ]
            choice.count_of_calls += len(chunk.tool_calls)
        logprobs = token_logprobs(self._work.model, chunk.logprobs) if self._logprobs else []
        if self.keeps:
            choice.extend(chunk.text, chunk.reasoning, [call_json(call) for call in chunk.tool_calls], logprobs)
        if delta or logprobs:
            yield self._delta(piece.index, delta, logprobs=logprobs)
        if chunk.finish_reason is not None:
            choice.finish_reason = chunk.finish_reason
            yield self._delta(piece.index, {}, finish_reason=chunk.finish_reason)

    def end(self) -> Iterator[bytes]:
        """Usage, where it was asked for, and the mark of the end."""
        if self._include_usage:
            yield frame(self._head("chat.completion.chunk") | {"choices": [], "usage": self.usage.completion_json()})
        yield DONE

    def fail(self, error: ApiError) -> Iterator[bytes]:
        """The error's object as an event: clients raise it."""
        yield frame(error.body())

    def whole(self) -> dict[str, Any]:
        """A `chat.completion`."""
        choices = [choice.to_json(index, self._logprobs) for index, choice in enumerate(self._choices)]
        body = self._head("chat.completion") | {"choices": choices, "usage": self.usage.completion_json()}
        return body | self.usage.dropped_json()

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._work.model.name}

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: list[dict[str, Any]] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        content = {"content": logprobs, "refusal": None} if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": content, "finish_reason": finish_reason}
        more = {"usage": None} if self._include_usage else {}
        if finish_reason is not None:
            more |= self.usage.dropped_json()
        return frame(self._head("chat.completion.chunk") | {"choices": [choice]} | more)


class _Choice:
    """One reply, put together where it is sent whole."""

    def __init__(self) -> None:
        self.begun = False
        self.count_of_calls = 0
        self.finish_reason: str | None = None
        self._calls: list[dict[str, Any]] = []
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def extend(self, text: str, reasoning: str, calls: list[dict[str, Any]], logprobs: list[dict[str, Any]]) -> None:
        self._text.append(text)
        self._reasoning.append(reasoning)
        self._calls += calls
        self._logprobs += logprobs

    def to_json(self, index: int, with_logprobs: bool) -> dict[str, Any]:
        text, reasoning = "".join(self._text), "".join(self._reasoning)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text or (None if self._calls else ""),
            "refusal": None,
        }
        if reasoning:
            message["reasoning_content"] = reasoning
        if self._calls:
            message["tool_calls"] = self._calls
        logprobs = {"content": self._logprobs, "refusal": None} if with_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}


def call_json(call: ToolCall) -> dict[str, Any]:
    """A call as OpenAI writes it: the arguments are JSON in a text."""
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
