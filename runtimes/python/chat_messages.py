"""Chat messages as a template gets them: plain copies, with tool calls in the form that the template expects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from edgekit.errors import GenerationError
from edgekit.session import ToolCall

from .tool_formats import Call, pick_tool_format

__all__ = ["add_system_tools", "copy_mapping", "copy_messages", "fit_calls"]

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_SHORT_ID = 9
_CALL_HINT = 'a call is {"id": "...", "type": "function", "function": {"name": "...", "arguments": {...}}}'


def copy_messages(messages: object) -> list[dict[str, object]]:
    """Check messages and return plain copies.

    Raises:
        GenerationError: The messages are no list, or one of them is malformed.
    """
    return [_copy_message(message, place) for place, message in enumerate(_as_list(messages))]


def fit_calls(messages: list[dict[str, object]], source: str) -> list[dict[str, object]]:
    """Fit the tool calls in copied messages to a template, given by its source.

    That of Phi-4-mini knows tools, but no calls: it gets them written into the content. Mistral's accept only ids of
    nine letters and digits: they get nine of the id's hash.
    """
    for message in messages:
        calls: Any = message.get("tool_calls")
        if calls and "<|tool|>" in source and "tool_calls" not in source:
            message["content"] = _write_calls(message, calls, source)
        if "[TOOL_CALLS]" in source and f"length != {_SHORT_ID}" in source:
            holders: list[tuple[Any, str]] = [*((call, "id") for call in calls or ()), (message, "tool_call_id")]
            for holder, key in holders:
                if isinstance(holder.get(key), str):
                    holder[key] = _short_id(holder[key])
    return messages


def add_system_tools(messages: Any, tools: object) -> list[dict[str, object]]:
    """Return messages whose system message, put first where there is none, holds the tools as JSON."""
    first = messages[0] if messages and messages[0].get("role") == "system" else None
    system = first or {"role": "system", "content": ""}
    rest = messages[1:] if first else messages
    return [{**system, "tools": json.dumps(tools, ensure_ascii=False)}, *rest]


def _short_id(identifier: str) -> str:
    if len(identifier) == _SHORT_ID and identifier.isalnum():
        return identifier
    return hashlib.sha256(identifier.encode(errors="replace")).hexdigest()[:_SHORT_ID]


def _write_calls(message: Mapping[str, object], calls: Any, source: str) -> str:
    functions = [call.get("function", call) for call in calls]
    text = pick_tool_format(source).write([Call(function["name"], function["arguments"]) for function in functions])
    content = message.get("content")
    return f"{content}{text}" if isinstance(content, str) else text


def _as_list(messages: object) -> list[object]:
    if not isinstance(messages, (list, tuple)):
        raise GenerationError(
            f"the messages are a {type(messages).__name__}, expected a list",
            hint='a conversation is a list such as [{"role": "user", "content": "Hello"}]',
        )
    return list(messages)


def _copy_message(message: object, place: int) -> dict[str, object]:
    where = f"message {place + 1}"
    hint = 'a message has a role and a content, such as {"role": "user", "content": "Hello"}'
    if not isinstance(message, Mapping):
        raise GenerationError(f"{where} is a {type(message).__name__}, expected a mapping", hint=hint)
    if not isinstance(message.get("role"), str):
        raise GenerationError(f"{where} has no role that is a text", hint=hint)
    if "content" not in message and "tool_calls" not in message:
        raise GenerationError(f"{where} has no content", hint=hint)
    if not isinstance(message.get("content"), (str, list, tuple, type(None))):
        kind = type(message["content"]).__name__
        raise GenerationError(f"the content of {where} is a {kind}, expected a text or a list of parts", hint=hint)
    plain = (
        {**message, "tool_calls": _plain_calls(message["tool_calls"], where)} if message.get("tool_calls") else message
    )
    copy = copy_mapping(plain, where)
    reasoning = next((copy[key] for key in _REASONING_KEYS if copy.get(key) is not None), None)
    # templates read it under different names; the order is seen by those that dump a message as JSON
    return copy if reasoning is None else {"thinking": reasoning, **copy, "reasoning_content": reasoning}


def _plain_calls(calls: object, where: str) -> list[Mapping[str, object]]:
    if not isinstance(calls, (list, tuple)):
        raise GenerationError(
            f"the tool calls of {where} are a {type(calls).__name__}, expected a list", hint=_CALL_HINT
        )
    return [_plain_call(call, f"tool call {place} of {where}") for place, call in enumerate(calls, 1)]


def _plain_call(call: object, where: str) -> Mapping[str, object]:
    """A call in OpenAI's form, also of a ToolCall, with arguments that are an object."""
    if isinstance(call, ToolCall):
        call = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise GenerationError(f"{where} has no function with a name", hint=_CALL_HINT)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise GenerationError(f"the arguments of {where} are not a JSON object", hint=_CALL_HINT)
    complete = {**function, "arguments": arguments}
    return {**call, "function": complete} if "function" in call else complete


def copy_mapping(value: Mapping[str, object], where: str) -> dict[str, object]:
    """Return a copy in plain JSON types, so that a template reaches no method of the caller's objects.

    Raises:
        GenerationError: It is no mapping, or holds something else; `where` says what it is.
    """
    if not isinstance(value, Mapping):
        raise GenerationError(f"{where} hold a {type(value).__name__}, expected mappings")
    return {str(key): _copy(item, where) for key, item in value.items()}


def _copy(value: object, where: str) -> object:
    if value is None or isinstance(value, bool):
        return value
    for plain in (str, int, float):
        if isinstance(value, plain):
            return value if type(value) is plain else plain(value)
    if isinstance(value, Mapping):
        return {_copy(key, where): _copy(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_copy(item, where) for item in value]
        return items if isinstance(value, list) else tuple(items)
    raise GenerationError(f"{where} holds a {type(value).__name__}, expected texts, numbers, lists and mappings")
