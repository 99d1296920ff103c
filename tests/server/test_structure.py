"""Structured output and tool calls of a model with random weights, checked by jsonschema."""

from __future__ import annotations

import json
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from edgekit.runtimes.server.api_error import ApiError
from edgekit.runtimes.server.schemas import check_schemas

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"enum": ["small", "large"]},
        "counts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "size", "counts"],
    "additionalProperties": False,
}
PLACE = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
ROOM = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
PARAMETERS: dict[str, Any] = {"weather": PLACE, "light": ROOM}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in PARAMETERS.items()
]
FLAT_TOOLS: Any = [{"type": "function", "strict": True} | tool["function"] for tool in TOOLS]
ASKED: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 1.0}
JSON_SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}


class Thing(pydantic.BaseModel):
    """What the client's own parser asks for."""

    kind: Literal["cat", "dog"]
    age: int


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stream", [False, True])
def test_reply_is_an_instance_of_the_schema(client: openai.OpenAI, seed: int, stream: bool) -> None:
    asked: Any = ASKED | {"seed": seed, "response_format": JSON_SCHEMA, "stream": stream}
    reply: Any = client.chat.completions.create(**asked)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
    else:
        assert reply.choices[0].finish_reason == "stop"
        text = reply.choices[0].message.content
    jsonschema.validate(json.loads(text), SCHEMA)


def test_json_object_is_one(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_object"}
    reply = client.chat.completions.create(**ASKED, seed=2, response_format=form, max_tokens=400).choices[0]
    assert (reply.message.content or "").startswith("{")
    if reply.finish_reason == "stop":
        assert isinstance(json.loads(reply.message.content or ""), dict)


def test_own_parser_of_the_client(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(**ASKED, seed=1, response_format=Thing, max_tokens=200).choices[0]
    assert isinstance(reply.message.parsed, Thing)


def test_responses_take_schemas(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "thing", "schema": SCHEMA, "strict": True}}
    reply = client.responses.create(model="tiny", input="Hi", temperature=1.0, text=form, extra_body={"seed": 3})
    jsonschema.validate(json.loads(reply.output_text), SCHEMA)
    assert reply.text is not None
    assert reply.text.format is not None
    assert reply.text.format.type == "json_schema"


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"enum": []}, {"$ref": "#/nowhere"}])
def test_impossible_schemas_are_refused(client: openai.OpenAI, schema: Any) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**ASKED, response_format=form, stream=stream)


LARGE: dict[str, Any] = {
    "properties": {"type": "object", "properties": {f"p{number}": {"type": "null"} for number in range(1001)}},
    "enum": {"items": {"anyOf": [{"enum": list(range(500))}, {"enum": list(range(500))}]}},
    "bytes": {"const": "x" * 65_536},
}


@pytest.mark.parametrize("name", LARGE)
def test_large_schemas_are_refused_by_name(client: openai.OpenAI, name: str) -> None:
    form: Any = {"type": "json_schema", "name": "a", "schema": LARGE[name]}
    chat_form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": LARGE[name]}}
    tool: Any = {"name": "b", "parameters": LARGE[name]}
    tools: Any = [TOOLS[0], {"type": "function", "function": tool}]
    flat_tools: Any = [FLAT_TOOLS[0], {"type": "function"} | tool]
    asked: Any = {"model": "tiny", "input": "Hi"}
    for create, options, param in (
        (client.chat.completions.create, ASKED | {"response_format": chat_form}, "response_format.json_schema.schema"),
        (client.chat.completions.create, ASKED | {"tools": tools}, "tools[1].function.parameters"),
        (client.responses.create, asked | {"text": {"format": form}}, "text.format.schema"),
        (client.responses.create, asked | {"tools": flat_tools}, "tools[1].parameters"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            create(**options)
        assert (caught.value.param, caught.value.code) == (param, "invalid_value")


def test_schemas_are_bounded_all_together() -> None:
    schema = {"enum": list(range(400))}
    check_schemas((f"tools[{place}]", schema) for place in range(2))
    with pytest.raises(ApiError, match=r"tools\[2\]: the schemas of a request"):
        check_schemas((f"tools[{place}]", schema) for place in range(3))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "light"}}])
def test_chosen_tools_are_called(client: openai.OpenAI, choice: Any, seed: int) -> None:
    asked: Any = ASKED | {"seed": seed, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    reply = client.chat.completions.create(**asked).choices[0]
    assert reply.finish_reason == "tool_calls"
    assert reply.message.content is None
    (call,) = reply.message.tool_calls or [None]
    assert call is not None
    assert call.type == "function"
    assert choice == "required" or call.function.name == "light"
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS[call.function.name])


def test_streamed_calls_are_those_of_the_reply(client: openai.OpenAI) -> None:
    asked: Any = ASKED | {"seed": 5, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    whole = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == whole.finish_reason

    def calls(message: Any) -> list[tuple[str, str]]:
        return [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]

    assert calls(final.message) == calls(whole.message) != []


def test_hidden_tools_are_not_in_the_prompt(client: openai.OpenAI) -> None:
    asked: Any = ASKED | {"max_tokens": 4}
    plain = client.chat.completions.create(**asked)
    hidden = client.chat.completions.create(**asked, tools=TOOLS, tool_choice="none")
    shown = client.chat.completions.create(**asked, tools=TOOLS)
    assert plain.usage is not None
    assert hidden.usage is not None
    assert shown.usage is not None
    assert hidden.usage.prompt_tokens == plain.usage.prompt_tokens < shown.usage.prompt_tokens


def test_results_of_calls_go_back(client: openai.OpenAI) -> None:
    asked: Any = ASKED | {"seed": 1, "tools": TOOLS, "parallel_tool_calls": False}
    called = client.chat.completions.create(**asked | {"tool_choice": "required"}).choices[0].message
    (call,) = called.tool_calls or [None]
    assert call is not None
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    messages: Any = [*ASKED["messages"], called.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(**asked | {"messages": messages, "max_tokens": 4}).choices


def test_responses_call_and_take_results(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "temperature": 1.0, "tools": FLAT_TOOLS, "parallel_tool_calls": False}
    required: Any = asked | {"tool_choice": "required", "extra_body": {"seed": 2}}
    events = list(client.responses.create(**required, input="Hi", stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    (call,) = events[-1].response.output
    jsonschema.validate(json.loads(call.arguments), PARAMETERS[call.name])
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    history: Any = [{"role": "user", "content": "Hi"}, call.model_dump(exclude_none=True), result]
    assert client.responses.create(**asked, input=history, max_output_tokens=4).output


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "auto"}}], "tools"),
        ([{"type": "custom", "custom": {"name": "a"}}], "tools[0].type"),
        ([{"type": "function", "function": {"name": "a", "parameters": []}}], "tools[0].function.parameters"),
    ],
)
def test_malformed_tools_are_named(client: openai.OpenAI, tools: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASKED, tools=tools)
    assert caught.value.param == param
