"""`/v1/responses` through the `openai` client: events in OpenAI's order and types, items in and out."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.responses import ResponseCompletedEvent, ResponseIncompleteEvent

from edgekit.runtimes.engine import LoadedModel


def test_text_is_the_models(client: openai.OpenAI, model: LoadedModel) -> None:
    expected = model.generate("Hello", system="Be brief.", max_tokens=16)
    reply = client.responses.create(model="tiny", instructions="Be brief.", input="Hello", max_output_tokens=16)
    assert reply.output_text == expected.text
    assert reply.usage is not None
    assert reply.usage.output_tokens == expected.stats.new_tokens
    assert reply.status == "incomplete"
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"


def test_stop_completes(client: openai.OpenAI) -> None:
    text = client.responses.create(model="tiny", input="Hello", max_output_tokens=16).output_text
    reply = client.responses.create(
        model="tiny", input="Hello", max_output_tokens=16, extra_body={"stop": text[5:7]}, metadata={"a": "b"}
    )
    assert (reply.status, reply.error, reply.incomplete_details) == ("completed", None, None)
    assert reply.output_text == text[: text.index(text[5:7])]
    assert reply.metadata == {"a": "b"}


def test_events_come_in_order_and_add_up(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="tiny", input="Hello", max_output_tokens=12, stream=True))
    kinds = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert [kind for kind in kinds if kind != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert kinds.index("response.output_text.delta") == 4
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert isinstance(last, ResponseIncompleteEvent)
    assert "".join(deltas) == last.response.output_text
    ids = {event.item_id for event in events if event.type.startswith("response.output_text")}  # type: ignore[union-attr]
    assert ids == {last.response.output[0].id}


def test_stream_helper_of_the_client_understands_it(client: openai.OpenAI) -> None:
    text = client.responses.create(model="tiny", input="Hello", max_output_tokens=16).output_text
    with client.responses.stream(model="tiny", input="Hello", extra_body={"stop": text[5:7]}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert final.output_text == text[: text.index(text[5:7])]


def test_conversation_goes_on_with_the_output(client: openai.OpenAI, model: LoadedModel) -> None:
    first = client.responses.create(model="tiny", input="Hello", max_output_tokens=8)
    said: Any = [{"role": "user", "content": "Hello"}, *(item.model_dump() for item in first.output)]
    said.append({"type": "message", "role": "user", "content": [{"type": "input_text", "text": "And?"}]})
    second = client.responses.create(model="tiny", input=said, max_output_tokens=8)
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And?"},
    ]
    assert second.output_text == model.generate(messages, max_tokens=8).text


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "unsupported_parameter"),
        ({"store": True}, "store", "invalid_value"),
        ({"background": True}, "background", "invalid_value"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "invalid_value"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "invalid_value",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "call_1", "output": "x"}]},
            "input[0].call_id",
            "invalid_value",
        ),
    ],
)
def test_refusals_name_the_parameter(client: openai.OpenAI, options: Any, param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "tiny", "input": "Hello"} | options)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "disabled"),
        ({"truncation": "auto"}, "auto"),
        ({"context_policy": "drop-oldest-turns"}, "auto"),
        ({"truncation": "auto", "context_policy": "drop-oldest-turns"}, "auto"),
        ({"truncation": "disabled", "context_policy": "error"}, "disabled"),
        ({"truncation": "auto", "context_policy": "error"}, None),
        ({"truncation": "disabled", "context_policy": "drop-oldest-turns"}, None),
    ],
)
def test_truncation_and_context_policy_agree(client: openai.OpenAI, options: Any, told: str | None) -> None:
    asked: Any = {"model": "tiny", "input": "Hello", "max_output_tokens": 1, "extra_body": options}
    if told is None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**asked)
        assert (caught.value.param, caught.value.code) == ("truncation", "invalid_value")
    else:
        assert client.responses.create(**asked).truncation == told


def test_completed_event_is_typed(client: openai.OpenAI) -> None:
    text = client.responses.create(model="tiny", input="Hello", max_output_tokens=16).output_text
    stop = {"stop": text[5:7]}
    events = client.responses.create(model="tiny", input="Hello", stream=True, extra_body=stop)
    assert isinstance(list(events)[-1], ResponseCompletedEvent)
