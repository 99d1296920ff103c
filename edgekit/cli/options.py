"""Options that several commands share, and how they print."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from edgekit.progress import Progress, ProgressFn

__all__ = ["finite", "generation_options", "json_option", "print_json", "progress_bars", "size_text", "threads_option"]

_F = TypeVar("_F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads for computing; by default the runtime's own choice."
)


def finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """A range lets nan and inf pass."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.")
    return value


def _not_empty(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if not all(value):
        raise click.BadParameter("give a text of at least one character.")
    return value


_GENERATION = (
    click.option("--max-tokens", type=click.IntRange(1), help="End after this many tokens."),
    click.option(
        "--temperature",
        type=click.FloatRange(0),
        default=0.0,
        callback=finite,
        help="0 (default) takes the best token.",
    ),
    click.option("--top-k", type=click.IntRange(0), default=0, help="Sample from the k best tokens; 0: all."),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        default=1.0,
        callback=finite,
        help="Sample from this mass.",
    ),
    click.option(
        "--min-p",
        type=click.FloatRange(0, 1),
        default=0.0,
        callback=finite,
        help="Drop tokens below this part of the best.",
    ),
    click.option(
        "--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0, callback=finite, help="1 is off."
    ),
    click.option("--seed", type=click.IntRange(0), help="Make sampling repeatable."),
    click.option(
        "--stop", multiple=True, callback=_not_empty, metavar="TEXT", help="End at this text; may be repeated."
    ),
    click.option("--system", metavar="TEXT", help="A system message."),
    threads_option,
)


def generation_options(function: _F) -> _F:
    """The options of GenerateOptions, and --threads."""
    for option in reversed(_GENERATION):
        function = option(function)
    return function


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(values, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def size_text(size_bytes: float) -> str:
    """A size for people."""
    for unit in ("B", "kB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} GB"


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
    with Bars(*columns, console=Console(stderr=True)) as bars:

        def show(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total)
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total)

        yield show
