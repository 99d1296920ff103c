"""`/v1/responses`: text and function tools; nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from edgekit.session import Chunk, ToolCall

from .api_error import ApiError
from .chat import call_json
from .endpoint import frame
from .logprobs import token_logprobs
from .models import Piece, ServedModel, Work
from .responses_request import ResponsesRequest, to_messages
from .schemas import Request
from .usage import Usage

__all__ = ["Responses"]


class Responses:
    """The endpoint."""

    path: ClassVar[str] = "/v1/responses"
    schema: ClassVar[type[Request]] = ResponsesRequest
    unsupported: ClassVar[Mapping[str, str]] = {
        "access_programs": "",
        "background_options": "",
        "context_management": "",
        "conversation": "nothing is stored: send the whole conversation as input",
        "image": "EdgeKit serves text",
        "moderation": "",
        "previous_response_id": "nothing is stored: send the whole conversation as input",
        "prompt": "templates are not stored: send the text as input",
        "prompt_cache_options": "prefixes are cached without it",
        "reasoning": "",
    }

    @staticmethod
    def work(request: ResponsesRequest, model: ServedModel, temperature: float) -> Work:
        """What the request asks of the model."""
        return Work(
            model,
            (to_messages(request),),
            request.options(temperature),
            single_call=not request.parallel_tool_calls,
            param="input",
        )

    @staticmethod
    def answer(request: ResponsesRequest, work: Work) -> ResponseAnswer:
        """An answer to fill."""
        return ResponseAnswer(request, work)


class ResponseAnswer:
    """OpenAI's events, and the response that they add up to."""

    def __init__(self, request: ResponsesRequest, work: Work) -> None:
        self._work = work
        self.keeps = True  # the last event of a stream repeats all
        self.usage = Usage(work)
        self._sequence = 0
        self._output: list[dict[str, Any]] = []
        self._open: _OpenItem | None = None
        self._truncated = False
        self._with_logprobs = request.wants_logprobs
        self._response = _skeleton(request, work)

    def begin(self) -> Iterator[bytes]:
        """The response, still empty."""
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)

    def add(self, piece: Piece) -> Iterator[bytes]:
        """The events of a piece: items are opened, grow, and are closed when something else comes."""
        chunk = piece.chunk
        self.usage.add(piece)
        if chunk.reasoning:
            yield from self._grow("reasoning", chunk.reasoning, [])
        if chunk.text or (chunk.logprobs and not chunk.reasoning and self._with_logprobs and not chunk.tool_calls):
            yield from self._grow("message", chunk.text, self._logprobs(chunk))
        for call in chunk.tool_calls:
            yield from self._close("completed")
            yield from self._call(call)
        self._truncated |= chunk.finish_reason == "length"

    def end(self) -> Iterator[bytes]:
        """The whole response."""
        if self._open is None and not self._output:
            yield from self._grow("message", "", [])  # an empty answer is an answer
        status = "incomplete" if self._truncated else "completed"
        yield from self._close(status)
        self._response |= {"status": status, "output": self._output, "usage": self.usage.response_json()}
        self._response |= self.usage.dropped_json()
        if self._truncated:
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self._response["completed_at"] = int(time.time())
        yield self._event(f"response.{status}", response=self._response)

    def fail(self, error: ApiError) -> Iterator[bytes]:
        """A response that failed."""
        self._response |= {
            "status": "failed",
            "output": self._output,
            "error": {"code": "server_error", "message": error.message},
        }
        yield self._event("response.failed", response=self._response)

    def whole(self) -> dict[str, Any]:
        """The response."""
        return self._response

    def _logprobs(self, chunk: Chunk) -> list[dict[str, Any]]:
        return token_logprobs(self._work.model, chunk.logprobs) if self._with_logprobs else []

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = frame({"type": kind, "sequence_number": self._sequence} | fields, kind)
        self._sequence += 1
        return event

    def _grow(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> Iterator[bytes]:
        item = self._open
        if item is None or item.kind != kind:
            yield from self._close("completed")
            item = self._open = _OpenItem(kind)
            at = {"output_index": len(self._output)}
            yield self._event("response.output_item.added", item=item.to_json("in_progress", empty=True), **at)
            part = item.part(empty=True)
            yield self._event("response.content_part.added", item_id=item.id, content_index=0, part=part, **at)
        item.texts.append(text)
        item.logprobs += logprobs
        if text or logprobs:
            more = {"logprobs": logprobs} if kind == "message" else {}
            yield self._event(f"response.{item.text_type}.delta", **self._place(item), delta=text, **more)

    def _close(self, status: str) -> Iterator[bytes]:
        item, self._open = self._open, None
        if item is None:
            return
        place = self._place(item)
        more = {"logprobs": item.logprobs} if item.kind == "message" else {}
        yield self._event(f"response.{item.text_type}.done", **place, text=item.text, **more)
        yield self._event("response.content_part.done", **place, part=item.part())
        done = item.to_json(status)
        yield self._event("response.output_item.done", item=done, output_index=len(self._output))
        self._output.append(done)

    def _call(self, call: ToolCall) -> Iterator[bytes]:
        function = call_json(call)["function"]
        item = {
            "id": _new_id("fc"),
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": function["arguments"],
            "status": "completed",
        }
        place = {"item_id": item["id"], "output_index": len(self._output)}
        started = item | {"arguments": "", "status": "in_progress"}
        kind = "response.function_call_arguments"
        yield self._event("response.output_item.added", item=started, output_index=place["output_index"])
        yield self._event(f"{kind}.delta", delta=item["arguments"], **place)
        yield self._event(f"{kind}.done", name=call.name, arguments=item["arguments"], **place)
        yield self._event("response.output_item.done", item=item, output_index=place["output_index"])
        self._output.append(item)

    def _place(self, item: _OpenItem) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": len(self._output), "content_index": 0}


class _OpenItem:
    """A message or a reasoning that grows."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.id = _new_id("msg" if kind == "message" else "rs")
        self.text_type = "output_text" if kind == "message" else "reasoning_text"
        self.texts: list[str] = []
        self.logprobs: list[dict[str, Any]] = []

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self, *, empty: bool = False) -> dict[str, Any]:
        part: dict[str, Any] = {"type": self.text_type, "text": "" if empty else self.text}
        if self.kind == "message":
            part |= {"annotations": [], "logprobs": [] if empty else self.logprobs}
        return part

    def to_json(self, status: str, *, empty: bool = False) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        item["content"] = [] if empty else [self.part()]
        if self.kind == "message":
            item["role"] = "assistant"
        else:
            item["summary"] = []
        return item


def _skeleton(request: ResponsesRequest, work: Work) -> dict[str, Any]:
    """A response before its first token: it repeats what was asked for."""
    return {
        "id": _new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "model": work.model.name,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": None,
        "store": False,
        "temperature": work.options["temperature"],
        "text": {"format": request.format_json()},
        "tool_choice": request.tool_choice_json(),
        "tools": [tool.model_dump() for tool in request.tools],
        "top_p": request.top_p,
        "truncation": "disabled" if work.options["context_policy"] == "error" else "auto",
        "usage": None,
        "metadata": request.metadata or {},
    }


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
