"""The machine that this process runs on: what it is, and its clock and temperature where the system tells them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekit.runtime_options import usable_cores

__all__ = ["Machine", "clock_hz", "describe_machine", "free_memory_bytes", "system_control", "temperature_c"]

_SYS = Path("/sys")
# Kinds of thermal zones, and names of sensor chips, that belong to a processor.
_ZONES = ("cpu", "x86_pkg_temp", "soc", "package", "tctl", "little", "big")
_CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides how fast a program runs here. `memory_bytes` is 0 and `processor` empty where the system does not tell."""

    system: str
    architecture: str
    processor: str
    cores: int
    memory_bytes: int
    python: str
    onnxruntime: str


def describe_machine() -> Machine:
    """This machine."""
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        processor=_processor(),
        cores=usable_cores(),
        memory_bytes=_memory_bytes(),
        python=platform.python_version(),
        onnxruntime=_version("onnxruntime"),
    )


def clock_hz(root: Path = _SYS) -> int | None:
    """The highest clock that a core runs at now; None where the system does not tell (virtual machines, not Linux)."""
    clocks = (_number(path) for path in root.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
    return max((1000 * clock for clock in clocks if clock is not None), default=None)  # the kernel counts in kHz


def temperature_c(root: Path = _SYS) -> float | None:
    """The temperature of the hottest sensor of the processor, in degrees Celsius; None where the system does not tell."""
    # thousandths of a degree; a sensor that is switched off says 0 or less
    found = [value / 1000 for path in _sensors(root) if (value := _number(path)) is not None and value > 0]
    return max(found, default=None)


def free_memory_bytes() -> int:
    """Memory that programs may use now, as the system estimates it; 0 where it does not (macOS)."""
    if sys.platform == "win32":
        return _windows_memory("ullAvailPhys")
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0


def _sensors(root: Path) -> Iterator[Path]:
    for zone in root.glob("class/thermal/thermal_zone*"):
        if any(word in _text(zone / "type").lower() for word in _ZONES):
            yield zone / "temp"
    for chip in root.glob("class/hwmon/hwmon*"):
        if _text(chip / "name") in _CHIPS:
            yield from chip.glob("temp*_input")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace").strip("\0\n ")
    except OSError:  # not there, or a sensor that does not answer now
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.lstrip("-").isdecimal() else None


def _processor() -> str:
    if sys.platform == "darwin":
        return system_control("machdep.cpu.brand_string")
    if sys.platform == "linux":
        for line in _text(Path("/proc/cpuinfo")).splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
        return _text(Path("/proc/device-tree/model"))  # a board, such as Raspberry Pi 5 Model B
    return platform.processor()


def _memory_bytes() -> int:
    if sys.platform == "win32":
        return _windows_memory("ullTotalPhys")
    if sys.platform == "darwin":
        return int(system_control("hw.memsize") or 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _windows_memory(field: str) -> int:
    if sys.platform != "win32":
        return 0
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = (
            ("dwLength", ctypes.c_ulong),
            ("dwMemoryLoad", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("ullTotalPhys", "ullAvailPhys", "a", "b", "c", "d", "e")),
        )

    status = Status(dwLength=ctypes.sizeof(Status))
    return int(getattr(status, field)) if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else 0


def system_control(name: str) -> str:
    """A value that macOS's sysctl tells, or nothing."""
    done = subprocess.run(["/usr/sbin/sysctl", "-n", name], check=False, capture_output=True, text=True)
    return done.stdout.strip()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
