"""A profile for people: a table for the terminal, and an HTML page with charts that needs no other file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from statistics import median

from edgekit.plot import Point, lines
from edgekit.profile_compare import Comparison, Figure
from edgekit.profile_record import Profile, Spread, Sustained

__all__ = ["comparison_text", "profile_html", "profile_text"]

_STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:800px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}svg{width:100%;height:auto}pre{overflow:auto;font-size:12px}"
)
_LENGTH_HEADER = (
    "prompt",
    "first token s",
    "prefill tok/s",
    "decode tok/s",
    "between tokens ms",
    "p95 ms",
    "peak MB",
)
_COMPARE_HEADER = ("figure", "prompt", "first", "second", "ratio", "interval", "verdict")


def profile_text(profile: Profile) -> str:
    """The figures as lines of text."""
    return "\n".join(
        [
            _title(profile),
            "",
            *_aligned([_LENGTH_HEADER, *_length_rows(profile)]),
            "",
            *_aligned(_summary_rows(profile), left=2),
        ]
    )


def comparison_text(comparison: Comparison) -> str:
    """The figures side by side, then what else differs."""
    rows = [_COMPARE_HEADER, *(_figure_row(figure) for figure in comparison.figures)]
    notes = [f"note: the two differ in {difference}" for difference in comparison.differences]
    return "\n".join([*_aligned(rows), f"intervals: {comparison.confidence:.1%} of resamplings", *notes])


def profile_html(profile: Profile) -> str:
    """One page that stands alone: no script, no style sheet, no picture from elsewhere."""
    title = escape(_title(profile))
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head><body>',
        f"<h1>{title}</h1>",
        f"<p>{escape(profile.date)}, {profile.new_tokens} new tokens, {len(profile.lengths[0].runs)} processes of each "
        "prompt length; medians, and the range over the processes.</p>",
        _table([_LENGTH_HEADER, *_length_rows(profile)], header=True),
        _table(_summary_rows(profile)),
        *_charts(profile),
        f"<details><summary>All figures</summary><pre>{escape(json.dumps(profile.to_json(), indent=1))}</pre></details>",
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _title(profile: Profile) -> str:
    threads = f", {profile.threads} threads" if profile.threads else ""
    return f"{profile.bundle}, {profile.format} on {profile.executed}{threads}"


def _length_rows(profile: Profile) -> list[tuple[str, ...]]:
    return [
        (
            str(length.prompt_tokens),
            _span(length.ttft_s, 3),
            _span(length.prefill_tokens_per_s, 0),
            _span(length.decode_tokens_per_s, 1),
            f"{1000 * length.between_tokens_s.median:.2f}",
            f"{1000 * length.between_tokens_s.p95:.2f}",
            f"{length.peak_rss_bytes / 1e6:.0f}",
        )
        for length in profile.lengths
    ]


def _summary_rows(profile: Profile) -> list[tuple[str, str]]:
    cold, machine = profile.cold, profile.machine
    used = profile.bytes_per_token * profile.decode_tokens_per_s.median
    rows = [
        (
            f"cold, files from the {cold.files}",
            f"process to ready {_span(cold.start_s, 2)} s, of that loading {_span(cold.load_s, 2)} s, "
            f"first token after {_span(cold.ttft_s, 3)} s more",
        ),
        ("warm", f"loading {_span(profile.load_s, 2)} s"),
        (
            "memory",
            f"{profile.peak_rss_bytes / 1e6:.0f} MB peak, {profile.idle_rss_bytes / 1e6:.0f} MB idle, of which the weights "
            f"are {profile.weights_bytes / 1e6:.0f} MB",
        ),
        (
            "bandwidth",
            f"{profile.bytes_per_token / 1e6:.0f} MB a token, {used / 1e9:.1f} of {profile.bandwidth_bytes_per_s / 1e9:.1f} "
            f"GB/s ({profile.bandwidth_basis}): {profile.roofline_fraction:.0%} of the roofline",
        ),
        ("provider", f"{profile.provider}: {profile.provider_reason}"),
        ("machine", f"{machine.processor or machine.architecture}, {machine.cores} cores, {machine.system}"),
    ]
    if profile.plan:
        plan = profile.plan
        rows.append(
            (
                "planned",
                f"for {plan.target}: decode {plan.decode_tokens_per_s:.1f} tok/s, prefill {plan.prefill_tokens_per_s:.0f} tok/s, "
                f"{plan.total_bytes / 1e6:.0f} MB with a full context",
            )
        )
    if profile.sustained:
        rows.append(("sustained", _sustained_text(profile.sustained)))
    return rows


def _sustained_text(sustained: Sustained) -> str:
    last = sustained.samples[-1]
    clock = f"{last.clock_hz / 1e9:.2f} GHz" if last.clock_hz else "clock not told"
    heat = f"{last.temperature_c:.0f} degrees" if last.temperature_c else "temperature not told"
    return f"after {sustained.seconds:.0f} s {sustained.kept_fraction:.0%} of the speed at the start, {clock}, {heat}"


def _charts(profile: Profile) -> list[str]:
    lengths = profile.lengths
    charts = [
        lines(
            f"{name} by prompt length", "tokens of the prompt", "tokens a second; the stroke is the range over processes",
            {"measured": [_point(length.prompt_tokens, spread) for length, spread in zip(lengths, spreads, strict=True)]}
            | planned,
            log_x=True,
        )
        for name, spreads, planned in (
            ("Prefill", [length.prefill_tokens_per_s for length in lengths], _planned(profile, "prefill_tokens_per_s")),
            ("Decode", [length.decode_tokens_per_s for length in lengths], _planned(profile, "decode_tokens_per_s")),
        )
    ]  # fmt: skip
    between = {
        f"prompt {length.prompt_tokens}": [
            Point(place + 2, 1000 * median(times))
            for place, times in enumerate(zip(*(run.between_tokens_s for run in length.runs), strict=False))
        ]
        for length in lengths
    }
    charts.append(lines("Time of each token", "token of the reply", "milliseconds, median over processes", between))
    return charts + (_sustained_charts(profile.sustained) if profile.sustained else [])


def _sustained_charts(sustained: Sustained) -> list[str]:
    samples = sustained.samples
    series = {
        ("Sustained decode", "tokens a second"): [(s.time_s, s.decode_tokens_per_s) for s in samples],
        ("Clock", "GHz"): [(s.time_s, s.clock_hz / 1e9) for s in samples if s.clock_hz is not None],
        ("Temperature", "degrees Celsius"): [
            (s.time_s, s.temperature_c) for s in samples if s.temperature_c is not None
        ],
    }
    return [
        lines(title, "seconds", unit, {title.lower(): [Point(x, y) for x, y in pairs]})
        for (title, unit), pairs in series.items()
        if pairs
    ]


def _planned(profile: Profile, name: str) -> dict[str, Sequence[Point]]:
    if profile.plan is None:
        return {}
    rate: float = getattr(profile.plan, name)
    return {f"planned for {profile.plan.target}": [Point(length.prompt_tokens, rate) for length in profile.lengths]}


def _point(x: float, spread: Spread) -> Point:
    return Point(x, spread.median, spread.min, spread.max)


def _span(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.min:.{digits}f}-{spread.max:.{digits}f})"


def _figure_row(figure: Figure) -> tuple[str, ...]:
    if figure.name.endswith("_bytes"):
        first, second = (f"{value / 1e6:.1f} MB" for value in (figure.first, figure.second))
    elif figure.name.endswith("_per_s"):
        first, second = (f"{value:.1f}" for value in (figure.first, figure.second))
    else:
        first, second = (f"{1000 * value:.2f} ms" for value in (figure.first, figure.second))
    prompt = "" if figure.prompt_tokens is None else str(figure.prompt_tokens)
    interval = f"{figure.low:.3f}-{figure.high:.3f}"
    return (figure.name, prompt, first, second, f"{figure.ratio:.3f}", interval, figure.verdict)


def _aligned(rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Rows with columns of one width; the first `left` columns begin at their left edge, the others end at their right."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines_ = (
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )
    return [line.rstrip() for line in lines_]


def _table(rows: Iterable[Sequence[str]], *, header: bool = False) -> str:
    parts = []
    for number, row in enumerate(rows):
        tag = "th" if header and not number else "td"
        parts.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f"<table>{''.join(parts)}</table>"
