from __future__ import annotations

from typing import Any

SUITE = "options"


def test_case(case: dict[str, Any], outcome: Any, options_of: Any) -> None:
    def accept() -> dict[str, bool]:
        options_of(case["options"])
        return {"accepted": True}

    assert outcome(accept) == case["expect"]
