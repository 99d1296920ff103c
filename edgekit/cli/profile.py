"""edgekit profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekit.cli.options import (
    finite,
    format_option,
    json_option,
    print_json,
    progress_bars,
    provider_option,
    threads_option,
)
from edgekit.errors import EdgeKitError

__all__ = ["command"]


@click.command("profile")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@format_option
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    multiple=True,
    metavar="N",
    help="Length of a prompt; may be given again. By default 256, 32 and 1,024, as far as they fit.",
)
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens of each reply.")
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Processes for each prompt length.")
@click.option(
    "--sustained", type=click.FloatRange(1), callback=lambda c, p, v: v and finite(c, p, v), metavar="SECONDS",
    help="Also reply without a pause for so long, with clock and temperature where the system tells them.",
)  # fmt: skip
@click.option("--target", metavar="ID|FILE", help="A profile with this machine's bandwidth; by default it is measured.")
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a report with charts, in one file."
)
@click.option(
    "--compare", type=click.Path(path_type=Path, dir_okay=False), nargs=2, metavar="A.json B.json",
    help="Compare two profiles that --json wrote, instead.",
)  # fmt: skip
@provider_option
@threads_option
@json_option
def command(
    bundle: Path | None, html: Path | None, compare: tuple[Path, Path] | None, as_json: bool, **options: Any
) -> None:
    """Measure how fast the program in BUNDLE runs here and in how much memory; or compare two such measurements.

    Every run is a process of its own. Replies are decoded plainly, without speculation.
    """
    if (bundle is None) == (compare is None):
        raise click.UsageError("give either BUNDLE or --compare A.json B.json.")
    if compare is not None:
        if html:
            raise click.UsageError("--html is of a BUNDLE's profile.")
        _compare(*compare, as_json)
    elif bundle is not None:
        _profile(bundle, html, as_json, **options)


def _profile(bundle: Path, html: Path | None, as_json: bool, **options: Any) -> None:
    from edgekit.profile import profile_bundle
    from edgekit.profile_report import profile_html, profile_text

    if html and not html.absolute().parent.is_dir():  # said now, not after minutes of measuring
        raise EdgeKitError(f"{html} can't be written: there is no such folder", hint="choose another --html")
    format_, sustained = options.pop("format_"), options.pop("sustained")
    with progress_bars() as on_progress:
        profile = profile_bundle(
            bundle, format=format_, sustained_s=sustained or 0.0, on_progress=on_progress, **options
        )
    if as_json:
        print_json(profile.to_json())
    else:
        click.echo(profile_text(profile))
    if html:
        html.write_text(profile_html(profile), encoding="utf-8", newline="\n")


def _compare(first: Path, second: Path, as_json: bool) -> None:
    from edgekit.profile_compare import compare_profiles
    from edgekit.profile_record import read_profile
    from edgekit.profile_report import comparison_text

    comparison = compare_profiles(read_profile(first), read_profile(second))
    if as_json:
        print_json(comparison.to_json())
    else:
        click.echo(comparison_text(comparison))
