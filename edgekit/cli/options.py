"""Options that several commands share, and how they print."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import click

from edgekit.progress import Progress, ProgressFn

if TYPE_CHECKING:
    from edgekit.runtimes.engine import LoadedModel

__all__ = [
    "SizeType",
    "finite",
    "format_option",
    "json_option",
    "print_json",
    "progress_bars",
    "provider_note",
    "provider_option",
    "size_text",
    "table",
    "threads_option",
]

format_option = click.option(
    "--format", "format_", metavar="F", help="The program to run; by default the bundle's first."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Threads for computing; by default the target's big cores, as far as they are here.",
)


provider_option = click.option(
    "--provider",
    metavar="P",
    help="The execution provider that must run the program: cpu, qnn or openvino. By default what the plan prefers, where "
    "that works here.",
)


def finite(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """A range lets nan and inf pass."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.")
    return value


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(values, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def provider_note(model: LoadedModel) -> None:
    """Say on stderr what would rather have run the program, and why it does not; and what to know of what runs it."""
    for passed_over in model.provider.passed_over:
        click.echo(f"note: not run by {passed_over}", err=True)
    if model.provider.note:
        click.echo(f"note: run on {model.provider.executed}: {model.provider.note}", err=True)


def size_text(size_bytes: float) -> str:
    """A size for people."""
    for unit in ("B", "kB", "MB"):
        if size_bytes < 999.5:  # from there on it is shown as 1 of the next
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} GB" if size_bytes < 999.5 else f"{size_bytes:,.0f} GB"


@contextmanager
def progress_bars() -> Iterator[ProgressFn | None]:
    """Bars on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    # A file of its own: the bars stay where third parties are quieted.
    with (
        open(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="replace") as shown,
        Bars(*columns, console=Console(file=shown)) as bars,
    ):

        def show(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total)
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total)

        yield show


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of which is the heading, as lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


class SizeType(click.ParamType[int]):
    """A number of bytes: 2GB, 512MB, 1.5GiB, or plain bytes."""

    name = "size"
    _UNITS: ClassVar = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """As click asks for it."""
        match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?([KMG]I?B|B)?", str(value).upper())
        size = round(float(match[1]) * self._UNITS[match[2] or ""]) if match else 0
        if size <= 0:
            self.fail(f"{value!r} is not a size such as 2GB, 512MB or 1.5GiB.", param, ctx)
        return size
