"""The forms in which models write tool calls, and which of them a chat template uses.

A format reads calls from text, writes them, and describes them as a grammar. Arguments are JSON in all of them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from edgekit.errors import GenerationError

__all__ = ["Call", "ToolFormat", "is_inside_text", "pick_tool_format"]


class Call(NamedTuple):
    """A call as written: without an id."""

    name: str
    arguments: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls.

    Attributes:
        opening: The mark before a call; before all calls where they are a list. Where `is_bare`, it is often left out.
        closing: The mark after it; without one, calls last until the next opening mark or the end of the reply.
        before: Text between the opening mark and the first call.
        after: Text between the call and the closing mark.
        between: Text between one call, or its closing mark, and the next; None: one call only.
        key: Name of the arguments in a call that is a JSON object; empty: a call is the name, `split` and the arguments.
        split: See `key`.
        is_list: One pair of marks holds a JSON list of calls.
        is_bare: Calls stand alone, at the start of the reply, with or without the opening mark.
    """

    opening: str
    closing: str = ""
    before: str = ""
    after: str = ""
    between: str | None = "\n"
    key: str = "arguments"
    split: str = ""
    is_list: bool = False
    is_bare: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts that a tokenizer may hold as tokens of their own."""
        return tuple(mark for mark in (self.opening, self.closing, self.split) if mark)

    def write(self, calls: Sequence[Call]) -> str:
        """Return calls as the model writes them."""
        bodies = [f"{self.head(call.name)}{_to_json(call.arguments)}{self.tail}" for call in calls]
        opening = "" if self.is_bare else self.opening
        if self.is_list:
            return f"{opening}{self.before}[{', '.join(bodies)}]{self.after}{self.closing}"
        blocks = [f"{opening}{self.before}{body}{self.after}{self.closing}" for body in bodies]
        return (self.between or "").join(blocks)

    def head(self, name: str) -> str:
        """What precedes the arguments of a call, the mark `split` included."""
        return f'{{"name": {json.dumps(name)}, "{self.key}": ' if self.key else f"{name}{self.split}"

    @property
    def tail(self) -> str:
        """What follows the arguments of a call."""
        return "}" if self.key else ""

    def read(self, body: str) -> list[Call] | None:
        """Return the calls in the text between the marks, or None if it is anything else."""
        try:
            return self._read(body)
        except (ValueError, RecursionError):
            return None

    def _read(self, body: str) -> list[Call] | None:
        if not self.key:
            name, split, arguments = body.partition(self.split)
            found = _arguments(_from_json(arguments)) if split else None
            return None if found is None else [Call(name.strip(), found)]
        items: list[object] = _json_sequence(body) if self.is_bare else [_from_json(body)]
        if len(items) == 1 and isinstance(items[0], list):  # some write a list where one call is asked for
            items = items[0]
        calls = [_read_object(item) for item in items]
        return None if not calls or None in calls else [call for call in calls if call is not None]


_HERMES = ToolFormat("<tool_call>", "</tool_call>", before="\n", after="\n")
_MISTRAL = ToolFormat("[TOOL_CALLS]", before=" ", between=None, is_list=True)
_MISTRAL_NAMED = ToolFormat("[TOOL_CALLS]", between="", key="", split="[ARGS]")
_PHI = ToolFormat("<|tool_call|>", "<|/tool_call|>", between=None, is_list=True)
_GRANITE = ToolFormat("<|tool_call|>", between=None, is_list=True)
_LLAMA = ToolFormat("<|python_tag|>", between="; ", key="parameters", is_bare=True)
_PLAIN = ToolFormat("", between="\n", key="parameters", is_bare=True)
_PLAIN_ARGUMENTS = ToolFormat("", between="\n", is_bare=True)

# the first whose texts all occur in the template; None: known, and not JSON
_BY_TEMPLATE: tuple[tuple[tuple[str, ...], ToolFormat | None], ...] = (
    (("<function=", "<parameter="), None),  # Qwen3-Coder, Qwen3.5
    (("<|tool_call_start|>",), None),  # LFM2
    (("<|tool_list_start|>",), None),  # LFM2: its first templates have no calls
    (("<start_function_call>",), None),  # FunctionGemma
    (("<|tool_call>",), None),  # Gemma 4
    (("<arg_key>",), None),  # GLM 4.5
    (("<tool_call>",), _HERMES),  # Hermes, Qwen2.5, Qwen3, SmolLM3, Granite 4
    (("[TOOL_CALLS]", "[ARGS]"), _MISTRAL_NAMED),  # Ministral 3, Mistral Small 3.2
    (("[TOOL_CALLS]",), _MISTRAL),  # Mistral 7B v0.3, Nemo
    (("<|tool_call|>", "<|start_of_role|>"), _GRANITE),  # Granite 3
    (("<|tool_call|>",), _PHI),
    (("<|tool|>",), _PHI),  # Phi-4-mini: its template has no calls
    (("<|python_tag|>",), _LLAMA),
    (('"parameters": ', "<|start_header_id|>"), _LLAMA),  # Llama 3.2
    (('"arguments"',), _PLAIN_ARGUMENTS),
)


def pick_tool_format(template: str) -> ToolFormat:
    """Return the format of the calls that a chat template, in its source, shows to the model.

    A template with tools and no known marks asks for plain JSON, as those of Gemma 3 do.

    Raises:
        GenerationError: The template is of a family whose calls are not JSON.
    """
    for texts, found in _BY_TEMPLATE:
        if all(text in template for text in texts):
            if found is None:
                raise GenerationError(
                    f"this model writes its tool calls with {texts[0]}, which is not supported",
                    hint="use a model whose calls are JSON, or describe the tools in the prompt and set a structure",
                )
            return found
    return _PLAIN


def is_inside_text(body: str) -> bool:
    """Whether JSON that starts with `body` goes on inside of a string."""
    return len(re.findall(r'(?:[^"\\]|\\.)*?"', body, re.DOTALL)) % 2 == 1


def _read_object(item: object) -> Call | None:
    if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _from_json(arguments)
    found = _arguments(arguments)
    return None if found is None else Call(item["name"], found)


def _arguments(value: object) -> dict[str, object] | None:
    return value if isinstance(value, dict) else None


def _json_sequence(text: str) -> list[object]:
    """JSON values with spaces, commas or semicolons between them."""
    items, decoder, place = list[object](), _decoder(), 0
    text = re.sub(r"[\s,;]+\Z", "", text)
    while place < len(text):
        place += len(text[place:]) - len(text[place:].lstrip(" \t\r\n,;"))
        item, place = decoder.raw_decode(text, place)
        items.append(item)
    return items


def _from_json(text: str) -> object:
    return _decoder().decode(text.strip())


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """A number too large for a float becomes the largest: infinity could not be written as JSON again."""
    return min(max(float(text), -sys.float_info.max), sys.float_info.max)


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
