# ruff: noqa: E501 -- templates are written in long lines, and whitespace counts
from __future__ import annotations

import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from edgekit.errors import GenerationError
from edgekit.runtimes.chat_template import ChatTemplate
from edgekit.runtimes.tool_calls import ToolCallParser
from edgekit.runtimes.tool_formats import pick_tool_format
from edgekit.session import ToolCall

HERMES = """{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call them inside <tool_call></tool_call><|end|>{% endif %}
{%- for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}
{%- for c in m.tool_calls or [] %}
{%- if not loop.first %}{{ '\n' }}{% endif %}
{{- '<tool_call>\n{"name": "' ~ c.function.name ~ '", "arguments": ' ~ (c.function.arguments | tojson) ~ '}\n</tool_call>' }}
{%- endfor %}<|end|>{% endfor %}"""
LLAMA = """{%- for tool in tools or [] %}{{ tool | tojson(indent=4) }}{% endfor %}
{%- for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>
{%- if m.tool_calls %}{{ '{"name": "' ~ m.tool_calls[0].function.name ~ '", ' }}{{ '"parameters": ' ~ (m.tool_calls[0].function.arguments | tojson) }}}
{%- else %}{{ m.content }}{% endif %}<|eot_id|>{% endfor %}"""
MISTRAL = """{{- '[AVAILABLE_TOOLS]' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' if tools else '' }}
{%- for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]
{%- elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}
{%- if c.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}
{{- (c.function | tojson)[:-1] ~ ', "id": "' ~ c.id ~ '"}' }}{{ ', ' if not loop.last }}{% endfor %}]
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}
{{- '[TOOL_RESULTS]' ~ m.tool_call_id ~ m.content }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}"""
PHI = """{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}
{%- if m.role == 'system' and 'tools' in m and m['tools'] is not none %}{{ '<|tool|>' + m['tools'] + '<|/tool|>' }}{% endif %}
{{- '<|end|>' }}{% endfor %}"""
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "phi": PHI}

USER = {"role": "user", "content": "How warm is it in Zürich?"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ARGUMENTS: dict[str, Any] = {"city": "Zürich <b>", "days": 2, "deep": {"x": [None, True]}}
CALL_ID = "call_0123456789abcdef01234567"


def conversation(arguments: Any, **more: Any) -> list[dict[str, Any]]:
    function = {"name": "weather", "arguments": arguments}
    call = {"id": CALL_ID, "type": "function", "function": function}
    result = {"role": "tool", "tool_call_id": CALL_ID, "content": "21 °C"}
    return [USER, {"role": "assistant", "content": None, "tool_calls": [call], **more}, result]


def reference(source: str, messages: list[dict[str, Any]], tools: Any = None) -> str:
    texts, _ = render_jinja_template([messages], tools=tools, chat_template=source)
    return str(texts[0])


@pytest.mark.parametrize("name", ["hermes", "llama"])
def test_calls_are_rendered_as_by_transformers_however_they_are_given(name: str) -> None:
    source = TEMPLATES[name]
    expected = reference(source, conversation(ARGUMENTS), TOOLS)
    objects = conversation(None)
    objects[1]["tool_calls"] = [ToolCall(CALL_ID, "weather", ARGUMENTS)]
    template = ChatTemplate(source)
    for messages in (conversation(ARGUMENTS), conversation(json.dumps(ARGUMENTS)), objects):
        assert template.render(messages, tools=TOOLS) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_writes_for_a_call_is_read_as_that_call(name: str) -> None:
    text = ChatTemplate(TEMPLATES[name]).render(conversation(json.dumps(ARGUMENTS))[:2], tools=TOOLS)
    format = pick_tool_format(TEMPLATES[name])
    start = (
        text.index('{"name": "weather", "parameters"')
        if format.is_bare
        else text.index(format.opening, text.index(USER["content"]))
    )
    parser = ToolCallParser(format, {"weather"})
    found = [call for part in (parser.push(text[start:].split("<|e")[0]), parser.finish()) for call in part[1]]
    assert [(call.name, call.arguments) for call in found] == [("weather", ARGUMENTS)]


def test_no_arguments_may_be_an_empty_text() -> None:
    assert '"arguments": {}' in ChatTemplate(HERMES).render(conversation(""))


def test_mistral_gets_ids_of_nine_letters_that_agree() -> None:
    text = ChatTemplate(MISTRAL).render(conversation("{}"))
    short = text.split('"id": "')[1][:9]
    assert short.isalnum()
    assert f"[TOOL_RESULTS]{short}21 °C" in text
    kept = conversation("{}")
    kept[1]["tool_calls"][0]["id"] = kept[2]["tool_call_id"] = "abcDEF123"
    assert ChatTemplate(MISTRAL).render(kept) == reference(
        MISTRAL,
        [
            USER,
            {**kept[1], "tool_calls": [{**kept[1]["tool_calls"][0], "function": {"name": "weather", "arguments": {}}}]},
            kept[2],
        ],
    )


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_tools_reach_a_template_that_reads_them_from_the_system_message(system: list[dict[str, Any]]) -> None:
    text = ChatTemplate(PHI).render([*system, USER], tools=TOOLS)
    content = system[0]["content"] if system else ""
    assert text == reference(PHI, [{"role": "system", "content": content, "tools": json.dumps(TOOLS)}, USER])


def test_calls_are_written_into_the_content_for_a_template_that_knows_only_tools() -> None:
    text = ChatTemplate(PHI).render(conversation({"a": 1}, content="Wait."), tools=TOOLS)
    assert '<|assistant|>Wait.<|tool_call|>[{"name": "weather", "arguments": {"a": 1}}]<|/tool_call|><|end|>' in text


@pytest.mark.parametrize("source", [CHATML, "{{ messages[0].content }}{{ 'tools' }}"])
def test_a_template_that_ignores_tools_is_an_error(source: str) -> None:
    with pytest.raises(GenerationError, match="this model's template takes no tools") as caught:
        ChatTemplate(source).render([USER], tools=TOOLS)
    assert caught.value.hint
    assert ChatTemplate(source).render([USER], tools=[]) == reference(source, [USER])


def test_a_template_without_calls_is_an_error_where_there_are_some() -> None:
    with pytest.raises(GenerationError, match="no place for tool calls"):
        ChatTemplate(CHATML).render(conversation({}, content=""))


@pytest.mark.parametrize(
    ("calls", "problem"),
    [
        ("weather", "the tool calls of message 2 are a str"),
        (["weather"], "tool call 1 of message 2 has no function with a name"),
        ([{"function": {"arguments": "{}"}}], "has no function with a name"),
        (
            [{"function": {"name": "x", "arguments": "{"}}],
            "the arguments of tool call 1 of message 2 are not a JSON object",
        ),
        ([{"function": {"name": "x", "arguments": "[1]"}}], "not a JSON object"),
        ([{"function": {"name": "x", "arguments": "[" * 99999}}], "not a JSON object"),
        ([{"function": {"name": "x"}}], "not a JSON object"),
    ],
)
def test_malformed_calls_are_refused(calls: Any, problem: str) -> None:
    with pytest.raises(GenerationError, match=problem) as caught:
        ChatTemplate(HERMES).render([USER, {"role": "assistant", "content": None, "tool_calls": calls}])
    assert caught.value.hint
