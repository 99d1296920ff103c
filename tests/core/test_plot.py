"""Charts: well-formed SVG whose shapes stand for the values, whatever names the series have."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.plot import Point, bars, lines, scatter

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</text><script>alert(1)</script>&\x00\x1b\"'"
values = st.floats(1e-6, 1e12)


def circles(text: str) -> list[tuple[float, float]]:
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in ElementTree.fromstring(text).iter(f"{SVG}circle")]


def test_bars_are_as_long_as_their_values() -> None:
    drawn = ElementTree.fromstring(bars("speeds", "tokens/s", {"a": {"x": 10.0, "y": 20.0}, "b": {"y": 5.0}}))
    lengths = [float(r.attrib["width"]) for r in drawn.iter(f"{SVG}rect") if r.attrib.get("height") == "11"]
    longest = max(lengths)
    assert sorted(round(length / longest, 3) for length in lengths if length != 11) == [0.25, 0.5, 1.0]


def test_points_lie_where_their_values_are() -> None:
    (x0, y0), (x1, y1), (x2, y2) = circles(
        lines("t", "x", "y", {"s": [Point(0, 10), Point(5, 20), Point(10, 40, low=30, high=50)]})
    )
    assert math.isclose(x1 - x0, x2 - x1, abs_tol=0.2)
    assert math.isclose(2 * (y0 - y1), y1 - y2, abs_tol=0.3)  # y grows upwards: 10, 20, 40


def test_equal_ratios_take_equal_room_on_a_logarithmic_axis() -> None:
    found = circles(lines("t", "x", "y", {"s": [Point(x, 1) for x in (16, 128, 1024)]}, log_x=True))
    assert math.isclose(found[1][0] - found[0][0], found[2][0] - found[1][0], abs_tol=0.2)


def test_names_are_shown_as_text_and_never_run() -> None:
    for text in (
        lines(HOSTILE, HOSTILE, HOSTILE, {HOSTILE: [Point(1, 1)]}),
        bars(HOSTILE, HOSTILE, {HOSTILE: {HOSTILE: 1.0}}),
        scatter(HOSTILE, HOSTILE, HOSTILE, {HOSTILE: {HOSTILE: Point(1, 1)}}),
    ):
        tree = ElementTree.fromstring(text)
        assert not list(tree.iter(f"{SVG}script"))
        assert any("<script>" in (node.text or "") for node in tree.iter(f"{SVG}text"))


@given(st.lists(st.tuples(values, values), min_size=1, max_size=20), st.booleans())
def test_every_point_is_inside_of_the_drawn_area(pairs: list[tuple[float, float]], log_x: bool) -> None:
    text = lines("t", "x", "y", {"s": [Point(x, y) for x, y in pairs]}, log_x=log_x)
    _, _, width, height = map(float, ElementTree.fromstring(text).attrib["viewBox"].split())
    found = circles(text)
    assert len(found) == len(pairs)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in found)


@pytest.mark.parametrize("points", [[], [Point(1, math.nan)], [Point(math.inf, 1)]])
def test_nothing_to_draw_is_refused(points: list[Point]) -> None:
    with pytest.raises(ValueError, match="finite"):
        lines("t", "x", "y", {"s": points})


def test_equal_ratios_take_equal_height_in_a_scatter() -> None:
    found = circles(scatter("t", "x", "y", {"s": {str(y): Point(1, y) for y in (0.001, 0.01, 0.1)}}))
    heights = sorted(y for _, y in found)
    assert math.isclose(heights[1] - heights[0], heights[2] - heights[1], abs_tol=0.2)


@given(st.lists(st.tuples(values, st.floats(0, 1e6)), min_size=1, max_size=20))
def test_every_name_in_a_scatter_is_at_its_own_place(pairs: list[tuple[float, float]]) -> None:
    text = scatter("t", "x", "y", {"s": {f"name {i}": Point(x, y) for i, (x, y) in enumerate(pairs)}})
    tree = ElementTree.fromstring(text)
    _, _, width, height = map(float, tree.attrib["viewBox"].split())
    found = circles(text)
    assert len(found) == len(pairs)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in found)
    names = [node for node in tree.iter(f"{SVG}text") if (node.text or "").startswith("name ")]
    assert len({(node.attrib["x"], node.attrib["y"]) for node in names}) == len(pairs)
