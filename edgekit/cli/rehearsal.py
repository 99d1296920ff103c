"""--rehearse, of `edgekit run` and `edgekit verify`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edgekit.cli.options import print_json

__all__ = ["rehearse_command", "rehearse_option"]

_NAME = "--rehearse"
rehearse_option = click.option(
    _NAME,
    metavar="TARGET",
    help="Run in a process with that device's memory limit and cores, its whole context in use, and say if it survives.",
)


def rehearse_command(bundle: Path, target_name: str, *, as_json: bool, **load: Any) -> int:
    """Run this command again under a device's limits, and report; the exit code."""
    from edgekit.rehearse import rehearse
    from edgekit.target import load_target

    arguments = _without_option(click.get_current_context().find_root().obj)
    rehearsal, code, output = rehearse(bundle, load_target(target_name), arguments, captured=as_json, **load)
    click.echo(_text(rehearsal), err=True)
    if as_json:
        printed = json.loads(output) if output.strip() else {}
        print_json(printed | {"rehearsal": rehearsal.to_json()})
    return code


def _without_option(arguments: Sequence[str]) -> list[str]:
    """The arguments that this process was given, but for --rehearse and its value."""
    kept: list[str] = []
    given = iter(arguments)
    for argument in given:
        if argument == "--":
            return [*kept, argument, *given]
        if argument == _NAME:
            next(given, None)
        elif not argument.startswith(f"{_NAME}="):
            kept.append(argument)
    return kept


def _text(rehearsal: Any) -> str:
    cores = f"{rehearsal.cores} core{'s' * (rehearsal.cores != 1)}"
    if rehearsal.enforced_by is None:
        return f"not rehearsed: a child's memory can be limited on Linux only; it took {_mb(rehearsal.peak_rss_bytes)}"
    what = "survives" if rehearsal.survived else "is killed for memory"
    text = (
        f"rehearsed on {rehearsal.target}: {what}, peak {_mb(rehearsal.peak_rss_bytes)} of {_mb(rehearsal.limit_bytes)}, "
        f"{cores} ({rehearsal.enforced_by})"
    )
    if rehearsal.planned_bytes is not None:
        text += f"; the plan says {_mb(rehearsal.planned_bytes)}"
    if rehearsal.survived and rehearsal.peak_rss_bytes > rehearsal.limit_bytes:
        return f"{text}; pages of files that others use too, or that were read again, are not held against it"
    if rehearsal.survived:
        return text
    return f"{text}\nhint: convert with fewer bits (--quant int4) or a shorter --context"


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"
