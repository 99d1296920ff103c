from __future__ import annotations

from datetime import datetime
from typing import Any

from edgekit.runtimes.chat_template import ChatTemplate

SUITE = "prompts"
LEAST_FAMILIES = 15


def test_case(case: dict[str, Any], suite: dict[str, Any], outcome: Any) -> None:
    def render() -> dict[str, str]:
        given = suite["templates"][case["template"]]
        template = ChatTemplate(given["source"], bos_token=given["bos_token"], eos_token=given["eos_token"])
        prompt = template.render(
            case["messages"],
            tools=case.get("tools"),
            add_generation_prompt=case["add_generation_prompt"],
            now=datetime.fromisoformat(case["now"]) if "now" in case else None,
            **case.get("variables", {}),
        )
        return {"prompt": prompt}

    assert outcome(render) == case["expect"]


def test_there_are_enough_families(suite: dict[str, Any]) -> None:
    assert len(suite["templates"]) >= LEAST_FAMILIES
    assert {case["template"] for case in suite["cases"]} == set(suite["templates"])
