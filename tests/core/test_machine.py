"""What the system tells of itself: a made-up /sys, and this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit.machine import clock_hz, describe_machine, temperature_c
from edgekit.measure import measure_bandwidth


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root


def test_this_machine_has_a_system_cores_and_memory() -> None:
    machine = describe_machine()
    assert machine.system
    assert machine.cores >= 1
    assert machine.memory_bytes > 10**8
    assert machine.onnxruntime[0].isdigit()


def test_clock_is_that_of_the_fastest_core(tmp_path: Path) -> None:
    cpu = "devices/system/cpu"
    files = {f"{cpu}/cpu0/cpufreq/scaling_cur_freq": "600000\n", f"{cpu}/cpu11/cpufreq/scaling_cur_freq": "2400000\n"}
    assert clock_hz(write(tmp_path, files)) == 2_400_000_000


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"class/thermal/thermal_zone0/type": "cpu-thermal\n", "class/thermal/thermal_zone0/temp": "61500\n"}, 61.5),
        ({"class/hwmon/hwmon3/name": "k10temp\n", "class/hwmon/hwmon3/temp1_input": "48250\n"}, 48.25),
        ({"class/thermal/thermal_zone0/type": "battery\n", "class/thermal/thermal_zone0/temp": "30000\n"}, None),
        ({"class/thermal/thermal_zone0/type": "cpu\n", "class/thermal/thermal_zone0/temp": "-274000\n"}, None),
        ({"class/thermal/thermal_zone0/type": "cpu\n", "class/thermal/thermal_zone0/temp": "broken\n"}, None),
        ({}, None),
    ],
    ids=["zone", "sensor chip", "not the processor's", "switched off", "no number", "none"],
)
def test_temperature_is_the_processors(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    assert temperature_c(write(tmp_path, files)) == expected


def test_what_the_system_does_not_tell_is_none(tmp_path: Path) -> None:
    assert clock_hz(tmp_path) is None
    assert temperature_c(tmp_path) is None


def test_bandwidth_is_that_of_memory() -> None:
    """From an old board's to a server's; each of its passes reads more than a cache holds."""
    assert 1e8 < measure_bandwidth(1) < 1e12
