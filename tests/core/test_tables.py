"""Tables bound to dataclasses: what fits is bound as it is, all else is one line that names file and key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import TargetError
from edgekit.tables import Binder, read_toml, within

LEAST, MOST = 1_000_000, 10**12
PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    size_bytes: int = within(LEAST, MOST)
    used: bool = False


@dataclass(frozen=True, slots=True)
class Whole:
    kind: Literal["one", "two"]
    parts: tuple[Part, ...]
    numbers: tuple[int, ...] = ()
    best: Part | None = None
    by_kind: Mapping[Literal["one", "two"], Part] = field(default_factory=dict)
    rate_bytes_per_s: int = within(LEAST, MOST, default=0)
    share: float = 0.0


BINDER = Binder("file.toml", TargetError, help="see the manual")
sizes = st.integers(LEAST, MOST)
kinds = st.sampled_from(["one", "two"])
printable = st.text().filter(str.isprintable)
parts = st.builds(Part, printable, sizes, st.booleans())
wholes = st.builds(
    Whole,
    kinds,
    st.lists(parts).map(tuple),
    st.lists(st.integers()).map(tuple),
    st.none() | parts,
    st.dictionaries(kinds, parts),
    st.just(0) | sizes,
    st.floats(allow_nan=False, allow_infinity=False),
)
toml_values = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=6,
)
NAMES = ["kind", "parts", "numbers", "best", "by_kind", "rate_bytes_per_s", "share", "name", "size_bytes", "used", "x"]


def table_of(whole: Whole) -> dict[str, Any]:
    """As a TOML file would hold it: lists, and no key where there is no value."""
    values = {key: value for key, value in asdict(whole).items() if value is not None}
    return values | {"parts": list(values["parts"]), "numbers": list(values["numbers"])}


@PROPERTY
@given(wholes)
def test_what_fits_is_bound_as_it_is(whole: Whole) -> None:
    assert BINDER.bind(Whole, table_of(whole)) == whole


@PROPERTY
@given(st.dictionaries(st.sampled_from(NAMES), toml_values | st.dictionaries(st.sampled_from(NAMES), toml_values)))
def test_anything_else_is_one_line_that_names_the_file(values: dict[str, Any]) -> None:
    bound = outcome(values)
    if isinstance(bound, TargetError):
        assert bound.message.startswith("file.toml: ")
        assert bound.message.isprintable()
        assert bound.hint
    else:
        assert table_of(bound).items() >= values.items()


def outcome(values: dict[str, Any]) -> Whole | TargetError:
    try:
        return BINDER.bind(Whole, values)
    except TargetError as error:
        return error


@PROPERTY
@given(wholes, st.text(min_size=1, max_size=20).filter(lambda key: key not in NAMES))
def test_unknown_key_is_named_at_any_depth(whole: Whole, key: str) -> None:
    values = table_of(whole)
    values["parts"] = [*values["parts"], {"name": "a", "size_bytes": LEAST, key: 1}]
    with pytest.raises(TargetError, match="is not known") as caught:
        BINDER.bind(Whole, values)
    assert f"parts[{len(values['parts']) - 1}]." in caught.value.message


@pytest.mark.parametrize("key", ["kind", "parts", "parts[0].name", "parts[0].size_bytes"])
def test_missing_key_is_named(key: str) -> None:
    values: dict[str, Any] = {"kind": "one", "parts": [{"name": "a", "size_bytes": LEAST}]}
    (values["parts"][0] if "." in key else values).pop(key.rpartition(".")[2])
    with pytest.raises(TargetError, match=re.escape(f"file.toml: {key} is missing")):
        BINDER.bind(Whole, values)


@PROPERTY
@given(st.integers(-(2**63), 2**63).filter(lambda value: not LEAST <= value <= MOST))
def test_number_out_of_bounds_is_refused_and_what_is_proposed_is_in_them(value: int) -> None:
    with pytest.raises(TargetError, match="size_bytes is") as caught:
        BINDER.bind(Part, {"name": "a", "size_bytes": value})
    proposed = re.search(r"Write (\S+)$", str(caught.value.hint))
    assert bool(proposed) == (0 < value < LEAST)
    if proposed:
        assert LEAST <= int(proposed[1]) <= MOST


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, "1"])
def test_number_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(TargetError, match=r"share is [^,]*, expected a number"):
        BINDER.bind(Whole, {"kind": "one", "parts": [], "share": value})


@PROPERTY
@given(st.text(min_size=1))
def test_message_is_one_line_whatever_a_file_holds(text: str) -> None:
    assert BINDER.wrong(text * 100).message.isprintable()


def test_default_may_lie_outside_of_the_bounds() -> None:
    assert BINDER.bind(Whole, {"kind": "one", "parts": [], "rate_bytes_per_s": 0}).rate_bytes_per_s == 0


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"a = ",
        b"a = 1\na = 2",
        b"a = " + b"[" * 100_000,
        b".".join([b"a"] * 5000) + b" = 1",
        b"a = " + b"1" * 5000,
    ],
    ids=["encoding", "value", "twice", "lists", "tables", "number"],
)
def test_broken_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    with pytest.raises(TargetError, match="is not valid") as caught:
        read_toml(path, TargetError)
    assert "\n" not in caught.value.message
