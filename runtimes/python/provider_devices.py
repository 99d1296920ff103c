"""The process that loads a provider's library to see its devices: it may crash."""

from __future__ import annotations

from typing import Any

from edgekit.child import answer

from .providers import find_devices

__all__ = ["devices"]


def devices(*, provider: str) -> dict[str, Any]:
    """The kinds of a provider's devices here."""
    return {"devices": list(find_devices(provider))}


if __name__ == "__main__":
    answer(devices)
