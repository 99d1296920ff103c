"""edgekit verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekit.cli.options import json_option, print_json, progress_bars, threads_option

__all__ = ["command"]

FAILED = 1


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--format", "formats", multiple=True, metavar="F", help="A program to verify; by default all of them.")
@click.option(
    "--reference", metavar="SOURCE", help="The checkpoint; by default the log-probabilities kept in the bundle."
)
@threads_option
@json_option
def command(bundle: Path, formats: tuple[str, ...], reference: str | None, threads: int | None, as_json: bool) -> int:
    """Run the programs in BUNDLE and compare them with the full-precision reference."""
    from edgekit.gate import verify_bundle

    with progress_bars() as on_progress:
        rows = verify_bundle(bundle, formats=formats, reference=reference, threads=threads, on_progress=on_progress)
    ok = all(row["status"] == "ok" for row in rows)
    if as_json:
        print_json({"ok": ok, "programs": rows})
    else:
        for row in rows:
            click.echo(_line(row))
    return 0 if ok else FAILED


def _line(row: dict[str, Any]) -> str:
    text = f"{row['format']}: {row['status']}"
    if row["executed"]:
        text += f", run on {row['executed']}, {row['greedy_match_tokens']} greedy tokens match"
    if row["kl_mean"] is not None:
        text += f", mean KL {row['kl_mean']:.3g}, top-1 agreement {row['top1_agreement']:.1%}"
    return text + (f" ({row['reason']})" if row["reason"] else "")
