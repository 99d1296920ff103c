"""Memory of a process: how much it is, and giving back what is free, on every platform as far as the system allows."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MemoryUse", "memory_use", "peak_rss_bytes", "release_free_memory", "release_pages", "unchanged_mappings"]

_MADV_DONTNEED, _MADV_NOHUGEPAGE = 4, 15  # Linux
_MACH_TASK_BASIC_INFO = 20  # Darwin


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Resident memory of a process, in bytes; 0 where the system does not tell.

    Attributes:
        rss_bytes: All of it.
        private_bytes: What only this process has and can't be read again from a file.
        mapped_bytes: Pages of files: the system takes them back when memory is short.
        peak_rss_bytes: The most that it has had.
    """

    rss_bytes: int = 0
    private_bytes: int = 0
    mapped_bytes: int = 0
    peak_rss_bytes: int = 0


def memory_use(pid: int | None = None) -> MemoryUse:
    """Of this process now, or on Linux of another one, which may have ended: then all is 0."""
    if sys.platform == "linux":
        values = _proc_status(pid)
        rss, private = values.get("VmRSS", 0), values.get("RssAnon", 0)
        return MemoryUse(rss, private, values.get("RssFile", 0), values.get("VmHWM", 0))
    if pid is not None:
        return MemoryUse()
    if sys.platform == "win32":
        counters = _windows_counters()
        rss, private = int(counters.WorkingSetSize), min(int(counters.PrivateUsage), int(counters.WorkingSetSize))
        return MemoryUse(rss, private, rss - private, int(counters.PeakWorkingSetSize))
    return MemoryUse(_darwin_rss() if sys.platform == "darwin" else 0, peak_rss_bytes=_getrusage_peak())


def peak_rss_bytes() -> int:
    """The most resident memory this process has had, in bytes; 0 where the system does not tell."""
    return memory_use().peak_rss_bytes


def _getrusage_peak() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # others count in KiB


def release_free_memory() -> None:
    """Give memory that was freed back to the system. Reading a tokenizer leaves 18 MB that malloc keeps."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does without
        if trim:
            trim(ctypes.c_size_t(0))
    elif sys.platform == "darwin":
        ctypes.CDLL(None).malloc_zone_pressure_relief(None, ctypes.c_size_t(0))


def unchanged_mappings(files: Iterable[Path]) -> frozenset[tuple[int, int]]:
    """First and end address of each mapping of the files that nothing was written to; none where the system does not tell."""
    names = {str(path.resolve()) for path in files}
    try:
        # For smaps the system looks at every page of the process: a tenth of a second in a large one.
        mapped = _proc_text("self/maps")
        if not any(name in mapped for name in names):
            return frozenset()
        lines = _proc_text("self/smaps").splitlines()
    except OSError:  # not Linux, or a system that hides it
        return frozenset()
    found, addresses = set(), ""
    for line in lines:
        fields = line.split(maxsplit=5)
        if not fields[0].endswith(":"):  # the head of a mapping: addresses, rights, offset, device, inode, path
            addresses = fields[0] if fields[-1] in names else ""
        elif addresses and fields[0] == "Anonymous:" and fields[1] == "0":
            first, end = (int(address, 16) for address in addresses.split("-"))
            found.add((first, end))
    return frozenset(found)


def release_pages(mappings: Iterable[tuple[int, int]]) -> None:
    """Let go of the pages of mapped files, as the system does when memory is short; what is needed is mapped again.

    Args:
        mappings: As `unchanged_mappings` has them. They must still be there, and nothing may be written to them, ever.
    """
    advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if not advise:
        return
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for first, end in mappings:
        advise(first, end - first, _MADV_NOHUGEPAGE)  # else one row of an embedding brings 2 MB
        advise(first, end - first, _MADV_DONTNEED)


def _proc_text(name: str) -> str:
    return Path("/proc", name).read_text(encoding="utf-8", errors="surrogateescape")


def _proc_status(pid: int | None) -> dict[str, int]:
    """Sizes in /proc/PID/status, in bytes."""
    try:
        text = _proc_text(f"{pid or 'self'}/status")
    except OSError:
        return {}
    pairs = (line.split() for line in text.splitlines() if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in pairs}


def _darwin_rss() -> int:
    class BasicInfo(ctypes.Structure):  # struct mach_task_basic_info
        _fields_ = (
            ("virtual_size", ctypes.c_uint64),
            ("resident_size", ctypes.c_uint64),
            ("resident_size_max", ctypes.c_uint64),
            ("times", ctypes.c_int32 * 4),
            ("policy", ctypes.c_int32),
            ("suspend_count", ctypes.c_int32),
        )

    system, info = ctypes.CDLL(None), BasicInfo()
    words = ctypes.c_uint32(ctypes.sizeof(info) // 4)
    failed = system.task_info(system.mach_task_self(), _MACH_TASK_BASIC_INFO, ctypes.byref(info), ctypes.byref(words))
    return 0 if failed else int(info.resident_size)


def _windows_counters() -> Any:
    from ctypes import wintypes

    class Counters(ctypes.Structure):  # PROCESS_MEMORY_COUNTERS_EX
        _fields_ = (
            ("cb", wintypes.DWORD),
            ("PageFaultCount", wintypes.DWORD),
            *(
                (name, ctypes.c_size_t)
                for name in (
                    *("PeakWorkingSetSize", "WorkingSetSize", "QuotaPeakPaged", "QuotaPaged", "QuotaPeakNonPaged"),
                    *("QuotaNonPaged", "PagefileUsage", "PeakPagefileUsage", "PrivateUsage"),
                )
            ),
        )

    counters = Counters(cb=ctypes.sizeof(Counters))
    if sys.platform == "win32":
        ctypes.windll.kernel32.GetCurrentProcess.restype = wintypes.HANDLE
        ctypes.windll.psapi.GetProcessMemoryInfo.argtypes = (wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD)
        process = ctypes.windll.kernel32.GetCurrentProcess()
        ctypes.windll.psapi.GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    return counters
