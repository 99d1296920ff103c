"""Quality cards as text: one line a program, or several programs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgekit.bundle import Program
from edgekit.cli.options import size_text, table

__all__ = ["phase_lines", "quality_rows", "quality_table"]

_NONE = "-"


def quality_rows(programs: Sequence[Program]) -> list[dict[str, Any]]:
    """Quality cards as rows of `quality_table`."""
    return [
        {"format": program.graph.format, "weights_bytes": program.graph.weights_bytes, **program.quality}
        for program in programs
    ]


def quality_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Programs side by side: each a quality card, or a row of a verification, with `format` and `weights_bytes`."""
    cells = [("program", "weights", "run on", "status", "mean KL", "top-1", "one at a time", "past half", "greedy")]
    for card in rows:
        kl, top1 = card.get("kl_mean"), card.get("top1_agreement")
        decode, late = card.get("decode") or {}, card.get("late") or {}
        greedy = card.get("reference_match_tokens")
        cells.append(
            (
                card["format"],
                size_text(card["weights_bytes"]),
                card.get("executed") or "nothing",
                card["status"],
                _NONE if kl is None else f"{kl:.3g}",
                _NONE if top1 is None else f"{top1:.1%}",
                f"{decode['kl_mean']:.3g}" if decode else _NONE,
                f"{late['kl_mean']:.3g}" if late else _NONE,
                _NONE if greedy is None else str(greedy),
            )
        )
    return table(cells).splitlines()


def phase_lines(values: Mapping[str, Any]) -> list[str]:
    """What was computed one token at a time, past half of the context, and in common with the reference's own text."""
    lines = []
    if decode := values.get("decode"):
        lines.append(
            f"one token at a time: mean KL {decode['kl_mean']:.3g} over {decode['positions']} positions "
            f"({decode['kl_at_once']:.3g} at once)"
        )
    if late := values.get("late"):
        lines.append(
            f"past half of the context: mean KL {late['kl_mean']:.3g} over {late['positions']} positions from "
            f"{late['first_position']:,} on"
        )
    if values.get("reference_match_tokens") is not None:
        lines.append(f"greedy tokens as the reference's: {values['reference_match_tokens']}")
    return lines
