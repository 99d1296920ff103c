"""Chat messages to prompt text, with the jinja2 template that comes with a model.

The variables, filters, functions and whitespace rules that a template sees are those of `apply_chat_template` in
transformers, so that the text is the same byte for byte. A template is a program from a stranger: it runs in jinja2's
sandbox, on copies of the messages, under limits of time and size.

What is not bounded: a single operation may multiply its arguments before its result is measured (a `format` width, a
`join` or `replace` of two long texts). It can cost memory in the order of the product; a MemoryError is reported like
any other failure.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from edgekit.errors import GenerationError

from .chat_messages import add_system_tools, copy_mapping, copy_messages, fit_calls

__all__ = ["ChatTemplate"]

MAX_CHARS = 16_000_000
MAX_SECONDS = 10.0

_MAX_BITS = 10_000
_MAX_MESSAGE = 300
_PRINTABLE = (str, int, float, list, tuple, dict, jinja2.Undefined, type(None))
_PADDING_FILTERS = {"batch", "center", "indent", "slice", "tojson", "truncate", "wordwrap"}
_PADDING_METHODS = {"center", "expandtabs", "ljust", "rjust", "zfill"}
_BROKEN_HINT = "the template in the bundle is broken: correct it, or generate with raw=True and a prompt you format"

_Function = TypeVar("_Function", bound=Callable[..., Any])


class ChatTemplate:
    """A compiled chat template. Safe to share between threads.

    Args:
        source: The jinja2 source, as in `chat_template` of tokenizer_config.json.
        bos_token: What the template sees under this name; None leaves it undefined.
        eos_token: Likewise.
        special_tokens: More of them by name, such as pad_token.

    Raises:
        GenerationError: The source has a syntax error or is too large to compile.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        tokens = {**(special_tokens or {}), "bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        self._sandbox = _Sandbox()
        self._source = source
        self._shows_tools = False
        self._lock = threading.Lock()
        try:
            self._template = self._sandbox.compile_template(source)
        except jinja2.TemplateSyntaxError as error:
            where = f"on line {error.lineno}: {_one_line(error.message)}"
            raise GenerationError(f"the chat template has a syntax error {where}", hint=_BROKEN_HINT) from error
        except Exception as error:
            raise _failure("cannot be compiled", error) from error

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        now: datetime | None = None,
        **variables: object,
    ) -> str:
        """Return the prompt text.

        Args:
            messages: Mappings with a text under "role", and under "content" a text, a list of parts or None. Only a
                message with "tool_calls" may lack the content.
            add_generation_prompt: End with the opening of a reply.
            tools: JSON schemas of the functions that the model may call. A template that does not show them is an error.
            now: What a template that asks for the date is told; None is the system's.
            variables: More that the template sees, such as enable_thinking.

        Raises:
            GenerationError: A message is malformed, the template refuses the conversation (the message is its own),
                or the template fails, is unsafe or exceeds a limit.
        """
        values: dict[str, Any] = {
            "documents": None,
            **self._tokens,
            **copy_mapping(variables, "the template variables"),
            "messages": fit_calls(copy_messages(messages), self._source),
            "tools": None if tools is None else [copy_mapping(tool, "the tools") for tool in tools],
            "add_generation_prompt": add_generation_prompt,
        }
        if now is not None:
            values["strftime_now"] = lambda pattern: _format_time(now, pattern)
        text = self._render(values)
        self._check_calls(values, text)
        return self._with_tools(values, text) if tools else text

    def _check_calls(self, values: dict[str, Any], text: str) -> None:
        """Make sure that tool calls in the messages have reached the prompt."""
        messages = values["messages"]
        if "tool_calls" in self._source or not any(message.get("tool_calls") for message in messages):
            return
        without = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        if "<|tool|>" not in self._source and text == self._render({**values, "messages": without}):
            raise GenerationError(
                "this model's template has no place for tool calls",
                hint="use a model that was trained on tools, or write the calls into the content",
            )

    def _with_tools(self, values: dict[str, Any], text: str) -> str:
        """Make sure that the tools have reached the prompt."""
        if self._shows_tools or text != self._render({**values, "tools": None}):
            self._shows_tools = True
            return text
        if re.search(r"""(\[['"]|\.)tools\b""", self._source):  # Phi-4-mini reads them from the system message
            moved = self._render({**values, "messages": add_system_tools(values["messages"], values["tools"])})
            if moved != text:
                return moved
        raise GenerationError(
            "this model's template takes no tools",
            hint="use a model that was trained on tools, or describe them in the prompt and set a structure",
        )

    def _render(self, values: dict[str, object]) -> str:
        try:
            with self._lock:
                return self._generate(values)
        except _RefusedError as error:
            hint = "change the roles or the order of the messages to what this model was trained on"
            raise GenerationError(
                f"the chat template refuses the conversation: {_one_line(error)}", hint=hint
            ) from error
        except SecurityError as error:
            raise GenerationError(
                f"the chat template does something that is not allowed: {_one_line(error)}",
                hint="do not trust this bundle; make it again from a checkpoint of a publisher you know",
            ) from error
        except Exception as error:
            raise _failure("failed", error) from error

    def _generate(self, values: dict[str, object]) -> str:
        self._sandbox.start()
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate(values):
            size += len(piece)
            if size > MAX_CHARS:
                raise SecurityError(f"it makes a prompt of more than {MAX_CHARS} characters")
            pieces.append(piece)
        return "".join(pieces)


class _RefusedError(jinja2.TemplateError):
    """The template called raise_exception."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment of transformers, with a deadline and a size limit for everything a template computes."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
            finalize=_refuse_objects,
            # constants would be computed while compiling, outside of the limits
            optimized=False,
        )
        self._deadline = 0.0
        self.filters["tojson"] = _to_json
        self.filters = {name: _limit_filter(name, function) for name, function in self.filters.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _DictMaker(),
            "namespace": _SafeNamespace,
        }

    def compile_template(self, source: str) -> jinja2.Template:
        if len(source) > MAX_CHARS:
            raise ValueError(f"it has more than {MAX_CHARS} characters")
        tree = _LimitInserter().visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def start(self) -> None:
        """Begin a rendering: from now on the time counts."""
        self._deadline = time.monotonic() + MAX_SECONDS

    def tick(self) -> bool:
        """Called by the template in every turn of a loop and every call."""
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it runs for more than {MAX_SECONDS:g} seconds")
        return True

    def keep(self, value: object) -> object:
        """Called by the template with every concatenation."""
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - free for keyword arguments
        __self.tick()
        if getattr(__obj, "__name__", None) in _PADDING_METHODS and isinstance(getattr(__obj, "__self__", None), str):
            _check_padding(args, kwargs)
        return _check_size(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        # these two can be far larger than their operands, so they are measured before they are made
        if operator == "*":
            _check_product(left, right)
            _check_product(right, left)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * right)
        return _check_size(super().call_binop(context, operator, left, right))

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"it reads {attribute!r} of a {type(obj).__name__}")


class _LimitInserter(NodeTransformer):
    """Puts calls of the sandbox into a parsed template where jinja2 has no hook of its own."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - jinja2's name
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_sandbox_call("tick", node.lineno), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_sandbox_call("tick", node.lineno), node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:  # noqa: N802 - as above
        self.generic_visit(node)
        return _sandbox_call("keep", node.lineno, node)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:  # noqa: N802 - as above
        self.generic_visit(node)
        # any filter measures its result, and `string` changes nothing
        node.filter = nodes.Filter(node.filter, "string", [], [], None, None, lineno=node.lineno)
        return node


class _GenerationTag(Extension):
    """Accepts `{% generation %}`, with which training marks the text of the assistant; it adds nothing."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 declares a set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _DictMaker:
    """`dict` without the class itself, whose methods could change the messages."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _SafeNamespace(Namespace):
    """`namespace` that refuses names with which Python would take it for another object."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # no named parameter, so that a template may use any name
        values = dict(*args[1:], **kwargs)
        Namespace.__init__(args[0])
        for name, value in values.items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"it sets a namespace attribute called {name!r}")
        super().__setitem__(name, value)


def _sandbox_call(method: str, line: int, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method, lineno=line), list(args), [], None, None, lineno=line)


def _limit_filter(name: str, function: _Function) -> _Function:
    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        if name in _PADDING_FILTERS:
            _check_padding(args, kwargs)
        return _check_size(function(*args, **kwargs))

    return limited  # type: ignore[return-value]  # wraps keeps its type


def _check_padding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(isinstance(value, int) and value > MAX_RANGE for value in (*args, *kwargs.values())):
        raise SecurityError(f"it asks for a width of more than {MAX_RANGE}")


def _check_size(value: Any) -> Any:
    if isinstance(value, int):
        _check_bits(value.bit_length())
    _check_product(value, 1)
    return value


def _check_product(value: object, times: object) -> None:
    if isinstance(value, (str, bytes, list, tuple, dict)) and isinstance(times, int) and len(value) * times > MAX_CHARS:
        raise SecurityError(f"it makes a value of more than {MAX_CHARS} characters or items")


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise SecurityError(f"it makes a number of more than {_MAX_BITS} bits")


def _refuse_objects(value: object) -> object:
    if not isinstance(value, _PRINTABLE):
        raise SecurityError(f"it prints a {type(value).__name__}")
    return value


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise _RefusedError(str(message))


def _strftime_now(pattern: str) -> str:
    return _format_time(datetime.now(), pattern)


def _format_time(moment: datetime, pattern: str) -> str:
    """As strftime on Unix: Windows does not know the minus that drops a leading zero."""
    return moment.strftime(re.sub(r"%%|%-([dmHIMSj])", lambda code: _number(moment, code), pattern))


def _number(moment: datetime, code: re.Match[str]) -> str:
    return str(int(moment.strftime(f"%{code[1]}"))) if code[1] else code[0]


def _failure(what: str, error: Exception) -> GenerationError:
    return GenerationError(f"the chat template {what}: {type(error).__name__}: {_one_line(error)}", hint=_BROKEN_HINT)


def _one_line(message: object) -> str:
    text = " ".join(str(message).split())
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "…"
