"""ONNX Runtime's session options, from those of a bundle's program."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort

from edgekit.runtime_options import RuntimeOptions

__all__ = ["session_options"]


def session_options(options: RuntimeOptions) -> Any:
    """An `onnxruntime.SessionOptions`. With 0 threads ONNX Runtime decides on their number; `mapped_weights` is the backend's."""
    made = ort.SessionOptions()
    made.intra_op_num_threads = options.threads
    made.enable_cpu_mem_arena = options.arena
    made.enable_mem_pattern = False  # it keeps a block for each shape of input: 5 MB for a 135M model, and no speed
    made.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spinning)))
    made.add_session_config_entry("session.disable_prepacking", str(int(not options.prepacking)))
    return made
