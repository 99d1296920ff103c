from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import GenerationError
from edgekit.runtimes.tool_calls import ToolCallParser
from edgekit.runtimes.tool_formats import Call, ToolFormat, pick_tool_format

TEMPLATES = {
    "hermes": "{% if tools %}answer in <tool_call>{json}</tool_call>{% endif %}",
    "mistral": "[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS] [TOOL_CALLS] [",
    "mistral, named": "[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}",
    "phi": "<|tool|>{{ message['tools'] }}<|/tool|>",
    "granite": "<|start_of_role|>available_tools<|end_of_role|> <|tool_call|>",
    "llama": '<|start_header_id|> {"name": function, "parameters": x} <|python_tag|>',
    "plain": "<start_of_turn>{{ tools }}",
}
FORMATS = {name: pick_tool_format(template) for name, template in TEMPLATES.items()}
MARKED = [name for name, format in FORMATS.items() if not format.is_bare]
NAMES = ("get_weather", "add", "x.y-z")
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
marks_in_texts = st.sampled_from(
    ["</tool_call>", "<tool_call>", '"', "\\", "[TOOL_CALLS]", "[ARGS]", "}", '\\"]', "<|/tool_call|>"]
)
arguments = st.dictionaries(
    st.one_of(st.text(max_size=5), marks_in_texts), st.one_of(json_values, marks_in_texts), max_size=3
)
calls = st.lists(st.builds(Call, st.sampled_from(NAMES), arguments), min_size=1, max_size=3)


def parse(format: ToolFormat, text: str, size: int = 10**6) -> tuple[str, list[Call]]:
    parser, shown, found = ToolCallParser(format, NAMES), "", []
    parts = [parser.push(text[place : place + size]) for place in range(0, len(text), size)] + [parser.finish()]
    for piece, made in parts:
        shown += piece
        found += [Call(call.name, call.arguments) for call in made]
        assert all(re.fullmatch(r"call_[0-9a-f]{24}", call.id) for call in made)
    assert parser.has_calls == bool(found)
    return shown, found


@pytest.mark.parametrize("name", FORMATS)
@given(calls=calls, size=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_what_a_format_writes_is_read_back_from_any_pieces(name: str, calls: list[Call], size: int) -> None:
    assert parse(FORMATS[name], FORMATS[name].write(calls), size) == ("", calls)


@pytest.mark.parametrize("name", MARKED)
@given(calls=calls, size=st.integers(1, 9), before=st.text("ab <[tol_c\n好", min_size=1).filter(str.strip))
@settings(max_examples=40, deadline=None)
def test_text_before_calls_is_shown(name: str, calls: list[Call], size: int, before: str) -> None:
    assert parse(FORMATS[name], before + FORMATS[name].write(calls), size) == (before, calls)


@pytest.mark.parametrize("name", FORMATS)
@given(text=st.lists(st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", '{"name": "add", "arguments": ', "<", "tool", "<|tool_call|>",
     '{"name": "no"}', "{", "}", '"', " ", "\n", "a", "[", "]", "; ", '{"name": "add", "parameters": {}}', "<|python_tag|>"]
), max_size=9).map("".join), size=st.integers(1, 5))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_no_text_is_lost_where_there_is_no_call(name: str, text: str, size: int) -> None:
    shown, found = parse(FORMATS[name], text, size)
    assert (shown, found) == parse(FORMATS[name], text)
    if not found:
        assert shown == text


@pytest.mark.parametrize(
    ("name", "text", "shown", "found"),
    [
        ("hermes", 'Sure.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "Sure.\n", 1),
        ("hermes", '<tool_call>{"arguments":{"a":1},"name":"add"}</tool_call>\n', "", 1),
        ("hermes", '<tool_call>\n{"name": "add", "arguments": {}}', "", 1),
        ("hermes", '<tool_call>\n{"name": "add", "arguments": "{\\"a\\": 2}"}\n</tool_call>', "", 1),
        ("hermes", '<tool_call>{"name": "add"}</tool_call> ok <tool_call>{"name": "add"}</tool_call>', " ok ", 2),
        ("hermes", "<tool_call>\n{bad}\n</tool_call>x", "<tool_call>\n{bad}\n</tool_call>x", 0),
        ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', None, 0),
        ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', None, 0),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', None, 0),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a', None, 0),
        ("hermes", "<tool_call>" + "[" * 99999, None, 0),
        (
            "hermes",
            '<tool_call>{"name": "add, }</tool_call><tool_call>{"name": "add", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "add, }</tool_call>',
            1,
        ),
        ("hermes", "a <tool", None, 0),
        ("hermes", "  \n", None, 0),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {}, "id": "abcdefghi"}]', "", 1),
        ("mistral", '[TOOL_CALLS] {"name": "add", "arguments": {}}', "", 1),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {}}] and', None, 0),
        ("mistral, named", "[TOOL_CALLS]add[ARGS]{}[TOOL_CALLS]add[ARGS]{}", "", 2),
        ("mistral, named", "[TOOL_CALLS]add{}", None, 0),
        ("phi", '<|tool_call|>[{"name": "add", "arguments": {}}, {"name": "add", "arguments": {}}]<|/tool_call|>', "", 2),
        ("llama", '<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", 1),
        ("llama", '{"type": "function", "name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {}}', "", 2),
        ("llama", '{"answer": 42}', None, 0),
        ("llama", 'See {"name": "add", "parameters": {}}', None, 0),
        ("llama", "<|python_tag|>print(1)", None, 0),
        ("plain", '\n{"name": "add", "parameters": {}}\n', "", 1),
    ],
)  # fmt: skip
def test_calls_and_what_is_none(name: str, text: str, shown: str | None, found: int) -> None:
    for size in (1, 4, 10**6) if len(text) < 1000 else (10**6,):
        got, made = parse(FORMATS[name], text, size)
        assert (got, len(made)) == (text if shown is None else shown, found)


def test_free_json_is_shown_as_soon_as_it_is_known_to_be_no_call() -> None:
    parser = ToolCallParser(FORMATS["llama"], NAMES)
    assert parser.push('{"na') == ("", ())
    assert parser.push("tion") == ('{"nation', ())
    assert parser.push('": 1}') == ('": 1}', ())


def test_a_number_too_large_can_be_written_as_json_again() -> None:
    _, found = parse(FORMATS["hermes"], '<tool_call>{"name": "add", "arguments": {"a": -1e999}}</tool_call>')
    assert json.loads(json.dumps(found[0].arguments, allow_nan=False))["a"] < -1e308


@pytest.mark.parametrize("template", ["<function=f><parameter=p>", "<|tool_call_start|>[f()]", "<|tool_call>call:f{}"])
def test_calls_that_are_not_json_are_an_error(template: str) -> None:
    with pytest.raises(GenerationError, match="not supported") as caught:
        pick_tool_format(template)
    assert caught.value.hint


def test_formats_are_those_of_the_families() -> None:
    picked: dict[str, Any] = {name: (format.opening, format.key, format.is_list) for name, format in FORMATS.items()}
    assert picked == {
        "hermes": ("<tool_call>", "arguments", False),
        "mistral": ("[TOOL_CALLS]", "arguments", True),
        "mistral, named": ("[TOOL_CALLS]", "", False),
        "phi": ("<|tool_call|>", "arguments", True),
        "granite": ("<|tool_call|>", "arguments", True),
        "llama": ("<|python_tag|>", "parameters", False),
        "plain": ("", "parameters", False),
    }
