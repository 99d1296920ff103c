"""prompts.json: chat messages to prompt text, in the formats of public model families.

The templates (templates/*.jinja) are EdgeKit's own, written from each family's documented prompt format. Reference: the
rendering of transformers, and, for the conversation of `documented.DOCUMENTED`, the text written out by hand, so that an
error in a template shows too.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import jinja2
from documented import DOCUMENTED, DOCUMENTED_TOOLS
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATES = Path(__file__).parent / "templates"
NOW = datetime(2026, 1, 15, 12, 30)

LLAMA3, SPM = ("<|begin_of_text|>", "<|eot_id|>"), ("<s>", "</s>")
# name: (bos_token, eos_token), whose documentation describes the format
FAMILIES: dict[str, tuple[tuple[str | None, str], str]] = {
    "chatml": ((None, "<|im_end|>"), "OpenAI's ChatML; Yi-1.5-Chat, OpenHermes 2.5 and many more"),
    "qwen2.5": ((None, "<|im_end|>"), "Qwen2.5: model cards and the documentation of function calling"),
    "qwen3": ((None, "<|im_end|>"), "Qwen3: model cards (thinking and non-thinking mode) and function calling"),
    "llama2": (SPM, "Llama 2: Meta's prompt format page"),
    "llama3": (LLAMA3, "Llama 3: Meta's prompt format page"),
    "llama3.1": (LLAMA3, "Llama 3.1, 3.2, 3.3: Meta's prompt format page, JSON based tool calling"),
    "mistral-v1": (SPM, "Mistral 7B Instruct 0.1 and 0.2: model cards, mistral-common's v1"),
    "mistral-v3": (SPM, "Mistral 7B Instruct 0.3: model card, mistral-common's v3"),
    "phi3": (("<s>", "<|endoftext|>"), "Phi-3 and Phi-3.5: model cards"),
    "phi4": (("<|endoftext|>", "<|im_end|>"), "Phi-4: model card"),
    "phi4-mini": (("<|endoftext|>", "<|endoftext|>"), "Phi-4-mini-instruct: model card, chat and tool formats"),
    "gemma2": (("<bos>", "<eos>"), "Gemma and Gemma 2: Google's formatting page"),
    "gemma3": (("<bos>", "<eos>"), "Gemma 3: Google's formatting page"),
    "smollm2": (("<|im_start|>", "<|im_end|>"), "SmolLM2 Instruct: model cards"),
    "smollm3": (("<|im_start|>", "<|im_end|>"), "SmolLM3: model card; its long default instructions are left out"),
    "deepseek-r1-distill": (("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), "DeepSeek-R1-Distill: model cards"),
    "zephyr": (SPM, "Zephyr beta, TinyLlama 1.1B Chat, StableLM 2 Zephyr: model cards"),
    "granite3": (("<|end_of_text|>", "<|end_of_text|>"), "Granite 3: IBM's prompt engineering guide"),
    "falcon3": ((None, "<|endoftext|>"), "Falcon3 Instruct: model cards"),
    "olmo2": (("<|endoftext|>", "<|endoftext|>"), "OLMo 2 Instruct: model cards"),
    "command-r": (("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"), "Command R: Cohere's prompt format page"),
    "danube3": (SPM, "H2O-Danube 2 and 3 Chat: model cards"),
    "exaone3.5": (("[BOS]", "[|endofturn|]"), "EXAONE 3.5 Instruct: model cards"),
    "vicuna": (SPM, "Vicuna 1.5: FastChat's prompt description"),
    "lfm2": (("<|startoftext|>", "<|im_end|>"), "LFM2: Liquid's chat template and tool use pages"),
}
WITH_TOOLS = ("qwen2.5", "qwen3", "llama3.1", "mistral-v3", "phi4-mini", "smollm3", "granite3", "lfm2")
WITH_TOOL_CALLS = tuple(name for name in WITH_TOOLS if name != "lfm2")  # it writes calls in Python
THINKING = ("qwen3", "smollm3", "deepseek-r1-distill")

Message = dict[str, Any]


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


SYSTEM: Message = {"role": "system", "content": "Be brief."}
UNUSUAL = "“quoted” 你好 👩\u200d👩\u200d👧 <&>'\" \u2028 {{ bos_token }} \\n\r\n\ttab e\u0301"
CONVERSATIONS: dict[str, list[Message]] = {
    "one question": [_user("Hello")],
    "system message": [SYSTEM, _user("Hello")],
    "several turns": [_user("Hello"), _assistant("Hi there!"), _user("More?")],
    "system message and several turns": [SYSTEM, _user("Hello"), _assistant("Hi there!"), _user("More?")],
    "empty content": [_user("")],
    "empty system message": [{"role": "system", "content": ""}, _user("Hello")],
    "unicode": [_user(UNUSUAL)],
    "white space around": [
        {"role": "system", "content": "\n Be brief. \n"},
        _user("  Hello\n\n"),
        _assistant(" Hi \n"),
        _user("\tMore?"),
    ],
    "many lines": [_user("def f(x):\n    return x\n\n# what is it?")],
    "text that looks like a template": [_user("{% for x in y %}{{ x }}{% endfor %}{# no #}")],
    "two questions in a row": [_user("Hello"), _user("More?")],
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Weather « now » <&>", "parameters": PARAMETERS}
CLOCK = {"name": "clock", "description": "The time", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, CLOCK)]
CALL = {"id": "abc123xyz", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CALLED: list[Message] = [
    _user("Weather in Zürich?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abc123xyz", "content": '{"degrees": 21}'},
]
TOOL_CONVERSATIONS: dict[str, list[Message]] = {
    "tools": [_user("Weather in Zürich?")],
    "tools and system message": [SYSTEM, _user("Weather in Zürich?")],
}
TOOL_CALL_CONVERSATIONS: dict[str, list[Message]] = {
    "a call and its result": CALLED,
    "an answer after a call": [SYSTEM, *CALLED, _assistant("21 degrees."), _user("Thanks")],
}
THOUGHT = "<think>\nThey greet.\n</think>\n\nHi there!"
THINKING_CONVERSATIONS: dict[str, list[Message]] = {
    "thinking of an earlier turn": [_user("Hello"), _assistant(THOUGHT), _user("More?")],
    "thinking before a call": [
        _user("Weather in Zürich?"),
        {"role": "assistant", "content": "", "reasoning_content": "I look it up.", "tool_calls": [CALL]},
        CALLED[2],
    ],
}


def suite() -> dict[str, Any]:
    """The file."""
    templates = {name: _template(name) for name in FAMILIES}
    cases = [case for name in FAMILIES for case in _cases(name, templates[name])]
    _check_documented(cases)
    return {"suite": "prompts", "version": 1, "templates": templates, "cases": cases}


def _template(name: str) -> dict[str, Any]:
    (bos_token, eos_token), documented_by = FAMILIES[name]
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    return {"documented_by": documented_by, "bos_token": bos_token, "eos_token": eos_token, "source": source}


def _cases(name: str, template: dict[str, Any]) -> list[dict[str, Any]]:
    found = [_case(name, template, title, messages) for title, messages in CONVERSATIONS.items()]
    whole = [SYSTEM, _user("Hello"), _assistant("Hi there!")]
    for messages in (whole, whole[1:]):
        title = f"no reply wanted, {len(messages)} messages"
        found.append(_case(name, template, title, messages, add_generation_prompt=False))
    if name in WITH_TOOLS:
        found += [_case(name, template, title, talk, tools=TOOLS) for title, talk in TOOL_CONVERSATIONS.items()]
        found.append(_case(name, template, "no tool", CONVERSATIONS["one question"], tools=[]))
    if name in WITH_TOOL_CALLS:
        found += [_case(name, template, title, talk, tools=TOOLS) for title, talk in TOOL_CALL_CONVERSATIONS.items()]
    found += _thinking_cases(name, template)
    if name == "zephyr":
        found.append(_case(name, template, "a role that it does not know", [*CALLED[:1], CALLED[2]]))
    if name == "llama3.1":
        found.append(
            _case(
                name, template, "a given date", CONVERSATIONS["one question"], variables={"date_string": "1 May 2025"}
            )
        )
    if name == "gemma3":
        parts = [{"type": "image"}, {"type": "text", "text": " What is it? "}]
        found.append(_case(name, template, "parts", [{"role": "user", "content": parts}]))
    return found


def _thinking_cases(name: str, template: dict[str, Any]) -> list[dict[str, Any]]:
    if name not in THINKING:
        return []
    talks = {
        key: talk for key, talk in THINKING_CONVERSATIONS.items() if name != "deepseek-r1-distill" or "call" not in key
    }
    found = [_case(name, template, title, talk) for title, talk in talks.items()]
    if name == "deepseek-r1-distill":
        return found
    for value in (True, False):
        for title in ("one question", "system message and several turns"):
            given = {"enable_thinking": value}
            found.append(_case(name, template, f"{title}, thinking {value}", CONVERSATIONS[title], variables=given))
    if name == "smollm3":
        for flag in ("/think", "/no_think"):
            talk = [{"role": "system", "content": f"Be brief. {flag}"}, _user("Hello")]
            found.append(_case(name, template, f"{flag} in the system message", talk))
    return found


def _case(
    family: str,
    template: dict[str, Any],
    title: str,
    messages: list[Message],
    *,
    tools: list[Any] | None = None,
    add_generation_prompt: bool = True,
    variables: dict[str, Any] | None = None,
) -> dict[str, Any]:
    case: dict[str, Any] = {"name": f"{family}: {title}", "template": family, "messages": messages}
    case |= {"tools": tools} if tools is not None else {}
    case |= {"add_generation_prompt": add_generation_prompt} | ({"variables": variables} if variables else {})
    case |= {"now": NOW.isoformat()} if "strftime_now" in template["source"] else {}
    return case | {"expect": _rendered(template, case)}


def _rendered(template: dict[str, Any], case: dict[str, Any]) -> dict[str, str]:
    tokens = {key: template[key] for key in ("bos_token", "eos_token") if template[key] is not None}
    variables = {**tokens, **case.get("variables", {}), "add_generation_prompt": case["add_generation_prompt"]}
    conversations, source = [case["messages"]], template["source"]
    try:
        with mock.patch("transformers.utils.chat_template_utils.datetime") as clock:  # the one way to set its date
            clock.now.return_value = NOW
            rendered, _ = render_jinja_template(conversations, case.get("tools"), chat_template=source, **variables)
    except jinja2.TemplateError:  # from raise_exception
        return {"error": "GenerationError"}
    return {"prompt": str(rendered[0])}


def _check_documented(cases: list[dict[str, Any]]) -> None:
    rendered = {case["name"]: case["expect"].get("prompt") for case in cases}
    for family in FAMILIES:
        text = rendered[f"{family}: system message and several turns"] or rendered[f"{family}: several turns"]
        if text != DOCUMENTED[family]:
            raise AssertionError(f"{family}: {text!r} is not the documented {DOCUMENTED[family]!r}")
    for family, documented in DOCUMENTED_TOOLS.items():
        text = rendered[f"{family}: a call and its result"]
        if text != documented:
            raise AssertionError(f"{family} with tools: {text!r} is not the documented {documented!r}")
