"""What a reply may be and how it is taken apart: the stages between tokens and a caller's chunks.

The order of a reply is: reasoning, if the prompt opened it or the model starts with it; then the answer or tool calls.
A structure holds the answer. Where the prompt does not open the reasoning, a structure begins with the first token: the
model then answers without thinking.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from edgekit.errors import GenerationError
from edgekit.session import GenerateOptions, ToolCall

from .constraint import Constraint, TokenizerInfo
from .reasoning import ReasoningMarks, ReasoningSplitter, is_thinking_open, reasoning_marks
from .reply_grammar import check_tools, reply_grammar
from .tool_calls import ToolCallParser
from .tool_formats import ToolFormat, pick_tool_format
from .tools import Tool, chosen_tools, read_tools

__all__ = ["OutputParser", "Piece", "make_constraint", "make_parser", "template_tools"]


class Piece(NamedTuple):
    """What of a reply can be shown."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class OutputParser:
    """Takes a streamed reply apart into answer, reasoning and tool calls.

    Args:
        calls: None where there are no tools.
        splitter: None where the model's template knows no reasoning.
        marks: Texts of special tokens, by token, that must reach `push` although detokenizing leaves them out.
    """

    def __init__(
        self,
        calls: ToolCallParser | None = None,
        splitter: ReasoningSplitter | None = None,
        marks: Mapping[int, str] | None = None,
    ) -> None:
        self._calls = calls
        self._splitter = splitter
        self.marks = dict(marks or {})

    @property
    def has_calls(self) -> bool:
        """Whether there was a call: then the finish reason is `tool_calls` instead of `stop`."""
        return self._calls is not None and self._calls.has_calls

    def push(self, text: str) -> Piece:
        """Add a piece of the reply."""
        answer, reasoning = self._splitter.push(text) if self._splitter else (text, "")
        if self._calls is None or not answer:
            return Piece(answer, reasoning)
        shown, calls = self._calls.push(answer)
        return Piece(shown, reasoning, calls)

    def finish(self) -> Piece:
        """Return what was held back. Marks that are not complete are text."""
        answer, reasoning = self._splitter.finish() if self._splitter else ("", "")
        if self._calls is None:
            return Piece(answer, reasoning)
        before, early = self._calls.push(answer)
        rest, late = self._calls.finish()
        return Piece(before + rest, reasoning, early + late)


def template_tools(options: GenerateOptions) -> list[Mapping[str, object]] | None:
    """Return the tools that the chat template shall show, or None.

    Raises:
        GenerationError: A tool is malformed, or the choice is none of them.
    """
    chosen = chosen_tools(read_tools(options.tools), options.tool_choice)
    return list(options.tools) if chosen else None


def make_parser(options: GenerateOptions, template: str | None, prompt: str, tokenizer: TokenizerInfo) -> OutputParser:
    """Return the parser of one reply.

    Args:
        options: Reads `tools` and `tool_choice`.
        template: Source of the chat template that wrote the prompt; None for raw prompts.
        prompt: What it wrote.
        tokenizer: Of the model.

    Raises:
        GenerationError: As `template_tools`; or the model's calls can't be read.
    """
    tools, format = _tools(options, template)
    marks = reasoning_marks(template)
    splitter = ReasoningSplitter(marks, opened=is_thinking_open(marks, prompt)) if marks else None
    calls = ToolCallParser(format, {tool.name for tool in tools}) if format else None
    return OutputParser(calls, splitter, tokenizer.hidden_marks((*(marks or ()), *(format.marks if format else ()))))


def make_constraint(
    options: GenerateOptions, template: str | None, prompt: str, tokenizer: TokenizerInfo
) -> Constraint | None:
    """Return what holds one reply to its structure and tools, or None where anything goes.

    Takes the arguments of `make_parser`, and reads `structure`, `stop`, `stop_tokens` and `min_tokens` too. With tools
    and a structure a reply is either calls or an instance.

    Raises:
        GenerationError: As `make_parser`; the structure or a tool's schema is malformed or not supported; or an
            option would end the reply inside of a structure, or not at its end.
    """
    tools, format = _tools(options, template)
    if options.structure is None and not tools:
        return None
    stops = bool(options.stop) or not set(options.stop_tokens) <= set(tokenizer.end_tokens)
    if options.structure is not None and stops:
        raise GenerationError(
            "stop texts and stop tokens can't be used with a structure: they would cut it",
            hint="leave them out: the reply ends where the structure is complete",
        )
    if options.structure is not None and options.min_tokens:
        raise GenerationError(
            "min_tokens can't be used with a structure: the reply ends where the structure is complete",
            hint="leave it out, or give the structure a least length",
        )
    thinking = _open_thinking(template, prompt)
    if not tools and thinking is None and options.structure is not None:
        return Constraint(options.structure, tokenizer)
    if options.structure is not None:
        Constraint(options.structure, tokenizer).close()  # an error shall name the structure, not what it is part of
    check_tools(tools, tokenizer)
    grammar = reply_grammar(
        tokenizer,
        structure=options.structure,
        thinking=thinking,
        format=format,
        tools=tools,
        choice=options.tool_choice,
    )
    return Constraint(grammar, tokenizer)


def _open_thinking(template: str | None, prompt: str) -> ReasoningMarks | None:
    marks = reasoning_marks(template)
    return marks if is_thinking_open(marks, prompt) else None


def _tools(options: GenerateOptions, template: str | None) -> tuple[tuple[Tool, ...], ToolFormat | None]:
    tools = chosen_tools(read_tools(options.tools), options.tool_choice)
    if not tools:
        return (), None
    if template is None:
        raise GenerationError(
            "tools need a chat template, which this prompt does not go through",
            hint="leave out raw and give messages, or leave out the tools",
        )
    return tools, pick_tool_format(template)
