# ruff: noqa: E501 -- templates are written in long lines, and whitespace counts
"""Chat templates of well-known models: the text of transformers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from edgekit.errors import GenerationError
from edgekit.runtimes.chat_template import ChatTemplate

Refusal = Callable[..., GenerationError]

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

SMOLLM2 = """{% for message in messages %}{% if loop.first and message.role != 'system' %}
<|im_start|>system
You are a helpful AI assistant named SmolLM<|im_end|>
{% endif %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt -%}
<|im_start|>assistant
{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " ~ date_string ~ "\n\n" }}
{%- if tools is not none %}
    {{- "You have access to these functions:\n\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message ~ "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception("one tool call at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- elif message.role in ["tool", "ipython"] %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\n\n' ~ message['content'] | trim ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}
{% for message in loop_messages %}
{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + (content or '').strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\n' }}
{%- if message['content'] is string %}{{ message['content'] | trim }}
{%- elif message['content'] is iterable %}{% for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '<start_of_image>' }}{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}
{%- endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

PHI3 = """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' and message['content'] is string %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""

QWEN3 = """{%- if tools %}{{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' }}{{- content }}{{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ '<|assistant|>\n'  ~ message['content'] ~ eos_token }}{% endgeneration %}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

MACROS = """{%- macro show(value, depth=0) -%}
{%- if value is mapping -%}{%- for key, item in value|dictsort -%}{{ key }}:{{ show(item, depth + 1) }};{%- endfor -%}
{%- elif value is string -%}{{ value|upper|replace('A', 'b')|e }}
{%- elif value is sequence -%}{%- for item in value -%}{{ loop.index }}/{{ loop.length }}={{ show(item, depth + 1) }}{{ ", " if not loop.last }}{%- endfor -%}
{%- else -%}{{ value }}{%- endif -%}{%- endmacro -%}
{% set header %}<{{ messages|map(attribute='role')|join('>') }}>{% endset %}{{ header }}
{% for message in messages if message.role != 'tool' %}{% if loop.index > 3 %}{% break %}{% endif %}{% if not message.content %}{% continue %}{% endif %}
{{ show(message) }}{% else %}none{% endfor %}
{%- call(x) show({'a': dict(b=[1, 2.5, none, true])}) %}{% endcall %}{{ '%s|%05d' % (messages|length, 7) }}{{ 'é'|tojson }}{{ 2 ** 5 }}
{% filter trim %}  text  {% endfilter %}{{ documents is defined }}{{ unknown }}{{ pad_token }}"""

JSON_DUMP = """{% for message in messages %}{{ message | tojson(sort_keys=False) }}
{{ message|tojson(indent=2, ensure_ascii=True) }}{{ message }}
{{ message.items()|list|length }}{{ tools }}
{% endfor %}"""

RECURSIVE = """{%- for m in messages recursive %}{{ m.role if m.role else m }}
{%- if m.tool_calls %}{{ loop(m.tool_calls) }}{% endif %}{{ cycler('a', 'b').next() }}{{ loop.cycle('x', 'y') }}{{ loop.changed(m.role) }}
{%- endfor %}"""

TEMPLATES = {
    "chatml": CHATML,
    "smollm2": SMOLLM2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "llama2": LLAMA2,
    "gemma": GEMMA,
    "phi3": PHI3,
    "qwen3": QWEN3,
    "zephyr": ZEPHYR,
    "macros": MACROS,
    "json_dump": JSON_DUMP,
    "recursive": RECURSIVE,
}

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hi there!"}
SYSTEM = {"role": "system", "content": "  Be brief.\n"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <b>", "days": 2}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "single": [USER],
    "multi_turn": [USER, ASSISTANT, {"role": "user", "content": "More?"}],
    "system": [SYSTEM, USER],
    "ends_with_assistant": [SYSTEM, USER, ASSISTANT],
    "empty_content": [{"role": "user", "content": ""}],
    "unicode": [{"role": "user", "content": "你好 👩‍👩‍👧 <&>'\" \u2028 {{ bos_token }}\r\n\ttab"}],
    "parts": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What is it? "}]}],
    "tool_calls": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "sun"},
    ],
    "reasoning": [USER, {"role": "assistant", "content": "4", "thinking": "2+2"}],
    "think_tags": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}, USER],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "Il fera « beau » <&>", "parameters": {}}}
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def expected(source: str, messages: list[dict[str, Any]], **variables: Any) -> str | None:
    """The text of transformers, or None if its template fails."""
    try:
        rendered, _ = render_jinja_template([messages], chat_template=source, **TOKENS, **variables)
    except Exception:
        return None
    return str(rendered[0])


def expected_or_refused(source: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str | None:
    """None where transformers leaves out the tools or the calls in silence."""
    text = expected(source, messages, **variables)
    without = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
    drops_tools = "tools" in variables and text == expected(source, messages, **{**variables, "tools": None})
    drops_calls = without != messages and text == expected(source, without, **variables)
    return None if drops_tools or drops_calls else text


def got(source: str, messages: list[dict[str, Any]], **variables: Any) -> str | None:
    template = ChatTemplate(source, bos_token=TOKENS["bos_token"], eos_token=TOKENS["eos_token"])
    try:
        return template.render(messages, **variables)
    except GenerationError:
        return None


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(name: str, conversation: str) -> None:
    source, messages = TEMPLATES[name], CONVERSATIONS[conversation]
    for variables in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "tools": TOOLS},
        {"add_generation_prompt": True, "enable_thinking": False},
        {"add_generation_prompt": True, "date_string": "1 Jan 2026", "enable_thinking": True},
    ):
        assert got(source, messages, **variables) == expected_or_refused(source, messages, variables)


def test_most_templates_serve_most_conversations() -> None:
    served = [
        expected(source, messages, add_generation_prompt=True) is not None
        for source in TEMPLATES.values()
        for messages in CONVERSATIONS.values()
    ]
    assert sum(served) > 0.7 * len(served)


def test_text_of_a_conversation() -> None:
    text = ChatTemplate(CHATML).render([SYSTEM, USER])
    assert text == (
        "<|im_start|>system\n  Be brief.\n<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_special_tokens_are_seen_by_name_and_absent_ones_are_undefined() -> None:
    template = ChatTemplate(
        "{{ bos_token }}|{{ eos_token is defined }}|{{ pad_token }}", bos_token="<s>", special_tokens={"pad_token": "P"}
    )
    assert template.render([USER]) == "<s>|False|P"


@pytest.mark.parametrize(("day", "text"), [(5, "5 1 7 %-d 05"), (15, "15 1 7 %-d 15")])
def test_dates_without_leading_zeros_are_the_same_everywhere(day: int, text: str) -> None:
    template = ChatTemplate("{{ strftime_now('%-d %-m %-H %%-d %d') }}")
    assert template.render([USER], now=datetime(2026, 1, day, 7)) == text


def test_messages_are_not_changed(refusal: Refusal) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    refusal("{% set _ = messages[0].content.append(1) %}{{ messages.clear() }}", messages)
    refusal("{% set _ = dict.update(messages[0], role='x') %}", messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


def test_the_message_of_raise_exception_is_shown(refusal: Refusal) -> None:
    error = refusal(GEMMA, [SYSTEM, USER])
    assert error.message == "the chat template refuses the conversation: System role not supported"


def test_one_template_serves_many_threads() -> None:
    template = ChatTemplate(QWEN3)
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(template.render([SYSTEM, USER]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    assert len(set(texts)) == 1
