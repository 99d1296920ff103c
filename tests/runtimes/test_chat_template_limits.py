"""What a chat template may not do, and conversations that none can take: each an error of one line."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from edgekit.errors import GenerationError
from edgekit.runtimes import chat_template
from edgekit.runtimes.chat_template import ChatTemplate

SHORT_DEADLINE_S = 0.2
DEADLINE_TOLERANCE_S = 5.0
CHATML = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
USER = {"role": "user", "content": "Hello"}
Refusal = Callable[..., GenerationError]


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'a' }", "{% if x %}", "{{ x|nofilter }}", "{% unknown %}"])
def test_syntax_errors_name_the_line(source: str) -> None:
    with pytest.raises(GenerationError, match="syntax error on line 2: ") as caught:
        ChatTemplate("\n" + source)
    assert caught.value.hint


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ messages|attr('__class__') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ raise_exception }}",
        "{{ self }}",
        "{{ range }}",
        "{{ messages|map('upper') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ dict.__class__ }}",
        "{{ (messages|list).append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
    ],
)
def test_templates_cannot_reach_python(refusal: Refusal, source: str) -> None:
    refusal(source)


@pytest.mark.parametrize("tag", ["include", "import", "extends"])
def test_templates_cannot_read_files(refusal: Refusal, tag: str) -> None:
    refusal(f"{{% {tag} '/etc/passwd' {'as x ' if tag == 'import' else ''}%}}")


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ [0] * 10**10 }}",
        "{{ 10 ** (10**10) }}",
        "{{ 'a'|center(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ 'a'.zfill(10**10) }}",
        "{{ messages|tojson(indent=10**10) }}",
        "{{ [1]|batch(10**10, 0)|list }}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=['a']) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=7) %}{% for i in range(99) %}{% set ns.s = ns.s * ns.s %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s.replace('a', 'aa') %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
        "{% set s = 'a' * 10**6 %}{% for i in range(10**5) %}{{ s }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ lipsum(10**9) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
)
def test_templates_cannot_exhaust_memory(refusal: Refusal, source: str) -> None:
    refusal(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
        "{% for i in range(10**5) %}{% for j in range(10**5) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_templates_cannot_run_for_ever(refusal: Refusal, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", SHORT_DEADLINE_S)
    start = time.monotonic()
    assert "it runs for more than 0.2 seconds" in refusal(source).message
    assert time.monotonic() - start < DEADLINE_TOLERANCE_S


def test_the_deadline_is_of_one_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", SHORT_DEADLINE_S)
    template = ChatTemplate(CHATML)
    time.sleep(SHORT_DEADLINE_S)
    template.render([USER])


def test_failures_inside_a_template_are_one_line(refusal: Refusal) -> None:
    assert "UndefinedError" in refusal("{{ nothing.at.all }}").message
    assert "TypeError" in refusal("{{ 1 + 'a' }}").message
    assert len(refusal("{{ raise_exception('x' * 10000) }}").message) < 400


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hello", "the messages are a str, expected a list"),
        ({"role": "user"}, "the messages are a dict, expected a list"),
        (["hello"], "message 1 is a str, expected a mapping"),
        ([USER, {"content": "x"}], "message 2 has no role"),
        ([{"role": 3, "content": "x"}], "message 1 has no role"),
        ([{"role": "user"}], "message 1 has no content"),
        ([{"role": "user", "content": 3}], "the content of message 1 is a int"),
        ([{"role": "user", "content": [object()]}], "message 1 holds a object"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, problem: str) -> None:
    with pytest.raises(GenerationError, match=problem) as caught:
        ChatTemplate(CHATML).render(messages)
    assert caught.value.hint or "holds" in problem


def test_functions_as_tools_are_refused() -> None:
    tools: Any = [print]
    with pytest.raises(GenerationError, match="the tools hold a builtin_function"):
        ChatTemplate(CHATML).render([USER], tools=tools)
