"""edgekit targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from edgekit.cli.options import json_option, print_json, size_text, table
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
    rows = [("id", "app memory", "bandwidth", "npu", "formats", "name"), *map(_row, targets)]
    click.echo(table(rows))


def _row(target: Target) -> tuple[str, ...]:
    memory, npu = target.memory, target.npu
    return (
        target.id,
        size_text(memory.app_bytes),
        f"{size_text(memory.bandwidth_bytes_per_s)}/s",
        f"{npu.kind} {npu.architecture}" if npu else "-",
        ", ".join(target.formats),
        target.name,
    )


def _explanation(target: Target) -> str:
    """Every figure, and below each run of figures from one source that source."""
    values = target.to_json()
    lines, pending = [f"{target.id}: {target.name}"], ""
    for key, value in _figures({name: values[name] for name in values if name not in {"id", "name", "sources"}}):
        source = target.sources.get(key, "")
        if pending and source != pending:
            lines.append(f"      {pending}")
        lines.append(f"  {key} = {_shown(value)}")
        pending = source
    return "\n".join([*lines, f"      {pending}"] if pending else lines)


def _figures(table: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of all that a profile says; what is 0 or empty is unknown, or no limit, and left out."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _figures(value, f"{at}{key}.")
        elif value is False or value:
            yield at + key, value


def _shown(value: Any) -> str:
    if isinstance(value, dict):  # cores of one kind
        small = "" if value["big"] else " (small)"
        return f"{value['count']} x {value['name']} at {value['clock_hz'] / 1e9:g} GHz{small}"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else str(value)
