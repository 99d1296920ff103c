from __future__ import annotations

import json
from typing import Any

import pytest

from edgekit.runtimes.tool_calls import ToolCallParser
from edgekit.runtimes.tool_formats import pick_tool_format

SUITE = "tool_calls"


@pytest.fixture(scope="module")
def sources(conformance: Any) -> dict[str, str]:
    """The source of each template in prompts.json."""
    return {name: given["source"] for name, given in conformance("prompts.json")["templates"].items()}


def parsed(case: dict[str, Any], source: str, pieces: list[str]) -> dict[str, Any]:
    parser = ToolCallParser(pick_tool_format(source), case["functions"])
    steps = [*(parser.push(piece) for piece in pieces), parser.finish()]
    calls = [call for _, found in steps for call in found]
    assert len({call.id for call in calls if call.id}) == len(calls)
    assert parser.has_calls == bool(calls)
    shown = [{"name": call.name, "arguments": json.loads(json.dumps(call.arguments))} for call in calls]
    return {"text": "".join(text for text, _ in steps), "calls": shown}


def test_case(case: dict[str, Any], sources: dict[str, str], outcome: Any, splits: Any) -> None:
    for pieces in splits(case["reply"]):
        assert outcome(lambda pieces=pieces: parsed(case, sources[case["template"]], pieces)) == case["expect"]
