"""edgekit targets."""

from __future__ import annotations

import click

from edgekit.cli.options import json_option, print_json, size_text
from edgekit.target import Target, list_targets, load_target

__all__ = ["command"]


@click.command("targets")
@click.argument("target_id", required=False, metavar="[ID]")
@json_option
def command(target_id: str | None, as_json: bool) -> None:
    """List the devices, or explain one. ID may be a profile file of your own."""
    if target_id is not None:
        target = load_target(target_id)
        if as_json:
            print_json(target.to_json())
        else:
            click.echo(_explanation(target))
        return
    targets = list_targets()
    if as_json:
        print_json({"targets": [target.to_json() for target in targets]})
        return
    width = max(len(target.id) for target in targets)
    for target in targets:
        click.echo(
            f"{target.id:<{width}}  {target.name}: {size_text(target.app_memory_bytes)} for an app, "
            f"{size_text(target.bandwidth_bytes_per_s)}/s, {', '.join(target.formats)}"
        )


def _explanation(target: Target) -> str:
    lines = [f"{target.id}: {target.name}"]
    for key, value in target.to_json().items():
        if key in {"id", "name", "sources"}:
            continue
        shown = (
            ", ".join(value) if isinstance(value, list) else f"{value:,}" if type(value) is int else str(value).lower()
        )
        lines.append(f"  {key} = {shown}")
        if key in target.sources:
            lines.append(f"      {target.sources[key]}")
    return "\n".join(lines)
