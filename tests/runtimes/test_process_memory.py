"""Memory figures of this process move as memory is used and given back."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.runtimes.process_memory import MemoryUse, memory_use, release_pages, unchanged_mappings

SIZE = 64_000_000
SLACK = 8_000_000  # what the interpreter takes or frees meanwhile
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell, or are not asked")


# In a process of its own: one that ran other tests may serve the block from memory that it holds already.
PRIVATE_BLOCK = f"""
import sys
from edgekit.runtimes.process_memory import memory_use, peak_rss_bytes

before = memory_use()
block = b"x" * {SIZE}
after = memory_use()
assert after.rss_bytes - before.rss_bytes > {SIZE - SLACK}, (before, after)
assert peak_rss_bytes() >= after.rss_bytes - {SLACK}
if sys.platform != "darwin":  # which tells of all resident memory only
    assert after.private_bytes - before.private_bytes > {SIZE - SLACK}, (before, after)
"""


def test_private_memory_counts() -> None:
    done = subprocess.run([sys.executable, "-c", PRIVATE_BLOCK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@linux_only
def test_mapped_pages_are_let_go_of_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "data with a space"
    path.write_bytes(b"abcd" * (SIZE // 4))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        before = memory_use().mapped_bytes
        assert sum(pages[::4096]) == SIZE // 4096 * ord("a")
        touched = memory_use().mapped_bytes
        assert touched - before > SIZE - SLACK
        release_pages(unchanged_mappings([path]))
        assert touched - memory_use().mapped_bytes > SIZE - SLACK
        assert pages[:4] == b"abcd"


@linux_only
def test_changed_pages_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(8192))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        pages[:4] = b"mine"
        release_pages(unchanged_mappings([path]))
        assert pages[:4] == b"mine"


@linux_only
def test_another_process_is_measured_until_it_ends() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert 0 < memory_use(child.pid).rss_bytes != memory_use(os.getpid()).rss_bytes
    finally:
        child.kill()
        child.wait()
    assert memory_use(child.pid) == MemoryUse()
