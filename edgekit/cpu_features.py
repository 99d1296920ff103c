"""The instruction sets of this machine's processor, by the names that target profiles use, where the system tells them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from edgekit.machine import system_control

__all__ = ["instruction_sets"]

# What Linux calls them in /proc/cpuinfo: "flags" on x86-64, "Features" on ARM (Documentation/arch/arm64/elf_hwcaps.rst).
_LINUX = {
    "asimd": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve2": "sve2",
    "sme": "sme",
    "sme2": "sme2",
    "avx2": "avx2",
    "avx_vnni": "avx-vnni",
    "avx512f": "avx512",
    "avx512_vnni": "avx512-vnni",
    "amx_int8": "amx-int8",
}
# What macOS says 1 to (Apple, "Determining instruction set characteristics").
_DARWIN = {
    "hw.optional.AdvSIMD": "neon",
    "hw.optional.arm.FEAT_FP16": "fp16",
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.arm.FEAT_SME2": "sme2",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512",
}
# Numbers of IsProcessorFeaturePresent (winnt.h); no number stands for those that are left out.
_WINDOWS = {19: "neon", 43: "dotprod", 40: "avx2", 41: "avx512"}


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Those that decide how fast weights are multiplied; empty where the system does not tell."""
    if sys.platform == "darwin":
        return tuple(name for key, name in _DARWIN.items() if system_control(key) == "1")
    if sys.platform == "win32":
        import ctypes

        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        arm = platform.machine().lower() == "arm64"
        return tuple(
            name for number, name in _WINDOWS.items() if present(number) and (name in {"neon", "dotprod"}) == arm
        )
    return _named(cpuinfo, _LINUX)


def _named(cpuinfo: Path, names: Mapping[str, str]) -> tuple[str, ...]:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    words = {word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split()}
    return tuple(name for word, name in names.items() if word in words)
