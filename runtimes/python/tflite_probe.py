"""The process that loads and runs a .tflite which nobody knows yet: it may crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgekit.child import answer

from .tflite_file import load_functions

__all__ = ["probe"]


def probe(*, path: str) -> dict[str, Any]:
    """Compute each function on zeros: one token each, and an empty cache.

    Raises:
        BundleError: LiteRT does not load or run the program.
    """
    _, functions = load_functions(Path(path), threads=1)
    for function in functions.values():
        details = function.get_input_details()
        function(**{name: np.zeros(each["shape"], each["dtype"]) for name, each in details.items()})
    return {}


if __name__ == "__main__":
    answer(probe)
