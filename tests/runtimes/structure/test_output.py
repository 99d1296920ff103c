from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from edgekit.errors import GenerationError
from edgekit.runtimes.constraint import Constraint, TokenizerInfo
from edgekit.runtimes.output import OutputParser, Piece, make_constraint, make_parser, template_tools
from edgekit.session import GenerateOptions
from edgekit.structure import Choice, JsonSchema, Regex

GET: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
    "required": ["city"],
    "additionalProperties": False,
}
GET_ALL: dict[str, Any] = {
    "$defs": {"point": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}},
    "type": "object",
    "properties": {"points": {"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 2}},
    "required": ["points"],
    "additionalProperties": False,
}
PARAMETERS: dict[str, Any] = {"get": GET, "get_all": GET_ALL, "ping": {"type": "object", "additionalProperties": False}}


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, "description": "What it does.", **({"parameters": parameters} if parameters else {})}
    return {"type": "function", "function": {**function, **more}}


TOOLS = (tool("get", GET), tool("get_all", GET_ALL), tool("ping"))
TEMPLATES = {
    "hermes": "<tool_call></tool_call>",
    "mistral": "[TOOL_CALLS] [",
    "mistral, named": "[TOOL_CALLS][ARGS]",
    "phi": "<|tool|>",
    "granite": "<|tool_call|><|start_of_role|>",
    "llama": "<|python_tag|>",
    "plain": "tools",
}
ANSWER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def taken(
    write_parsed: Callable[..., Any],
    info: TokenizerInfo,
    template: str,
    seed: int,
    start: str = "",
    prompt: str = "x",
    **options: Any,
) -> Any:
    chosen = GenerateOptions(**options)
    constraint = make_constraint(chosen, template, prompt, info)
    return write_parsed(constraint, make_parser(chosen, template, prompt, info), info, seed, start)


def check_calls(piece: Piece, least: int = 1) -> None:
    assert len(piece.tool_calls) >= least
    for call in piece.tool_calls:
        Draft202012Validator(PARAMETERS[call.name]).validate(call.arguments)
    assert len({call.id for call in piece.tool_calls}) == len(piece.tool_calls)


@pytest.mark.parametrize("name", TEMPLATES)
def test_required_gives_only_valid_calls(name: str, info: TokenizerInfo, write_parsed: Callable[..., Any]) -> None:
    seen = set()
    for seed in range(6):
        piece, complete = taken(write_parsed, info, TEMPLATES[name], seed, tools=TOOLS, tool_choice="required")
        if complete:
            check_calls(piece)
            assert (piece.text, piece.reasoning) == ("", "")
            seen |= {call.name for call in piece.tool_calls}
    assert len(seen) > 1


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("choice", PARAMETERS)
def test_a_named_tool_is_called_once(
    name: str, choice: str, byte_level: TokenizerInfo, write_parsed: Callable[..., Any]
) -> None:
    piece, complete = taken(write_parsed, byte_level, TEMPLATES[name], 1, tools=TOOLS, tool_choice=choice)
    assert complete
    check_calls(piece)
    assert [call.name for call in piece.tool_calls] == [choice]
    assert piece.text == ""


@pytest.mark.parametrize("name", TEMPLATES)
def test_auto_is_text_or_valid_calls_after_the_mark(
    name: str, info: TokenizerInfo, write_parsed: Callable[..., Any]
) -> None:
    start = {
        "hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "mistral, named": "[TOOL_CALLS]", "phi": "<|tool_call|>",
        "granite": "<|tool_call|>", "llama": '{"name"', "plain": '{"name"',
    }[name]  # fmt: skip
    for seed in range(4):
        piece, complete = taken(write_parsed, info, TEMPLATES[name], seed, start, tools=TOOLS)
        if complete:
            check_calls(piece)
            assert piece.text == ""
    free = taken(write_parsed, info, TEMPLATES[name], 3, "Hello", tools=TOOLS)
    assert free.piece.text.lstrip().startswith("Hello")


def test_text_may_come_before_the_calls_and_nothing_after(
    byte_level: TokenizerInfo, write_parsed: Callable[..., Any]
) -> None:
    piece, complete = taken(
        write_parsed, byte_level, TEMPLATES["hermes"], 0, 'ok <tool_call>\n{"name": "get"', tools=TOOLS[:1]
    )
    assert complete
    assert piece.text == "ok "
    check_calls(piece)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("choice", ["required", "auto", "get"])
def test_reasoning_that_the_prompt_opened_comes_first(
    name: str, choice: str, byte_level: TokenizerInfo, write_parsed: Callable[..., Any]
) -> None:
    piece, complete = taken(
        write_parsed, byte_level, TEMPLATES[name] + "</think>", 5, "Because.\n</think>", "<think>\n",
        tools=TOOLS, tool_choice=choice,
    )  # fmt: skip
    assert piece.reasoning == "Because."
    assert complete
    check_calls(piece, least=0 if choice == "auto" else 1)


@pytest.mark.parametrize("structure", [JsonSchema(ANSWER), Regex("\n+[ab]{2}"), Choice(("yes", "no"))])
def test_a_structure_holds_the_answer_after_the_reasoning(
    structure: Any, info: TokenizerInfo, write: Callable[..., Any], write_parsed: Callable[..., Any]
) -> None:
    for prompt, start in (("<think>\n", "Hm.</think>"), ("x", "")):
        piece, complete = taken(write_parsed, info, "</think>", 2, start, prompt, structure=structure)
        assert complete
        assert piece.reasoning.strip() == ("Hm." if start else "")
        constraint = Constraint(structure, info)
        for token in info.matching.tokenize_str(piece.text):
            constraint.accept(token)
        assert constraint.may_end


@pytest.mark.parametrize("structure", [JsonSchema(ANSWER), Regex('[{]"n": [1-9][0-9]?[}]'), Choice(('{"n": 1}',))])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in {"llama", "plain"}])
def test_with_tools_and_a_structure_a_reply_is_one_or_the_other(
    name: str, structure: Any, byte_level: TokenizerInfo, write_parsed: Callable[..., Any]
) -> None:
    kinds = set()
    for seed in range(20):
        piece, complete = taken(write_parsed, byte_level, TEMPLATES[name], seed, tools=TOOLS, structure=structure)
        if complete:
            kinds.add(bool(piece.tool_calls))
            if piece.tool_calls:
                check_calls(piece)
                assert piece.text == ""
            else:
                Draft202012Validator(ANSWER).validate(json.loads(piece.text))
    assert kinds == {True, False}


def test_without_structure_and_tools_nothing_is_constrained(byte_level: TokenizerInfo) -> None:
    for options in (GenerateOptions(), GenerateOptions(tools=TOOLS, tool_choice="none")):
        assert make_constraint(options, "<tool_call></think>", "<think>", byte_level) is None
        assert template_tools(options) is None
    assert template_tools(GenerateOptions(tools=TOOLS)) == list(TOOLS)


def test_special_marks_reach_the_parser(byte_level: TokenizerInfo) -> None:
    parser = make_parser(GenerateOptions(tools=TOOLS), "<tool_call></think>", "x", byte_level)
    assert sorted(parser.marks.values()) == ["</think>", "</tool_call>", "<think>", "<tool_call>"]
    assert all(byte_level.tokenizer.token_to_id(mark) == token for token, mark in parser.marks.items())
    assert make_parser(GenerateOptions(), None, "x", byte_level).marks == {}


def test_a_parser_without_stages_passes_text_on() -> None:
    parser = OutputParser()
    assert parser.push("<think><tool_call>") == Piece("<think><tool_call>")
    assert parser.finish() == Piece()
    assert not parser.has_calls


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tools": (tool("get"), tool("get"))}, "two tools are called 'get'"),
        ({"tools": ({"name": "get"},)}, "tool 1 is not a function"),
        ({"tools": ({"type": "retrieval", "function": {"name": "x"}},)}, "tool 1 is a 'retrieval'"),
        ({"tools": (tool("a b"),)}, "the name of tool 1 is 'a b'"),
        ({"tools": (tool("x", {"type": "array"}),)}, "not the schema of an object"),
        ({"tools": ("get",)}, "tool 1 is not a function"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": "gets"}, "which is no tool"),
        (
            {"tools": (tool("x", {"properties": {"a": {"not": {}}}}),)},
            "the parameter schema of the tool 'x' can't be used: Unimplemented keys",
        ),
        ({"structure": JsonSchema({"not": {}}), "tools": TOOLS}, "the JSON schema can't be used"),
        ({"structure": Regex("a"), "stop": ("x",)}, "stop texts and stop tokens can't be used with a structure"),
        ({"structure": Regex("a"), "stop_tokens": (3,)}, "stop texts and stop tokens"),
    ],
)
def test_bad_requests_are_one_line(options: dict[str, Any], problem: str, byte_level: TokenizerInfo) -> None:
    with pytest.raises(GenerationError, match=problem) as caught:
        make_constraint(GenerateOptions(**options), TEMPLATES["hermes"], "x", byte_level)
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("structure", [JsonSchema(ANSWER), Regex("a")])
def test_tools_for_a_raw_prompt_and_structures_beside_bare_calls_are_refused(
    structure: Any, byte_level: TokenizerInfo
) -> None:
    with pytest.raises(GenerationError, match="tools need a chat template"):
        make_constraint(GenerateOptions(tools=TOOLS), None, "x", byte_level)
    with pytest.raises(GenerationError, match="no mark that tells them"):
        make_constraint(GenerateOptions(tools=TOOLS, structure=structure), TEMPLATES["llama"], "x", byte_level)


def test_a_tool_that_is_not_strict_may_hold_what_is_not_enforced(byte_level: TokenizerInfo) -> None:
    schema = {"properties": {"a": {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}}}
    options = GenerateOptions(tools=(tool("x", schema, strict=False),), tool_choice="x")
    constraint = make_constraint(options, TEMPLATES["hermes"], "x", byte_level)
    assert constraint is not None
    assert np.isfinite(constraint.mask(np.zeros(byte_level.vocab_size, np.float32))).any()
