from __future__ import annotations

from typing import Any

from edgekit.runtimes.reasoning import ReasoningMarks, ReasoningSplitter

SUITE = "reasoning"


def test_case(case: dict[str, Any], splits: Any) -> None:
    for pieces in splits(case["reply"]):
        splitter = ReasoningSplitter(ReasoningMarks(case["opening"], case["closing"]), opened=case["opened"])
        steps = [*(splitter.push(piece) for piece in pieces), splitter.finish()]
        assert "".join(text for text, _ in steps) == case["expect"]["text"]
        assert "".join(reasoning for _, reasoning in steps) == case["expect"]["reasoning"]
