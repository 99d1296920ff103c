"""Progress of long work. The library reports, only the command line draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Progress", "ProgressFn"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of a stage: `done` of `total` units (bytes or tokens, as `unit` says)."""

    stage: str
    done: int
    total: int
    unit: str


ProgressFn: TypeAlias = Callable[[Progress], None]
