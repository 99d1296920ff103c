"""Size against KL as an SVG: one mark for each scheme, with its interval, on a logarithmic scale of KL."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

__all__ = ["Point", "write_scatter"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 460, 70, 150, 70, 50
COLORS = ("#1f6feb", "#b0793a", "#5f7d5a", "#8a4fa3", "#b5473c", "#444444")
LABEL_HEIGHT = 12
MARGIN = 0.06  # of the range of sizes, free at either side
_STEPS = (1, 2, 5, 10)


@dataclass(frozen=True, slots=True)
class Point:
    """One scheme. `x` in MB, `y` in nats; marks of one group share a colour."""

    label: str
    group: str
    x: float
    y: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class _Axes:
    low_x: float
    high_x: float
    low_y: int  # powers of ten
    high_y: int
    least: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.low_x) / (self.high_x - self.low_x) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (math.log10(max(value, self.least)) - self.low_y) / (self.high_y - self.low_y)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def write_scatter(
    path: Path, title: str, x_label: str, y_label: str, points: Sequence[Point], *, least: float = 1e-5
) -> None:
    """Draw the points.

    Args:
        least: Where the scale of `y` ends; what is smaller is drawn there.

    Raises:
        OSError: The file can't be written.
    """
    axes = _axes(points, least)
    groups = list(dict.fromkeys(point.group for point in points))
    colors = {group: COLORS[place % len(COLORS)] for place, group in enumerate(groups)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(10, 22, title, size=15),
        _text(10, 40, f"{y_label} (logarithmic), by {x_label}", color="#555"),
        *_legend(colors),
        *_grid(axes),
        *_marks(points, axes, colors),
    ]
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8", newline="\n")


def _axes(points: Sequence[Point], least: float) -> _Axes:
    sizes, values = [point.x for point in points], [max(point.y, least) for point in points]
    room = (max(sizes) - min(sizes) or max(sizes) or 1) * MARGIN
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return _Axes(min(sizes) - room, max(sizes) + room, low, max(high, low + 1), least)


def _grid(axes: _Axes) -> Iterator[str]:
    for power in range(axes.low_y, axes.high_y + 1):
        y = axes.y(10.0**power)
        yield f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>'
        yield _text(LEFT - 8, y + 4, f"{10.0**power:g}", anchor="end", color="#555")
    step = _round_step((axes.high_x - axes.low_x) / 6)
    for place in range(math.ceil(axes.low_x / step), math.floor(axes.high_x / step) + 1):
        x = axes.x(place * step)
        yield f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#eee"/>'
        yield _text(x, HEIGHT - BOTTOM + 18, f"{place * step:g}", anchor="middle", color="#555")


def _round_step(width: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(step * power for step in _STEPS if step * power >= width)


def _marks(points: Sequence[Point], axes: _Axes, colors: dict[str, str]) -> Iterator[str]:
    taken: list[tuple[float, float, float]] = []  # left, right and height of the labels so far
    for point in sorted(points, key=lambda point: -point.y):
        x, y, color = axes.x(point.x), axes.y(point.y), colors[point.group]
        if point.interval:
            low, high = axes.y(point.interval[0]), axes.y(point.interval[1])
            yield f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" stroke="{color}" stroke-width="1.5"/>'
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'
        left, right, place = x + 7, x + 7 + 6 * len(point.label), y + 4
        while any(left < b and a < right and abs(place - height) < LABEL_HEIGHT for a, b, height in taken):
            place += 2  # down, past the labels that are there
        taken.append((left, right, place))
        yield _text(left, place, point.label, size=11, color=color)


def _legend(colors: dict[str, str]) -> Iterator[str]:
    for place, (group, color) in enumerate(colors.items()):
        x = 10 + place * 160
        yield f'<circle cx="{x + 5}" cy="56" r="4" fill="{color}"/>'
        yield _text(x + 14, 60, group)


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", color: str = "#222") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{color}">{escape(text)}</text>'
