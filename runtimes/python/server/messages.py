"""Chat messages as `/v1/chat/completions` takes them, and as chat templates want them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from edgekit.session import Message

from .api_error import ApiError
from .schemas import Strict

__all__ = ["AnyMessage", "parse_arguments", "to_template"]


class TextPart(Strict):
    """A part of a content. Images and audio are not supported."""

    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class _Named(Strict):
    name: str | None = None


class InstructionMessage(_Named):
    """What the model should heed."""

    role: Literal["system", "developer"]
    content: Content


class UserMessage(_Named):
    """What the user says."""

    role: Literal["user"]
    content: Content


class CalledFunction(Strict):
    """A call in the history. `arguments` is JSON in a text."""

    name: str
    arguments: str


class CallInHistory(Strict):
    """A call that the model made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # clients that add up deltas leave it


class AssistantMessage(_Named):
    """What the model said. The last three fields are null in replies, and clients send replies back."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[CallInHistory] | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)


class ToolMessage(Strict):
    """What a tool answered."""

    role: Literal["tool"]
    tool_call_id: str
    content: Content
    name: str | None = None


AnyMessage = Annotated[InstructionMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def to_template(messages: list[AnyMessage]) -> list[Message]:
    """The messages in the form of chat templates: texts, and arguments that are objects.

    Raises:
        ApiError: Arguments are not a JSON object.
    """
    names = dict[str, str]()
    converted = list[Message]()
    for place, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        new: dict[str, Any] = {"role": role, "content": _text(message.content)}
        if message.name is not None:
            new["name"] = message.name
        if isinstance(message, AssistantMessage):
            _add_calls(new, message, f"messages[{place}]")
            names |= {call.id: call.function.name for call in message.tool_calls or ()}
        elif isinstance(message, ToolMessage):
            new["tool_call_id"] = message.tool_call_id
            if message.tool_call_id in names:
                new.setdefault("name", names[message.tool_call_id])  # several templates print it
        converted.append(new)
    return converted


def _add_calls(new: dict[str, Any], message: AssistantMessage, where: str) -> None:
    if message.reasoning_content is not None:
        new["reasoning_content"] = message.reasoning_content
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {
                "name": call.function.name,
                "arguments": parse_arguments(
                    call.function.arguments, f"{where}.tool_calls[{index}].function.arguments"
                ),
            },
        }
        for index, call in enumerate(message.tool_calls or ())
    ]
    if calls:
        new["tool_calls"] = calls
    elif message.content is None:
        message_text = f"{where} has neither content nor tool_calls"
        raise ApiError(400, message_text, code="missing_required_parameter", param=f"{where}.content")


def parse_arguments(text: str, param: str) -> dict[str, Any]:
    """A call's arguments.

    Raises:
        ApiError: They are not a JSON object.
    """
    try:
        arguments = json.loads(text or "{}")
    except ValueError:
        arguments = None
    except RecursionError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(400, f"{param} is not a JSON object in a text", code="invalid_value", param=param)
    return arguments


def _text(content: Content | None) -> str | None:
    if content is None or isinstance(content, str):
        return content
    return "\n".join(part.text for part in content)
