"""edgekit convert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from edgekit.bundle import Bundle
from edgekit.cli.options import SizeType, finite, json_option, print_json, progress_bars, size_text
from edgekit.cli.quality_text import quality_rows, quality_table
from edgekit.quant import CacheFormat

__all__ = ["command"]


@click.command("convert")
@click.argument("source")
@click.option(
    "--target", required=True, metavar="ID", help="The device: an id from `edgekit targets`, or a profile file."
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    metavar="F",
    help="By default the first that the target prefers and is converted to. Repeated: a program of each.",
)
@click.option(
    "--quant",
    default="auto",
    metavar="SCHEME",
    help="auto (default), keep, fp32, fp16, int8, int8-scaled, int4, int4-mixed, palette4, palette6, or a recipe file.",
)
@click.option(
    "--max-size",
    type=SizeType(),
    metavar="SIZE",
    help="Search for the best formats whose files take at most this: 80MB.",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(0, min_open=True),
    callback=finite,
    metavar="KL",
    help="Search for the smallest formats that keep the mean KL divergence at this: 0.05.",
)
@click.option("--context", type=click.IntRange(1), metavar="N", help="Tokens; by default at most 4,096, and what fits.")
@click.option(
    "--cache",
    type=click.Choice([kind.value for kind in CacheFormat]),
    help="How keys and values are kept; by default the best that fits.",
)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The bundle; <model>-<target>.edgekit.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option("--no-verify", is_flag=True, help="Do not run the program; the manifest says so.")
@click.option("--allow-low-quality", is_flag=True, help="Keep a program that fails its quality bound; labelled.")
@click.option("--allow-too-large", is_flag=True, help="Convert even where the plan says that it does not fit.")
@json_option
def command(
    source: str,
    target: str,
    formats: tuple[str, ...],
    quant: str,
    max_size: int | None,
    max_kl: float | None,
    context: int | None,
    cache: str | None,
    out: Path | None,
    force: bool,
    no_verify: bool,
    allow_low_quality: bool,
    allow_too_large: bool,
    as_json: bool,
) -> None:
    """Convert SOURCE to a verified bundle for one device.

    SOURCE is a directory with config.json and safetensors, a .gguf file, a hub id such as org/name or org/name@revision, or
    `sample`, a small real chat model.

    With --max-size or --max-kl each matrix gets a format of its own, by what rounding it is measured to cost; the choice is
    written into the bundle as recipe.toml, for --quant on the next model.
    """
    from edgekit.pipeline import convert

    with progress_bars() as on_progress:
        bundle = convert(
            source,
            target=target,
            format=formats or None,
            quant=quant,
            max_size_bytes=max_size,
            max_kl=max_kl,
            context=context,
            cache=CacheFormat(cache) if cache else None,
            out=out,
            force=force,
            verify=not no_verify,
            allow_low_quality=allow_low_quality,
            allow_too_large=allow_too_large,
            on_progress=on_progress,
        )
    for note in bundle.manifest.plan["notes"]:
        click.echo(f"note: {note}", err=True)
    if as_json:
        print_json({"bundle": str(bundle.directory), **bundle.manifest.to_json()})
    else:
        click.echo(_summary(bundle))


def _summary(bundle: Bundle) -> str:
    plan = bundle.manifest.plan
    size_bytes = sum(entry["size_bytes"] for entry in bundle.manifest.files.values())
    lines = [
        f"{bundle.directory}",
        f"  {plan['format']}, {plan['quant']}, context {plan['context']:,}, {size_text(size_bytes)}",
        f"  on {bundle.manifest.target}: {_fit(plan)}",
    ]
    programs = bundle.manifest.programs
    if len(programs) == 1:
        return "\n".join([*lines, f"  {_verdict(programs[0].quality)}"])
    lines += [f"  {format}: {_fit(other)}" for format, other in plan["other_programs"].items()]
    rows = quality_rows(programs)
    reasons = [f"  {row['format']}: {row['reason']}" for row in rows if row.get("reason")]
    return "\n".join([*lines, *(f"  {line}" for line in quality_table(rows)), *reasons])


def _verdict(quality: Mapping[str, Any]) -> str:
    if quality["executed"] is None:
        return f"not executed: {quality['reason']}"
    if "kl_mean" in quality:
        return (
            f"run on {quality['executed']}, {quality['status']}: mean KL {quality['kl_mean']:.3g} (bound "
            f"{quality['kl_bound']}), top-1 agreement {quality['top1_agreement']:.1%} over {quality['positions']} positions"
        )
    return f"run on {quality['executed']}, {quality['status']}: {quality['reason']}"


def _fit(plan: Mapping[str, Any]) -> str:
    memory, speed = plan["memory"], plan["speed"]
    fits = "fits" if plan["fits"] == "yes" else "does not fit"
    return (
        f"{fits} ({size_text(memory['total_bytes'])} of {size_text(memory['budget_bytes'])}), "
        f"about {speed['decode_tokens_per_s']:.0f} tokens/s (modelled)"
    )
