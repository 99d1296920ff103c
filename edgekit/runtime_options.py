"""RuntimeOptions: how a runtime loads a program. A target's profile chooses them, the plan and the manifest carry them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

__all__ = ["MOST_THREADS", "RuntimeOptions", "usable_cores"]

MOST_THREADS = 1024


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """How a runtime loads a program of one format.

    Attributes:
        threads: For computing; 0 takes the big cores.
        spinning: Threads wait busily for work: faster, and costs battery.
        arena: Freed memory is kept for the next step.
        prepacking: Weights are copied to the kernels' own layout at load.
        mapped_weights: Weights are mapped from the file; false reads them into memory first, for files that may go away.
    """

    threads: int = field(default=0, metadata={"least": 1, "most": MOST_THREADS})
    spinning: bool = True
    arena: bool = True
    prepacking: bool = True
    mapped_weights: bool = True


def usable_cores() -> int:
    """Cores that this process may use: containers are often given fewer than there are."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
