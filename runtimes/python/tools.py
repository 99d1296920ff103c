"""The functions that a model may call, as a request gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgekit.errors import GenerationError

__all__ = ["Tool", "chosen_tools", "read_tools"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_CHOICES = ("auto", "none", "required")
_NO_PARAMETERS: Mapping[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}
_EXAMPLE = 'a tool is {"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}'


@dataclass(frozen=True, slots=True)
class Tool:
    """A function: its name, the JSON schema of its arguments, and whether all of the schema must be enforceable."""

    name: str
    parameters: Mapping[str, object] = field(default_factory=lambda: _NO_PARAMETERS)
    strict: bool = True


def read_tools(definitions: Sequence[Mapping[str, object]]) -> tuple[Tool, ...]:
    """Check tools in OpenAI's form.

    Raises:
        GenerationError: One of them is malformed, or two have one name.
    """
    tools = tuple(_read_tool(definition, f"tool {place}") for place, definition in enumerate(definitions, 1))
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise GenerationError(f"two tools are called {twice!r}", hint="give each tool a name of its own")
    return tools


def chosen_tools(tools: Sequence[Tool], choice: str) -> tuple[Tool, ...]:
    """Return those tools that a choice leaves the model: all, none or one.

    Raises:
        GenerationError: The choice names no tool, or asks for a call where there is none.
    """
    if choice == "none" or (choice == "auto" and not tools):
        return ()
    if not tools:
        raise GenerationError(f"tool_choice is {choice!r}, but there are no tools", hint="give tools, or leave it out")
    if choice in _CHOICES:
        return tuple(tools)
    named = tuple(tool for tool in tools if tool.name == choice)
    if not named:
        known = ", ".join((*_CHOICES, *(tool.name for tool in tools)))
        raise GenerationError(f"tool_choice is {choice!r}, which is no tool", hint=f"expected one of: {known}")
    return named


def _read_tool(definition: object, where: str) -> Tool:
    function = definition.get("function") if isinstance(definition, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(definition, Mapping):
        raise GenerationError(f"{where} is not a function", hint=_EXAMPLE)
    if definition.get("type", "function") != "function":
        raise GenerationError(f"{where} is a {definition['type']!r}, expected a function", hint=_EXAMPLE)
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise GenerationError(
            f"the name of {where} is {name!r}", hint="expected 1 to 128 letters, digits, underscores, dots and dashes"
        )
    parameters = function.get("parameters")
    if parameters is None:
        return Tool(name, strict=function.get("strict") is not False)
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise GenerationError(f"the parameters of the tool {name!r} are not the schema of an object", hint=_EXAMPLE)
    return Tool(name, {"type": "object", **parameters}, strict=function.get("strict") is not False)
