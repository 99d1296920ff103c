"""edgekit verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekit.cli.options import json_option, print_json, progress_bars, provider_option, threads_option
from edgekit.cli.quality_text import phase_lines, quality_table
from edgekit.cli.rehearsal import rehearse_command, rehearse_option

__all__ = ["command"]

FAILED = 1


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--format", "formats", multiple=True, metavar="F", help="A program to verify; by default all of them.")
@click.option(
    "--reference", metavar="SOURCE", help="The checkpoint; by default the log-probabilities kept in the bundle."
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A text file of your own to compare on as well, by up to 4,096 tokens spread over it.",
)
@provider_option
@rehearse_option
@threads_option
@json_option
def command(
    bundle: Path,
    formats: tuple[str, ...],
    reference: str | None,
    text: Path | None,
    provider: str | None,
    rehearse: str | None,
    threads: int | None,
    as_json: bool,
) -> int:
    """Run the programs in BUNDLE and compare them with the full-precision reference."""
    from edgekit.gate import verify_bundle

    if text is not None and reference is None:
        raise click.UsageError("--text needs --reference SOURCE: the bundle remembers its own texts only")
    if rehearse and reference is not None:
        raise click.UsageError("--rehearse takes no --reference, which needs more memory than the program")
    if rehearse and len(formats) > 1:
        raise click.UsageError("--rehearse takes one --format at a time: it fills that program's context")
    if rehearse:
        format_ = formats[0] if formats else None
        return rehearse_command(bundle, rehearse, as_json=as_json, format=format_, provider=provider, threads=threads)
    with progress_bars() as on_progress:
        rows = verify_bundle(
            bundle,
            formats=formats,
            reference=reference,
            text=text,
            provider=provider,
            threads=threads,
            on_progress=on_progress,
        )
    ok = all(row["status"] == "ok" for row in rows)
    if as_json:
        print_json({"ok": ok, "programs": rows})
    else:
        for row in rows:
            click.echo(_line(row))
        if len(rows) > 1:
            click.echo("\n".join(["", *quality_table(rows)]))
    return 0 if ok else FAILED


def _line(row: dict[str, Any]) -> str:
    text = f"{row['format']}: {row['status']}"
    if row["executed"]:
        text += f", run on {row['executed']}, {row['greedy_match_tokens']} greedy tokens match"
    if row["kl_mean"] is not None:
        text += f", {_figures(row)}"
    text += f" ({row['reason']})" if row["reason"] else ""
    text += "".join(f"\n  {line}" for line in phase_lines(row))
    if own := row["text"]:
        low, high = own["perplexity_ratio_interval"]
        text += (
            f"\n  your text: {_figures(own)}, perplexity {own['perplexity']:.4g} against {own['reference_perplexity']:.4g}: "
            f"{own['perplexity_ratio']:.4f} times ({low:.4f} to {high:.4f})"
        )
    return text


def _figures(values: dict[str, Any]) -> str:
    """Means with their 95% intervals."""
    (low, high), (least, most) = values["kl_mean_interval"], values["top1_interval"]
    return (
        f"mean KL {values['kl_mean']:.3g} ({low:.3g} to {high:.3g}), 99th percentile {values['kl_p99']:.3g}, "
        f"top-1 agreement {values['top1_agreement']:.1%} ({least:.1%} to {most:.1%}), {values['positions']:,} positions"
    )
