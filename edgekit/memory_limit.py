"""A child process under a limit of memory and cores, as Linux can enforce it.

A control group limits resident memory exactly, in the kernel: version 2 or 1, where this user may make one. Elsewhere on Linux
the child is watched: the kernel keeps its highest resident memory, and the child is killed once that is over the limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, TypeAlias

from edgekit.registry import PROCESS_MEMORY, load_attribute

__all__ = ["ControlGroup", "Enforcer", "Outcome", "make_control_group", "memory_limit", "run_limited"]

Enforcer: TypeAlias = Literal["cgroup-v2", "cgroup-v1", "watched-rss"]
POLL_S = 0.005  # the highest memory is the kernel's own figure: only what comes last before the end can be missed
_JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """A group of our own. Its files are named otherwise in the two versions."""

    directory: Path
    version: Literal[1, 2]

    @property
    def oom_kills(self) -> int:
        """Processes that the kernel has killed for memory."""
        file = self.directory / ("memory.events" if self.version == 2 else "memory.oom_control")
        counts = dict(line.split() for line in file.read_text(encoding="ascii").splitlines())
        return int(counts.get("oom_kill", 0))

    def set_limit(self, limit_bytes: int) -> None:
        """Limit memory, and leave no way out through swap."""
        limit, total = {
            2: ("memory.max", "memory.swap.max"),
            1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
        }[self.version]
        (self.directory / limit).write_text(str(limit_bytes), encoding="ascii", newline="\n")
        swap = self.directory / total
        if swap.exists():  # not where the system has no swap accounting
            swap.write_text("0" if self.version == 2 else str(limit_bytes), encoding="ascii", newline="\n")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a child ended: its exit code, its highest resident memory, and whether it was killed for memory."""

    returncode: int
    peak_rss_bytes: int
    killed: bool


@dataclass(slots=True)
class MemoryLimit:
    """A limit that is in force; `group` is None where the child is watched."""

    limit_bytes: int
    group: ControlGroup | None
    enforced_by: Enforcer = field(init=False)

    def __post_init__(self) -> None:
        self.enforced_by = ("cgroup-v1", "cgroup-v2")[self.group.version - 1] if self.group else "watched-rss"


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[MemoryLimit | None]:
    """The best limit that can be had here; None where there is none (not Linux)."""
    if sys.platform != "linux":
        yield None
        return
    group = make_control_group(limit_bytes)
    try:
        yield MemoryLimit(limit_bytes, group)
    finally:
        if group:
            _remove(group.directory)


def make_control_group(
    limit_bytes: int, mounts: Path = Path("/proc/self/mounts"), own: Path = Path("/proc/self/cgroup")
) -> ControlGroup | None:
    """A new group with a limit, below or beside the one this process is in; None where that is not permitted."""
    for version, parent in _parents(mounts, own):
        group = ControlGroup(parent / f"edgekit-{uuid.uuid4().hex[:12]}", version)
        try:
            group.directory.mkdir()
        except OSError:
            continue
        try:
            group.set_limit(limit_bytes)
            return group
        except OSError:  # without the memory controller a group has no such file
            _remove(group.directory)
    return None


def _parents(mounts: Path, own: Path) -> Iterator[tuple[Literal[1, 2], Path]]:
    """Groups that could hold ours. In version 2 one that holds processes can't pass memory on, but its parent may."""
    try:
        paths = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # a kernel without control groups, or a sandbox that hides them
        return
    for line in lines:
        _, mount, kind, options, *_ = line.split(" ")
        for _, controllers, path in paths:
            place = Path(mount) / path.strip("/")
            if kind == "cgroup2" and not controllers:
                yield from ((2, parent) for parent in ((place.parent, place) if path != "/" else (place,)))
            elif kind == "cgroup" and "memory" in options.split(",") and "memory" in controllers.split(","):
                yield 1, place


def _remove(directory: Path) -> None:
    """A group can be removed once the kernel has seen its last process end."""
    for _ in range(100):
        try:
            directory.rmdir()
            return
        except OSError:
            time.sleep(POLL_S)


def run_limited(
    command: Sequence[str],
    limit: MemoryLimit | None,
    *,
    cores: int = 0,
    stdin: IO[bytes] | None = None,
    stdout: IO[bytes] | None = None,
) -> Outcome:
    """Run a command to its end.

    Args:
        limit: None measures only.
        cores: Most processors it may use; 0 and what exceeds the machine's are no limit.
        stdin, stdout: Where its input comes from and its output goes, if not as for this process.
    """
    if limit and limit.group:
        command = ["/bin/sh", "-c", _JOIN, str(limit.group.directory), *command]
    child = subprocess.Popen(command, stdin=stdin, stdout=stdout)
    try:
        _pin(child.pid, cores)
        peak, killed = 0, False
        memory_use = load_attribute(PROCESS_MEMORY)
        while child.poll() is None:
            peak = max(peak, memory_use(child.pid).peak_rss_bytes)
            if limit and not limit.group and peak > limit.limit_bytes:
                killed = True
                child.kill()
            time.sleep(POLL_S)
    finally:
        child.kill()
        child.wait()
    killed = killed or bool(limit and limit.group and limit.group.oom_kills)
    return Outcome(child.returncode, peak, killed)


def _pin(pid: int, cores: int) -> None:
    if sys.platform == "linux" and cores:
        os.sched_setaffinity(pid, sorted(os.sched_getaffinity(pid))[:cores])
