"""A bar chart as SVG, for the README. Not a benchmark itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

COLORS = ("#1f6feb", "#8bb8f8", "#b0793a", "#e0bd90", "#5f7d5a", "#b5cdb0")
WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 760, 130, 50, 13, 16, 64


def write_bars(path: Path, title: str, unit: str, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Draw one horizontal bar for each series of each group; a series keeps its colour, and an absent one its place free."""
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    most = max(value for values in groups.values() for value in values.values())
    step = len(series) * BAR + GAP
    height = TOP + 18 * -(-len(series) // 3) + step * len(groups) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(10, 22, title, size=15),
        _text(10, 40, unit, color="#555"),
        *_legend(series),
    ]
    y = TOP + 18 * -(-len(series) // 3)
    for group, values in groups.items():
        parts.append(_text(LEFT - 8, y + len(series) * BAR // 2 + 4, group, anchor="end"))
        for place, name in enumerate(series):
            if name not in values:
                continue
            length, top = (WIDTH - LEFT - RIGHT) * values[name] / most, y + place * BAR
            color = COLORS[place % len(COLORS)]
            parts.append(f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR - 2}" fill="{color}"/>')
            parts.append(_text(LEFT + length + 4, top + 10, f"{values[name]:.0f}", size=10))
        y += step
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def _legend(series: Sequence[str]) -> list[str]:
    parts = []
    for place, name in enumerate(series):
        x, y = 10 + place % 3 * 245, 58 + place // 3 * 18
        parts.append(f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{COLORS[place % len(COLORS)]}"/>')
        parts.append(_text(x + 16, y, name))
    return parts


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", color: str = "#222") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{color}">{escape(text)}</text>'
