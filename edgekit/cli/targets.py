"""edgekit targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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
        click.echo(f"{target.id:<{width}}  {_summary(target)}")


def _summary(target: Target) -> str:
    memory = target.memory
    return (
        f"{target.name}: {size_text(memory.app_bytes)} for an app, {size_text(memory.bandwidth_bytes_per_s)}/s, "
        f"{', '.join(target.formats)}"
    )


def _explanation(target: Target) -> str:
    values = target.to_json()
    lines = [f"{target.id}: {target.name}"]
    for key, value in _figures({name: values[name] for name in values if name not in {"id", "name", "sources"}}):
        lines.append(f"  {key} = {_shown(value)}")
        source = _source_of(key, target.sources)
        if source:
            lines.append(f"      {source}")
    return "\n".join(lines)


def _figures(table: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of all that a profile says; what is 0 or empty is unknown, or no limit, and left out."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _figures(value, f"{at}{key}.")
        elif value is False or value:
            yield at + key, value


def _source_of(key: str, sources: Mapping[str, str]) -> str:
    """The text for the key itself, or else for the nearest table that holds it."""
    while key and key not in sources:
        key = key.rpartition(".")[0]
    return sources.get(key, "")


def _shown(value: Any) -> str:
    if isinstance(value, dict):  # cores of one kind
        return (
            f"{value['count']} x {value['name']} at {value['clock_hz'] / 1e9:g} GHz{'' if value['big'] else ' (small)'}"
        )
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value)
    return f"{value:,}" if type(value) is int else str(value).lower() if isinstance(value, bool) else str(value)
