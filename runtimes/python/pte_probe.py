"""The process that loads and runs a .pte which nobody knows yet: it may crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgekit.child import answer
from edgekit.errors import BundleError, first_line

from .executorch_runtime import ProgramFile

__all__ = ["probe"]


def probe(*, path: str) -> dict[str, Any]:
    """Ask for its end tokens, compute one token, then several: all that a backend runs.

    Raises:
        BundleError: ExecuTorch does not load or run the program.
    """
    program = ProgramFile(Path(path))
    program.constant("get_eos_ids")
    method = program.load_method("forward")
    try:
        meta = method.method_meta()
        rows, new = meta.input_tensor_meta(0).sizes()
        numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(1, meta.num_inputs())]
        for shape in ((1, 1), (min(rows, 2), min(new, 3))):
            method([torch.zeros(shape, dtype=torch.int64), *numbers])
    except (RuntimeError, IndexError, ValueError) as error:
        raise BundleError(first_line(error)) from error
    return {}


if __name__ == "__main__":
    answer(probe)
