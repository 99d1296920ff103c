"""Names of a Core AI program's functions."""

from __future__ import annotations

__all__ = ["MAIN", "PREPARED"]

MAIN = "main"
PREPARED = "edgekit_prepared"  # what of it depends on constants alone, moved out for the interpreter
