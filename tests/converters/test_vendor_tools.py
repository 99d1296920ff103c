"""Vendors' tools: they are quiet, and whatever they raise is one line."""

from __future__ import annotations

import pytest

from edgekit.converters.vendor_tools import lowering
from edgekit.errors import ConversionError, SourceError
from edgekit.progress import Progress


def test_progress_is_told_at_both_ends_and_prints_are_not(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[Progress] = []
    with lowering("Acme", told.append):
        print("a vendor's chatter")
        assert [(each.done, each.total) for each in told] == [(0, 1)]
    assert [(each.stage, each.done, each.total) for each in told] == [("lower", 0, 1), ("lower", 1, 1)]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [RuntimeError("no operator\nstack"), KeyError("no operator"), AssertionError()])
def test_any_error_of_the_tools_is_one_line(error: Exception) -> None:
    line = r"^Acme's tools failed: ('?no operator'?|AssertionError)$"
    with pytest.raises(ConversionError, match=line), lowering("Acme", None):
        raise error


def test_errors_of_our_own_pass() -> None:
    with pytest.raises(SourceError, match=r"^not finite$"), lowering("Acme", None):
        raise SourceError("not finite")
