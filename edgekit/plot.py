"""Charts as SVG text: nothing to install, nothing to fetch, and one file that shows everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

__all__ = ["Point", "bars", "lines", "scatter"]

COLORS = ("#1f6feb", "#8bb8f8", "#b0793a", "#e0bd90", "#5f7d5a", "#b5cdb0")
WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 760, 130, 50, 13, 16, 64
LEGEND_COLUMNS, LEGEND_STEP = 3, 18
# Of a chart with two axes: the room beside and below the drawn area, and its height.
AXIS_LEFT, AXIS_RIGHT, AXIS_BOTTOM, AREA_HEIGHT = 70, 30, 50, 260
TICKS = 6
# Of a chart with names beside its points: room for the last name, and how much room a name takes.
SCATTER_HEIGHT, NAMES_RIGHT, LETTER_WIDTH, NAME_HEIGHT = 400, 150, 5.4, 11


@dataclass(frozen=True, slots=True)
class Point:
    """A measured value `y` at `x`, and the range from `low` to `high` that it varied in, where that is known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def bars(title: str, unit: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """One horizontal bar for each series of each group; a series keeps its colour, and an absent one its place free."""
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    most = max(value for values in groups.values() for value in values.values())
    step = len(series) * BAR + GAP
    y = _below_legend(series)
    height = y + step * len(groups) + 10
    parts = _opening(height, title, unit, series)
    for group, values in groups.items():
        parts.append(_text(LEFT - 8, y + len(series) * BAR // 2 + 4, group, anchor="end"))
        for place, name in enumerate(series):
            if name not in values:
                continue
            length, top = (WIDTH - LEFT - RIGHT) * values[name] / (most or 1), y + place * BAR
            parts.append(f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR - 2}" fill="{_color(place)}"/>')
            parts.append(_text(LEFT + length + 4, top + 10, f"{values[name]:.0f}", size=10))
        y += step
    return "\n".join([*parts, "</svg>\n"])


def lines(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[Point]],
    *,
    joined: bool = True,
    log_x: bool = False,
) -> str:
    """Points of each series over a common x axis, joined by lines or not; ranges are drawn as thin vertical strokes.

    Args:
        log_x: Equal ratios of x take equal room; every x must then be over 0.

    Raises:
        ValueError: There is no point, or one is not finite.
    """
    points = [point for values in series.values() for point in values]
    if not points or not all(math.isfinite(value) for point in points for value in (point.x, point.y)):
        raise ValueError("a chart needs points with finite numbers")
    top = _below_legend(list(series))
    area = _Area.around(points, top, log_x)
    parts = _opening(top + AREA_HEIGHT + AXIS_BOTTOM, title, y_label, list(series))
    parts += [*area.axes(), _text((AXIS_LEFT + WIDTH) / 2, top + AREA_HEIGHT + 40, x_label, anchor="middle")]
    for place, values in enumerate(series.values()):
        parts += _drawn(sorted(values, key=lambda point: point.x), area, _color(place), joined)
    return "\n".join([*parts, "</svg>\n"])


def scatter(
    title: str, x_label: str, y_label: str, groups: Mapping[str, Mapping[str, Point]], *, least: float = 1e-4
) -> str:
    """Points with their names beside them, one colour for each group, on a logarithmic y axis.

    Args:
        least: Where the y axis ends; what is smaller is drawn there.

    Raises:
        ValueError: There is no point, or one is not finite.
    """
    points = [point for named in groups.values() for point in named.values()]
    if not points or not all(math.isfinite(value) for point in points for value in (point.x, point.y)):
        raise ValueError("a chart needs points with finite numbers")
    top = _below_legend(list(groups))
    area = _LogArea.around(points, top, least)
    parts = _opening(top + SCATTER_HEIGHT + AXIS_BOTTOM, title, f"{y_label} (logarithmic)", list(groups))
    parts += [*area.axes(), _text((AXIS_LEFT + WIDTH) / 2, top + SCATTER_HEIGHT + 40, x_label, anchor="middle")]
    marks = [
        (point, name, _color(place)) for place, named in enumerate(groups.values()) for name, point in named.items()
    ]
    # Left, right and height of what a name must not cover: the points, and the names so far.
    taken = [(area.x(point.x) - 5, area.x(point.x) + 5, area.y(point.y) + 4) for point in points]
    for point, name, color in sorted(marks, key=lambda mark: -mark[0].y):
        parts += _drawn([point], area, color, joined=False)
        x, y = area.x(point.x), area.y(point.y)
        left, height = x + 6, _free_height(taken, x + 6, y + 4, LETTER_WIDTH * len(name))
        taken.append((left, left + LETTER_WIDTH * len(name), height))
        if abs(height - y - 4) > NAME_HEIGHT / 2:  # too far to see whose name it is
            parts.append(_stroke(x, y, left - 1, height - 4, color))
        parts.append(_text(left, height, name, size=10))
    return "\n".join([*parts, "</svg>\n"])


def _free_height(taken: Sequence[tuple[float, float, float]], left: float, wanted: float, width: float) -> float:
    """The height nearest to the wanted one where a name covers no other."""
    others = [height for a, b, height in taken if left < b and a < left + width]
    places = (wanted + sign * step for step in range(0, SCATTER_HEIGHT, 2) for sign in (1, -1))
    return next(
        (place for place in places if all(abs(place - other) >= NAME_HEIGHT for other in others)), wanted
    )  # with more names than fit, they cover each other


class _Placed(Protocol):
    """Where values lie on the picture."""

    def x(self, value: float) -> float: ...

    def y(self, value: float) -> float: ...


@dataclass(frozen=True, slots=True)
class _LogArea:
    """Where values lie on a picture whose y axis is logarithmic, with room for names on the right."""

    top: int
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    @classmethod
    def around(cls, points: Sequence[Point], top: int, least: float) -> _LogArea:
        heights = [
            max(value, least) for point in points for value in (point.y, point.low, point.high) if value is not None
        ]
        xs = [point.x for point in points]
        return cls(top, _round_steps(min(xs), max(xs)), _log_steps(min(heights), max(heights)))

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return AXIS_LEFT + (WIDTH - AXIS_LEFT - NAMES_RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.top + SCATTER_HEIGHT * (1 - math.log(max(value, low) / low) / math.log(high / low))

    def axes(self) -> list[str]:
        bottom, right = self.top + SCATTER_HEIGHT, WIDTH - NAMES_RIGHT
        parts = []
        for tick in self.y_ticks:
            parts.append(_stroke(AXIS_LEFT, self.y(tick), right, self.y(tick), "#ddd"))
            parts.append(_text(AXIS_LEFT - 6, self.y(tick) + 4, f"{tick:g}", size=10, anchor="end"))
        for tick in self.x_ticks:
            parts.append(_stroke(self.x(tick), bottom, self.x(tick), bottom + 4, "#555"))
            parts.append(_text(self.x(tick), bottom + 18, f"{tick:g}", size=10, anchor="middle"))
        return [*parts, _stroke(AXIS_LEFT, bottom, right, bottom, "#555")]


@dataclass(frozen=True, slots=True)
class _Area:
    """Where values lie on the picture. The y axis begins at 0, so that heights compare as the values do."""

    top: int
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    scale: Callable[[float], float]

    @classmethod
    def around(cls, points: Sequence[Point], top: int, log_x: bool) -> _Area:
        highest = max(point.y if point.high is None else max(point.y, point.high) for point in points)
        xs = sorted({point.x for point in points})
        x_ticks = _powers(xs[0], xs[-1]) if log_x else _round_steps(min(xs[0], 0.0), xs[-1])
        return cls(top, x_ticks, _round_steps(0.0, highest), math.log if log_x else float)

    def x(self, value: float) -> float:
        low, high = self.scale(self.x_ticks[0]), self.scale(self.x_ticks[-1])
        return AXIS_LEFT + (WIDTH - AXIS_LEFT - AXIS_RIGHT) * (self.scale(value) - low) / (high - low)

    def y(self, value: float) -> float:
        return self.top + AREA_HEIGHT * (1 - max(value, 0.0) / self.y_ticks[-1])

    def axes(self) -> list[str]:
        bottom = self.top + AREA_HEIGHT
        parts = []
        for tick in self.y_ticks:
            parts.append(_stroke(AXIS_LEFT, self.y(tick), WIDTH - AXIS_RIGHT, self.y(tick), "#ddd"))
            parts.append(_text(AXIS_LEFT - 6, self.y(tick) + 4, f"{tick:g}", size=10, anchor="end"))
        for tick in self.x_ticks:
            parts.append(_stroke(self.x(tick), bottom, self.x(tick), bottom + 4, "#555"))
            parts.append(_text(self.x(tick), bottom + 18, f"{tick:g}", size=10, anchor="middle"))
        return [*parts, _stroke(AXIS_LEFT, bottom, WIDTH - AXIS_RIGHT, bottom, "#555")]


def _drawn(points: Sequence[Point], area: _Placed, color: str, joined: bool) -> list[str]:
    parts = []
    if joined and len(points) > 1:
        path = " ".join(f"{area.x(point.x):.1f},{area.y(point.y):.1f}" for point in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    for point in points:
        x = area.x(point.x)
        if point.low is not None and point.high is not None:
            parts.append(_stroke(x, area.y(point.low), x, area.y(point.high), color))
        parts.append(f'<circle cx="{x:.1f}" cy="{area.y(point.y):.1f}" r="3" fill="{color}"/>')
    return parts


def _round_steps(low: float, high: float) -> list[float]:
    """From `low` rounded down to `high` rounded up, in steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    rough = span / (TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(count * step, 12) for count in range(first, max(last, first + 1) + 1)]


def _log_steps(low: float, high: float) -> list[float]:
    """From `low` rounded down to `high` rounded up: 1, 2 and 5 times the powers of ten, or the powers alone where those fill."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    factors = (1.0, 2.0, 5.0) if last - first <= TICKS else (1.0,)
    steps = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    start = max(index for index, step in enumerate(steps) if step <= low * (1 + 1e-9))
    end = min(index for index, step in enumerate(steps) if step >= high * (1 - 1e-9))
    return steps[start : max(end, start + 1) + 1]


def _powers(low: float, high: float) -> list[float]:
    """Powers of two from below `low` to above `high`."""
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    every = max(1, -(-(last - first) // (2 * TICKS)))
    return [2.0**power for power in range(first, max(last, first + 1) + every, every)]


def _opening(height: int, title: str, unit: str, series: Sequence[str]) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(10, 22, title, size=15),
        _text(10, 40, unit, color="#555"),
        *_legend(series),
    ]


def _below_legend(series: Sequence[str]) -> int:
    return TOP + LEGEND_STEP * -(-len(series) // LEGEND_COLUMNS)


def _legend(series: Sequence[str]) -> list[str]:
    parts = []
    for place, name in enumerate(series):
        x, y = 10 + place % LEGEND_COLUMNS * 245, 58 + place // LEGEND_COLUMNS * LEGEND_STEP
        parts.append(f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{_color(place)}"/>')
        parts.append(_text(x + 16, y, name))
    return parts


def _color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def _stroke(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", color: str = "#222") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    text = "".join(letter if letter.isprintable() else " " for letter in text)  # XML has no control characters
    return f'<text {place} font-size="{size}" fill="{color}">{escape(text)}</text>'
