"""Answers built from hand-made chunks: reasoning, text and calls in one reply, as a model that has all of them gives."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pydantic
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent

from edgekit.runtimes.engine import LoadedModel
from edgekit.runtimes.server.api_error import ApiError
from edgekit.runtimes.server.chat import ChatCompletions
from edgekit.runtimes.server.endpoint import Answer
from edgekit.runtimes.server.models import Piece, ServedModel
from edgekit.runtimes.server.responses import Responses
from edgekit.session import Chunk, FinishReason, Stats, ToolCall

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
CALLS = (ToolCall("call_1", "look", {"at": "é\ud800"}), ToolCall("call_2", "look", {}))
TOOLS = [{"type": "function", "function": {"name": "look"}}]


def pieces(reason: FinishReason) -> list[Piece]:
    stats = Stats(9, 4, 7, 0.0, 0.0, 0.0, 0.0, 0)
    chunks = (
        Chunk("", (1, 2), reasoning="Let me "),
        Chunk("", (3,), reasoning="think."),
        Chunk("So:", (4,)),
        Chunk("", (5, 6), tool_calls=CALLS[:1]),
        Chunk("", (7,), reason, stats, tool_calls=CALLS[1:]),
    )
    return [Piece(0, chunk) for chunk in chunks]


def frames(answer: Answer, reason: FinishReason) -> list[dict[str, Any]]:
    """The data of all events."""
    written: list[bytes] = [*answer.begin()]
    for piece in pieces(reason):
        written += answer.add(piece)
    return parsed([*written, *answer.end()])


def parsed(written: Iterable[bytes]) -> list[dict[str, Any]]:
    lines = [line for frame in written for line in frame.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines if "[DONE]" not in line]


def answer(endpoint: Any, model: LoadedModel, **body: Any) -> Any:
    request = endpoint.schema(model="tiny", **body)
    return endpoint.answer(request, endpoint.work(request, ServedModel("tiny", model, 0), 0.0))


def chat(model: LoadedModel) -> Any:
    options = {"include_usage": True}
    return answer(
        ChatCompletions, model, messages=[{"role": "user", "content": "Hi"}], tools=TOOLS, stream_options=options
    )


def test_chat_streams_all_parts(model: LoadedModel) -> None:
    chunks = [ChatCompletionChunk.model_validate(data) for data in frames(chat(model), "tool_calls")]
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert (
        "".join(delta.model_extra.get("reasoning_content", "") for delta in deltas if delta.model_extra)
        == "Let me think."
    )
    assert "".join(delta.content or "" for delta in deltas) == "So:"
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [(call.index, call.id) for call in calls] == [(0, "call_1"), (1, "call_2")]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(deltas) - 1) + ["tool_calls"]
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.completion_tokens_details is not None
    details = usage.prompt_tokens_details.cached_tokens, usage.completion_tokens_details.reasoning_tokens
    assert (usage.prompt_tokens, usage.completion_tokens, *details) == (9, 7, 4, 3)


def test_chat_puts_all_parts_together(model: LoadedModel) -> None:
    made = chat(model)
    frames(made, "tool_calls")
    message = ChatCompletion.model_validate(made.whole()).choices[0].message
    assert message.content == "So:"
    assert message.model_extra == {"reasoning_content": "Let me think."}
    arguments = [call.function.arguments for call in message.tool_calls or () if call.type == "function"]
    assert [json.loads(text) for text in arguments] == [{"at": "é\ud800"}, {}]


def test_streamed_chat_keeps_nothing(model: LoadedModel) -> None:
    made = answer(ChatCompletions, model, messages=[{"role": "user", "content": "Hi"}], tools=TOOLS, stream=True)
    calls = [call for data in frames(made, "tool_calls") for call in data["choices"][0]["delta"].get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    (choice,) = made.whole()["choices"]
    assert choice["message"]["content"] == ""
    assert "tool_calls" not in choice["message"]


def test_responses_give_an_item_for_each_part(model: LoadedModel) -> None:
    made = answer(Responses, model, input="Hi")
    events = [EVENT.validate_python(data) for data in frames(made, "tool_calls")]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    added = [event.item for event in events if event.type == "response.output_item.added"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    kinds = ["reasoning", "message", "function_call", "function_call"]
    assert [item.type for item in added] == [item.type for item in done] == kinds
    assert [item.id for item in added] == [item.id for item in done]
    thoughts = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert thoughts == ["Let me ", "think."]
    response = Response.model_validate(made.whole())
    assert response.status == "completed"
    assert [item.model_dump() for item in response.output] == [item.model_dump() for item in done]
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == 3


def test_reply_cut_short_is_incomplete(model: LoadedModel) -> None:
    made = answer(Responses, model, input="Hi")
    assert frames(made, "length")[-1]["type"] == "response.incomplete"
    assert made.whole()["incomplete_details"] == {"reason": "max_output_tokens"}


def test_failure_is_an_event(model: LoadedModel) -> None:
    error = ApiError(500, "it broke", code="generation_failed")
    (event,) = parsed(answer(Responses, model, input="Hi").fail(error))
    assert EVENT.validate_python(event).response.error.message == "it broke"
    (data,) = parsed(chat(model).fail(error))
    assert data["error"]["code"] == "generation_failed"


def test_history_of_responses_becomes_turns(model: LoadedModel) -> None:
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "So:"}]},
        {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "see", "arguments": '{"at": 1}'},
        {"type": "function_call_output", "call_id": "2", "output": "two"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "one"}]},
        {"type": "function_call", "call_id": "3", "name": "look", "arguments": ""},
    ]
    request = Responses.schema(model="tiny", instructions="Be brief.", input=items)  # type: ignore[call-arg]
    (messages,) = Responses.work(request, ServedModel("tiny", model, 0), 0.0).prompts  # type: ignore[arg-type]

    def call(identifier: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}

    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": "So:",
            "tool_calls": [call("1", "look", {}), call("2", "see", {"at": 1})],
        },
        {"role": "tool", "tool_call_id": "2", "name": "see", "content": "two"},
        {"role": "tool", "tool_call_id": "1", "name": "look", "content": "one"},
        {"role": "assistant", "content": None, "tool_calls": [call("3", "look", {})]},
    ]
