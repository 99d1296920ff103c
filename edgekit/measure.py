"""What this machine's memory and cores reach, measured."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from edgekit.machine import describe_machine

__all__ = ["measure_bandwidth"]

BUFFER_BYTES = 256_000_000  # more than caches hold
PASSES_S = 0.7
LEAST_PASSES = 4


def measure_bandwidth(threads: int | None = None) -> float:
    """Bytes per second that threads together read from memory, the best of many passes: a pass that was disturbed is no limit.

    Args:
        threads: None takes a thread for each core.
    """
    import numpy as np

    count = threads or describe_machine().cores
    # the largest of 64-bit numbers: a reduction that numpy vectorizes, and that waits for memory and nothing else
    parts = [np.ones(BUFFER_BYTES // 8 // count, np.int64) for _ in range(count)]
    size_bytes = sum(part.nbytes for part in parts)
    best, passes, ends = 0.0, 0, time.perf_counter() + PASSES_S
    with ThreadPoolExecutor(count) as pool:  # numpy lets go of the interpreter's lock meanwhile
        while passes < LEAST_PASSES or time.perf_counter() < ends:
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, size_bytes / (time.perf_counter() - began))
            passes += 1
    return best
