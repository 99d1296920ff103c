"""A profile of this machine, measured: what `edgekit doctor --calibrate` writes and `--target FILE` takes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from edgekit.cpu_features import instruction_sets
from edgekit.errors import TargetError, UnsupportedError
from edgekit.machine import Machine, clock_hz, describe_machine, free_memory_bytes
from edgekit.measure import measure_bandwidth
from edgekit.registry import COMPUTE_SPEED, load_attribute
from edgekit.target import CoreGroup, Target, list_targets, load_target

__all__ = ["HostSpeed", "core_groups", "measure_host", "nearest_target", "profile_text", "write_profile"]

COMMAND = "edgekit doctor --calibrate"
APP_SHARE = 0.7  # of installed memory, where the system does not tell what is free
_SYS = Path("/sys")


@dataclass(frozen=True, slots=True)
class HostSpeed:
    """Measured with `threads` threads: bytes a second that are read, and operations a second (a product and its sum are two)."""

    threads: int
    bandwidth_bytes_per_s: int
    int8_ops_per_s: int
    float32_ops_per_s: int


def measure_host(threads: int) -> HostSpeed:
    """Measure this machine, in some seconds; it should be idle.

    Raises:
        MissingExtraError: The package onnx is not installed, which the programs that are timed are made with.
    """
    measure = load_attribute(COMPUTE_SPEED)
    return HostSpeed(
        threads, round(measure_bandwidth(threads)), measure(threads, int8=True), measure(threads, int8=False)
    )


def nearest_target(speed: HostSpeed, machine: Machine, sets: Sequence[str]) -> Target:
    """The built-in profile to extend: of this board, else of a like processor without an NPU, nearest in memory and bandwidth.

    Raises:
        UnsupportedError: There is none for this kind of processor.
    """
    kind = "neon" if "neon" in sets else "avx2"
    candidates = [
        target
        for target in list_targets()
        if kind in target.cpu.instruction_sets
        and "onnx" in target.formats
        and (not target.npu or _is_board(target, machine))
    ]
    if not candidates or kind not in sets:
        raise UnsupportedError(
            f"no built-in profile is like this {machine.architecture} processor",
            hint="write one: see targets/README.md",
        )

    def distance(target: Target) -> tuple[bool, float]:
        memory = math.log(max(machine.memory_bytes, 1) / target.memory.installed_bytes)
        bandwidth = math.log(speed.bandwidth_bytes_per_s / target.memory.bandwidth_bytes_per_s)
        return not _is_board(target, machine), abs(memory) + abs(bandwidth)

    return min(candidates, key=distance)


def _is_board(target: Target, machine: Machine) -> bool:
    """The system names the board as the profile does, which says memory and year in parentheses besides."""
    return target.name.partition(" (")[0].lower() in machine.processor.lower()


def core_groups(machine: Machine, likely_hz: int, root: Path = _SYS) -> tuple[CoreGroup, ...]:
    """Cores by what Linux says of their capacity; those of less than half of the highest are small."""
    name = re.sub(r"[^\w .+-]", "", machine.processor)[:60].strip() or machine.architecture
    capacities = [
        int(path.read_text(encoding="ascii")) for path in root.glob("devices/system/cpu/cpu[0-9]*/cpu_capacity")
    ]
    hertz = clock_hz(root) or likely_hz
    if len(set(capacities)) < 2 or len(capacities) != machine.cores:
        return (CoreGroup(name, machine.cores, hertz),)
    most = max(capacities)
    return tuple(
        CoreGroup(f"{name} {capacity}", capacities.count(capacity), hertz * capacity // most, big=2 * capacity >= most)
        for capacity in sorted(set(capacities), reverse=True)
    )


def profile_text(speed: HostSpeed, base: Target, machine: Machine, sets: Sequence[str], free_bytes: int) -> str:
    """The TOML of a profile that extends `base`; `free_bytes` is what the system says programs may use now, 0 unknown."""
    groups = core_groups(machine, base.cpu.cores[0].clock_hz)
    today, with_threads = date.today().isoformat(), f"{speed.threads} threads"
    installed = machine.memory_bytes or base.memory.installed_bytes
    measured = f"measured, {today}: {COMMAND}"
    sources = {
        "memory.installed_bytes": f"{measured}, as the system says",
        "memory.app_bytes": f"{measured}, memory that was free"
        if free_bytes
        else f"estimate, {today}: {APP_SHARE:.0%} of installed memory",
        "memory.bandwidth_bytes_per_s": f"{measured}, {with_threads} read 256 MB, best pass",
        "cpu.cores": f"{measured}, as the system says{'' if clock_hz() else '; the clock is a guess'}",
        "cpu.instruction_sets": f"{measured}, as the system says",
        "cpu.int8_ops_per_s": f"{measured}, {with_threads}, ONNX Runtime's MatMulInteger, best pass",
    }
    memory = {
        "installed_bytes": installed,
        "app_bytes": min(free_bytes, installed) or int(APP_SHARE * installed),
        "bandwidth_bytes_per_s": speed.bandwidth_bytes_per_s,
    }
    cpu = {
        "cores": [asdict(group) for group in groups],
        "instruction_sets": list(sets),
        "int8_ops_per_s": speed.int8_ops_per_s,
    }
    head = {"extends": base.id, "name": f"This machine ({groups[0].name}, {machine.system})"}
    tables: dict[str, Mapping[str, object]] = {"memory": memory, "cpu": cpu, "sources": sources}
    written = [_table(head), *(f"[{name}]\n{_table(values)}" for name, values in tables.items())]
    return f"# Written by `{COMMAND}`; float32: {speed.float32_ops_per_s:_} operations a second\n" + "\n".join(written)


def _table(values: Mapping[str, object]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in values.items())


def _value(value: object) -> str:
    """A value in TOML, whose texts and lists are those of JSON."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)


def write_profile(path: Path, *, force: bool = False) -> tuple[HostSpeed, Target]:
    """Measure this machine and write its profile; what was measured, and the target that the file is now.

    Raises:
        TargetError: The file exists and `force` is not set, is not called .toml, or can't be written.
        EdgeKitError: It can't be measured.
    """
    if path.suffix != ".toml":
        raise TargetError(f"{path} is no name of a profile", hint="its name ends in .toml")
    if path.exists() and not force:
        raise TargetError(f"{path} exists", hint="use --force to overwrite it, or --out FILE")
    if not path.absolute().parent.is_dir():
        raise TargetError(f"{path} can't be written: there is no such folder", hint="make it, or use --out FILE")
    machine, sets = describe_machine(), instruction_sets()
    speed = measure_host(machine.cores)
    base = nearest_target(speed, machine, sets)
    text = profile_text(speed, base, machine, sets, free_memory_bytes())
    aside = path.with_name(f".{path.name}.toml")
    try:
        aside.write_text(text, encoding="utf-8", newline="\n")
        load_target(aside)  # nothing is left behind that --target would not take
        aside.replace(path)
    except OSError as error:
        raise TargetError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)
    return speed, load_target(path)
