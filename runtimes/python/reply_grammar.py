"""One grammar for a whole reply: reasoning, tool calls and a structure, in llguidance's dialect of Lark."""

from __future__ import annotations

import json
from collections.abc import Sequence

from edgekit.errors import GenerationError
from edgekit.structure import JsonSchema, Structure

from .constraint import JSON_STYLE, Constraint, Grammar, TokenizerInfo, make_grammar
from .reasoning import THINKING_GAP, ReasoningMarks
from .tool_formats import ToolFormat
from .tools import Tool

__all__ = ["check_tools", "reply_grammar"]

_TOOLS_HINT = 'correct the schema, or set "strict": false in the function: then what can\'t be enforced is left out'
_LENIENT = {"lenient": True, "coerce_one_of": True}


def reply_grammar(
    tokenizer: TokenizerInfo,
    *,
    structure: Structure | None = None,
    thinking: ReasoningMarks | None = None,
    format: ToolFormat | None = None,
    tools: Sequence[Tool] = (),
    choice: str = "auto",
) -> Grammar:
    """Return the grammar of a reply.

    Args:
        structure: Of the answer, or None for any text.
        thinking: Marks of the reasoning that the prompt has opened, or None.
        format: Of tool calls.
        tools: Those that may be called; a call has one of the names and the arguments of its schema.
        choice: "auto": an answer or calls, maybe after some text; "required": calls; a name: one call.

    Raises:
        GenerationError: The structure is malformed, or can't be told from a call.
    """
    builder = _Builder(tokenizer)
    answer = "TEXT" if structure is None else builder.nest(structure)
    if format is not None:
        calls = builder.calls(format, tools, one=choice not in {"auto", "required"})
        if choice != "auto":
            answer = calls
        elif structure is None:
            answer = builder.text_or_calls(format, calls)
        elif not format.is_bare:
            answer = f"{answer} | {calls}"
        else:
            raise GenerationError(
                "this model's tool calls have no mark that tells them from the structure",
                hint='set tool_choice to "required" or "none", or leave out the structure',
            )
    start = f"start: {builder.thinking(thinking)} {_text(THINKING_GAP)} ({answer})" if thinking else f"start: {answer}"
    return builder.finish(start, _name(structure, tools), _TOOLS_HINT if tools else None)


def check_tools(tools: Sequence[Tool], tokenizer: TokenizerInfo) -> None:
    """Compile each tool's schema alone, so that an error names the tool.

    Raises:
        GenerationError: A schema is malformed, or holds what can't be enforced.
    """
    for tool in tools:
        schema = make_grammar(JsonSchema(_styled(tool)))
        Constraint(Grammar(schema.text, f"the parameter schema of the tool {tool.name!r}", _TOOLS_HINT), tokenizer)


class _Builder:
    """Collects rules and nested grammars."""

    def __init__(self, tokenizer: TokenizerInfo) -> None:
        self._tokenizer = tokenizer
        self._rules = ["TEXT: /(?s:.*)/"]
        self._nested: list[dict[str, object]] = []

    def nest(self, structure: Structure) -> str:
        if isinstance(structure, JsonSchema):
            schema = {**structure.schema, "x-guidance": JSON_STYLE}
            self._rules.append(f"answer: %json {json.dumps(schema)}")
            return "answer"
        text = make_grammar(structure).text
        grammars = json.loads(text)["grammars"] if text.startswith("{") else [{"lark_grammar": text}]
        self._nested += [{**grammars[0], "name": "answer"}, *grammars[1:]]
        return "@answer"

    def thinking(self, marks: ReasoningMarks) -> str:
        return self._until("thinking", marks.closing)

    def calls(self, format: ToolFormat, tools: Sequence[Tool], *, one: bool) -> str:
        """Return what a reply of calls is; `calls_rest` is it without the first opening mark."""
        for place, tool in enumerate(tools):
            head, split = tool.name if not format.key else format.head(tool.name), "" if format.key else format.split
            if format.is_bare:  # one terminal, or white space would be taken for the beginning of a text
                self._rules.append(f"HEAD_{place}: /[ \\n]{{0,2}}/ {_text(head)}")
            start = f"HEAD_{place}" if format.is_bare else _text(head)
            parts = [start, self._mark(split), f"arguments_{place}", _text(format.tail)]
            self._rules.append(f"call_{place}: {_sequence(parts)}")
            self._rules.append(f"arguments_{place}: %json {json.dumps(_styled(tool))}")
        self._rules.append("call: " + " | ".join(f"call_{place}" for place in range(len(tools))))
        body = "call" if one or not format.is_list else 'call (", " call)*'
        parts = ['"["', body, '"]"'] if format.is_list else [body]
        self._rules.append(
            "block: " + _sequence([_text(format.before), *parts, _text(format.after), self._mark(format.closing)])
        )
        opening = "" if format.is_bare else self._mark(format.opening)
        more = _sequence([_text(format.between or ""), opening, "block"])
        self._rules.append("calls_rest: block" if one or format.between is None else f"calls_rest: block ({more})*")
        self._rules.append(f"calls: {_sequence([opening, 'calls_rest'])}")
        return "calls"

    def text_or_calls(self, format: ToolFormat, calls: str) -> str:
        if not format.is_bare:
            return f"TEXT | {self._until('text_before', format.opening)} calls_rest"
        # what begins as a call must be one; anything else is text
        self._rules.append(r'OTHER_TEXT: /(?s:.*)/ & ~/\s*\{\s*"name"(?s:.*)/')
        opening = self._mark(format.opening)
        return f"OTHER_TEXT | {calls}" + (f" | {opening} {calls}" if opening.startswith("<") else "")

    def finish(self, start: str, name: str, hint: str | None) -> Grammar:
        lark = "\n".join((start, *self._rules))
        return Grammar(json.dumps({"grammars": [{"lark_grammar": lark}, *self._nested]}), name, hint or "")

    def _until(self, rule: str, mark: str) -> str:
        """Any text up to the first mark, and the mark."""
        written = self._mark(mark)
        if written.startswith("<"):
            return f"TEXT {written}"
        self._rules.append(f"{rule}[lazy]: TEXT {written}")
        return rule

    def _mark(self, mark: str) -> str:
        return self._tokenizer.mark(mark) if mark else ""


def _styled(tool: Tool) -> dict[str, object]:
    return {**tool.parameters, "x-guidance": {**JSON_STYLE, **({} if tool.strict else _LENIENT)}}


def _name(structure: Structure | None, tools: Sequence[Tool]) -> str:
    if structure is None:
        return "the grammar of the tools"
    return "the structure with the tools" if tools else "the structure"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _sequence(parts: Sequence[str]) -> str:
    return " ".join(part for part in parts if part)
