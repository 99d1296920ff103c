"""edgekit doctor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from edgekit.cli.options import json_option, print_json, size_text

__all__ = ["command"]


@click.command("doctor")
@click.option("--calibrate", is_flag=True, help="Measure this machine, in some seconds, and write a profile of it.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("this-machine.toml"),
    show_default=True,
    metavar="FILE",
    help="Where --calibrate writes; --target FILE takes it.",
)
@click.option("--force", is_flag=True, help="Overwrite the profile.")
@json_option
def command(calibrate: bool, out: Path, force: bool, as_json: bool) -> None:
    """Show what this machine is and what is installed here."""
    from edgekit.doctor import examine

    calibration = _calibrated(out, force) if calibrate else None
    found = examine()
    if as_json:
        print_json(found | {"calibration": calibration})
        return
    click.echo("\n".join(_lines(found)))
    if calibration:
        click.echo(
            f"measured with {calibration['threads']} threads: reads {size_text(calibration['bandwidth_bytes_per_s'])}/s, "
            f"int8 {calibration['int8_ops_per_s'] / 1e9:,.0f} and float32 {calibration['float32_ops_per_s'] / 1e9:,.0f} "
            f"billion operations/s"
        )
        click.echo(f"wrote {out}, which extends {calibration['extends']}: use it as --target {out}")


def _calibrated(out: Path, force: bool) -> dict[str, Any]:
    from edgekit.host_profile import write_profile

    speed, target = write_profile(out, force=force)
    return asdict(speed) | {"file": str(out), "extends": target.extends}


def _lines(found: dict[str, Any]) -> Iterator[str]:
    machine = found["machine"]
    yield f"{machine['processor'] or machine['architecture']}, {machine['system']}, Python {machine['python']}"
    memory = f"{size_text(machine['memory_bytes'])} of memory" if machine["memory_bytes"] else "memory not known"
    free = f", {size_text(machine['free_bytes'])} free" if machine["free_bytes"] else ""
    yield f"  {machine['cores']} cores ({', '.join(machine['instruction_sets']) or 'instruction sets not known'}), {memory}{free}"
    yield f"  {_packages(found['packages'])}"
    for extra in found["extras"]:
        hint = f": {extra['install']}" if extra["missing"] else ""
        yield f"  [{extra['name']}] {_packages(extra['packages'])}{hint}"
    for provider in found["providers"]:
        devices = ", ".join(provider["devices"]) or "no device"
        yield f"  provider {provider['name']}: {provider['problem'] or devices}"
    yield "  sample model: " + ("installed" if found["sample"]["installed"] else found["sample"]["install"])
    yield f"  --rehearse: {found['rehearsal'] or 'not here, it needs Linux'}"


def _packages(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
