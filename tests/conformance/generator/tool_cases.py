"""tool_calls.json and reasoning.json: a reply taken apart.

The calls are written out by hand from the documentation of each family. Reference of the reasoning: the rule as README.md
states it, applied to the whole reply at once.
"""

from __future__ import annotations

import json
from typing import Any

NAMES = ["weather", "clock"]
ZURICH = {"city": "Zürich"}
CALL = {"name": "weather", "arguments": ZURICH}
CLOCK = {"name": "clock", "arguments": {}}
W, C = '{"name": "weather", "arguments": {"city": "Zürich"}}', '{"name": "clock", "arguments": {}}'
WP = W.replace("arguments", "parameters")
Row = tuple[str, str, str, list[dict[str, Any]]]


def tool_call_suite() -> dict[str, Any]:
    """The file."""
    rows = [
        (family, *row)
        for families, group in ((("qwen2.5", "qwen3", "smollm3"), _hermes()), (("mistral-v3",), _mistral()),
                                (("phi4-mini",), _phi()), (("granite3",), _granite()), (("llama3.1",), _llama()))
        for family in families
        for row in group
    ]  # fmt: skip
    cases = [
        {
            "name": f"{family}: {name}",
            "template": family,
            "functions": NAMES,
            "reply": reply,
            "expect": {"text": text, "calls": calls},
        }
        for family, name, reply, text, calls in rows
    ]
    unread = {"name": "lfm2: calls that are not JSON", "template": "lfm2", "functions": NAMES}
    call = '<|tool_call_start|>[weather(city="Zürich")]<|tool_call_end|>'
    cases.append({**unread, "reply": call, "expect": {"error": "GenerationError"}})
    return {"suite": "tool_calls", "version": 1, "cases": cases}


def _marked(opening: str, closing: str, call: str = W, clock: str = C) -> list[Row]:
    """What holds for every pair of marks around one call."""

    def put(body: str) -> str:
        return f"{opening}{body}{closing}"

    tricky = {"city": f'a "quoted" \\ {{ [ {closing.strip()} {opening.strip()} }}\n\u2028'}
    nested = {"city": "", "more": {"list": [1, -2.5, True, None, [], {}], "text": "1"}}
    unknown, broken, array = call.replace("weather", "no_such"), call[:-1], '{"name": "weather", "arguments": [1]}'
    escaped = call.replace("ü", "\\u00fc")
    return [
        ("no call", "It is fine.", "It is fine.", []),
        ("nothing", "", "", []),
        ("one call", put(call), "", [CALL]),
        ("no argument", put(clock), "", [CLOCK]),
        ("escapes", put(escaped), "", [CALL]),
        ("marks and quotes in an argument", put(_written(tricky)), "", [{"name": "weather", "arguments": tricky}]),
        ("nested arguments", put(_written(nested)), "", [{"name": "weather", "arguments": nested}]),
        ("white space in the JSON", put(call.replace(": ", " :\n ").replace("{", "{ ")), "", [CALL]),
        ("arguments written as a text", put(_as_text(ZURICH)), "", [CALL]),
        ("the other name of the arguments", put(call.replace("arguments", "parameters")), "", [CALL]),
        ("an unknown function is text", put(unknown), put(unknown), []),
        ("broken JSON is text", put(broken), put(broken), []),
        ("arguments that are no object are text", put(array), put(array), []),
        ("something else in the marks is text", put("hello"), put("hello"), []),
        ("a call that is cut is text", f"{opening}{call[:20]}", f"{opening}{call[:20]}", []),
        ("half a mark is text", f"a {opening[:4]} b", f"a {opening[:4]} b", []),
        ("half a mark at the end is text", f"a {opening[:4]}", f"a {opening[:4]}", []),
    ]


def _written(arguments: dict[str, Any]) -> str:
    return f'{{"name": "weather", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}'


def _as_text(arguments: dict[str, Any]) -> str:
    text = json.dumps(json.dumps(arguments, ensure_ascii=False), ensure_ascii=False)
    return f'{{"name": "weather", "arguments": {text}}}'


def _hermes() -> list[Row]:
    opening, closing = "<tool_call>\n", "\n</tool_call>"
    one, two = f"{opening}{W}{closing}", f"{opening}{C}{closing}"
    return [
        *_marked(opening, closing),
        ("two calls", f"{one}\n{two}", "", [CALL, CLOCK]),
        ("two calls with nothing between", f"{one}{two}", "", [CALL, CLOCK]),
        ("text before a call", f"I look it up.\n{one}", "I look it up.\n", [CALL]),
        ("white space before a call", f"\n {one}", "", [CALL]),
        ("text after a call", f"{one}\nDone", "\nDone", [CALL]),
        ("text between calls", f"{one} and {two}", " and ", [CALL, CLOCK]),
        ("a call without its closing mark", f"{opening}{W}", "", [CALL]),
        ("a broken call before a good one", f"{opening}{W[:-1]}{closing}{two}", f"{opening}{W[:-1]}{closing}", [CLOCK]),
    ]


def _mistral() -> list[Row]:
    def put(body: str) -> str:
        return f"[TOOL_CALLS] [{body}]"

    with_id = W[:-1] + ', "id": "abc123xyz"}'
    unknown = put(W.replace("weather", "no_such"))
    return [
        ("no call", "It is [fine].", "It is [fine].", []),
        ("one call", put(W), "", [CALL]),
        ("two calls", put(f"{W}, {C}"), "", [CALL, CLOCK]),
        ("a call with an id", put(with_id), "", [CALL]),
        ("text before a call", f"I look it up.{put(W)}", "I look it up.", [CALL]),
        ("an unknown function is text", unknown, unknown, []),
        ("a call that is cut is text", put(W)[:30], put(W)[:30], []),
        ("half a mark is text", "[TOOL_ no", "[TOOL_ no", []),
    ]


def _phi() -> list[Row]:
    opening, closing = "<|tool_call|>", "<|/tool_call|>"
    return [
        *_marked(f"{opening}[", f"]{closing}"),
        ("two calls", f"{opening}[{W}, {C}]{closing}", "", [CALL, CLOCK]),
        ("text before a call", f"I look it up.{opening}[{W}]{closing}", "I look it up.", [CALL]),
        ("a call without its closing mark", f"{opening}[{W}]", "", [CALL]),
    ]


def _granite() -> list[Row]:
    return [
        ("no call", "It is fine.", "It is fine.", []),
        ("one call", f"<|tool_call|>[{W}]", "", [CALL]),
        ("two calls", f"<|tool_call|>[{W}, {C}]", "", [CALL, CLOCK]),
        ("a call that is cut is text", "<|tool_call|>[{", "<|tool_call|>[{", []),
    ]


def _llama() -> list[Row]:
    cut, unknown = WP[:30], WP.replace("weather", "no_such")
    return [
        ("no call", "It is fine.", "It is fine.", []),
        ("one call", WP, "", [CALL]),
        ("after its mark", f"<|python_tag|>{WP}", "", [CALL]),
        ("the other name of the arguments", W, "", [CALL]),
        ("two calls", f"{WP}; {C.replace('arguments', 'parameters')}", "", [CALL, CLOCK]),
        ("white space before a call", f"\n\n{WP}", "", [CALL]),
        ("white space in the JSON", '{\n  "name": "weather",\n  "parameters": {"city": "Zürich"}\n}', "", [CALL]),
        ("a call amid text is text", f"Sure: {WP}", f"Sure: {WP}", []),
        ("an unknown function is text", unknown, unknown, []),
        ("a call that is cut is text", cut, cut, []),
        ("other JSON is text", '{"city": "Zürich"}', '{"city": "Zürich"}', []),
        ("a brace is text", "{", "{", []),
    ]


def reasoning_suite() -> dict[str, Any]:
    """The file."""
    marks = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
    cases = [
        _reasoning(name, opening, closing, opened, reply)
        for opening, closing in marks
        for name, opened, reply in _replies(opening, closing)
    ]
    return {"suite": "reasoning", "version": 1, "cases": cases}


def _replies(opening: str, closing: str) -> list[tuple[str, bool, str]]:
    half_open, half_close = opening[:4], closing[:4]
    return [
        ("no mark", False, "The answer."),
        ("nothing", False, ""),
        ("thought, then answer", False, f"{opening}\nI think.\n{closing}\n\nThe answer."),
        ("no new lines", False, f"{opening}I think.{closing}The answer."),
        ("an empty thought", False, f"{opening}\n\n{closing}\n\nThe answer."),
        ("white space before the mark", False, f"\n {opening}I think.{closing}The answer."),
        ("new lines within the thought stay", False, f"{opening}\n\none\n\ntwo\n\n{closing}\n\nThe answer."),
        ("spaces stay", False, f"{opening} I think. {closing} The answer. "),
        ("more than two new lines before the answer", False, f"{opening}a{closing}\n\n\n\nThe answer."),
        ("new lines at the end of the answer stay", False, f"{opening}a{closing}\nThe answer.\n\n"),
        ("marks later are text", False, f"The marks are {opening} and {closing}."),
        ("marks in the answer are text", False, f"{opening}a{closing}b {opening}c{closing}"),
        ("a closing mark without an opening one is text", False, f"a{closing}b"),
        ("half an opening mark", False, half_open),
        ("half an opening mark, then text", False, f"{half_open} no"),
        ("half a closing mark in the thought", False, f"{opening}a {half_close} b{closing}c"),
        ("the closing mark is missing", False, f"{opening}\nI think"),
        ("the closing mark is cut", False, f"{opening}I think{half_close}"),
        ("the opening mark alone", False, opening),
        ("new lines after an opening mark alone", False, f"{opening}\n\n"),
        ("no answer", False, f"{opening}I think.{closing}"),
        ("no answer but new lines", False, f"{opening}I think.{closing}\n\n"),
        ("white space alone", False, " \n"),
        ("opened by the prompt", True, f"I think.\n{closing}\n\nThe answer."),
        ("opened by the prompt, new lines first", True, f"\n\nI think.\n{closing}The answer."),
        ("opened by the prompt, never closed", True, "I think.\n"),
        ("opened by the prompt, nothing", True, ""),
        ("opened by the prompt, closed at once", True, f"{closing}The answer."),
        ("opened by the prompt, and opened again", True, f"{opening}a{closing}b"),
        ("characters of several bytes", False, f"{opening}思考 😀{closing}答え"),
        ("the mark begins again within itself", False, f"{opening}a{closing[:2]}{closing}b"),
    ]


def _reasoning(name: str, opening: str, closing: str, opened: bool, reply: str) -> dict[str, Any]:
    text, thought = reply, ""
    if opened or reply.lstrip().startswith(opening):
        rest = reply if opened else reply.lstrip().removeprefix(opening)
        thought, _, text = rest.partition(closing)
        thought = thought.strip("\n")
        text = text.removeprefix("\n").removeprefix("\n")
    given = {"name": f"{opening} {name}", "opening": opening, "closing": closing, "opened": opened, "reply": reply}
    return given | {"expect": {"text": text, "reasoning": thought}}
