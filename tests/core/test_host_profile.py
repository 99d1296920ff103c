"""Profiles of machines that are made up: what they extend, their cores, and that --target takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.cpu_features import instruction_sets
from edgekit.errors import TargetError, UnsupportedError
from edgekit.host_profile import HostSpeed, core_groups, nearest_target, profile_text, write_profile
from edgekit.machine import Machine
from edgekit.target import load_target

SPEED = HostSpeed(4, 11_000_000_000, 250_000_000_000, 60_000_000_000)
ARM, X86 = ("neon", "fp16", "dotprod"), ("avx2", "avx512-vnni")


def machine(processor: str, memory_bytes: int = 2**33, cores: int = 4) -> Machine:
    return Machine("Linux 6.12", "aarch64", processor, cores, memory_bytes, "3.13", "1.31")


@pytest.mark.parametrize(
    ("processor", "memory_bytes", "sets", "expected"),
    [
        ("Raspberry Pi 5 Model B Rev 1.0", 2**33, ARM, "raspberry-pi-5"),
        ("Raspberry Pi 5 Model B Rev 1.0", 2**32, ARM, "raspberry-pi-5-4gb"),
        ("Raspberry Pi Zero 2 W Rev 1.0", 2**29, ("neon",), "raspberry-pi-zero-2w"),
        ("AMD EPYC", 2**35, X86, "linux-x86-64"),
        ("Intel(R) Core(TM) i5-8250U", 2**33, ("avx2",), "linux-x86-64"),
    ],
)
def test_profile_extends_the_board_or_the_nearest_machine(
    processor: str, memory_bytes: int, sets: tuple[str, ...], expected: str
) -> None:
    assert nearest_target(SPEED, machine(processor, memory_bytes), sets).id == expected


def test_unknown_board_inherits_no_npu() -> None:
    assert nearest_target(SPEED, machine("Orange Pi 5 Plus", 2**34), ARM).npu is None


def test_processor_that_no_profile_is_like_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no built-in profile is like this"):
        nearest_target(SPEED, machine("SpacemiT K1"), ("rvv",))


def test_small_cores_are_told_by_their_capacity(tmp_path: Path) -> None:
    for core, capacity in enumerate((1024, 1024, 400, 400, 400, 400)):
        folder = tmp_path / "devices" / "system" / "cpu" / f"cpu{core}"
        folder.mkdir(parents=True)
        (folder / "cpu_capacity").write_text(f"{capacity}\n", encoding="ascii")
    big, small = core_groups(machine("board", cores=6), 2_000_000_000, tmp_path)
    assert (big.count, big.big, big.clock_hz) == (2, True, 2_000_000_000)
    assert (small.count, small.big) == (4, False)
    (alike,) = core_groups(machine("board", cores=6), 2_000_000_000, tmp_path / "nothing")
    assert (alike.count, alike.big) == (6, True)


@given(st.text(), st.integers(0, 2**36))
def test_whatever_the_system_says_the_profile_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, processor: str, free_bytes: int
) -> None:
    host = machine(processor)
    path = tmp_path_factory.getbasetemp() / "host.toml"
    text = profile_text(
        SPEED, load_target("raspberry-pi-5"), host, ARM, max(free_bytes, 0) if free_bytes >= 2**24 else 0
    )
    path.write_text(text, encoding="utf-8", newline="\n")
    target = load_target(path)
    assert target.extends == "raspberry-pi-5"
    assert target.memory.bandwidth_bytes_per_s == SPEED.bandwidth_bytes_per_s
    assert target.cpu.int8_ops_per_s == SPEED.int8_ops_per_s
    assert target.cpu.instruction_sets == ARM
    assert target.memory.app_bytes <= target.memory.installed_bytes == host.memory_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: x\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", ("avx2", "avx512", "avx512-vnni")),
        ("Features\t: fp asimd evtstrm asimdhp asimddp i8mm\n", ("neon", "fp16", "dotprod", "i8mm")),
        ("Features\t: fp asimd crc32\n", ("neon",)),
        ("", ()),
    ],
    ids=["x86-64", "Armv8.6", "Armv8.0", "nothing"],
)
def test_instruction_sets_are_read_from_what_linux_says(tmp_path: Path, text: str, expected: tuple[str, ...]) -> None:
    import sys

    if sys.platform != "linux":
        pytest.skip("other systems are asked otherwise")
    path = tmp_path / "cpuinfo"
    path.write_text(text, encoding="ascii")
    assert instruction_sets(path) == expected


def test_profile_is_not_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("kept", encoding="ascii")
    with pytest.raises(TargetError, match="exists"):
        write_profile(path)
    with pytest.raises(TargetError, match="no name of a profile"):
        write_profile(tmp_path / "mine.json")
    with pytest.raises(TargetError, match="no such folder"):
        write_profile(tmp_path / "nowhere" / "mine.toml")
    assert path.read_text(encoding="ascii") == "kept"
