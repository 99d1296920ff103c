"""How fast ONNX Runtime multiplies on this machine: what `edgekit doctor --calibrate` puts into a local profile."""

from __future__ import annotations

import time

import numpy as np
import onnxruntime as ort

from edgekit.registry import load_attribute
from edgekit.runtime_options import RuntimeOptions

from .session_options import session_options

__all__ = ["measure_operations"]

SIZE = 1024  # rows and columns of the matrices: large enough for full speed, small enough for a Raspberry Pi
PASSES = 9


def measure_operations(threads: int, *, int8: bool) -> int:
    """Operations a second (a product and its addition are two) of MatMulInteger or, in float32, MatMul.

    Both sides are 1024 x 1024, the right one constant, as weights are. The best of several passes counts: others who use the
    machine only make a pass slower.

    Raises:
        MissingExtraError: The package onnx is not installed.
    """
    settings = session_options(RuntimeOptions(threads=threads))
    session = ort.InferenceSession(_program(int8), settings, providers=["CPUExecutionProvider"])
    left = np.ones((SIZE, SIZE), np.uint8 if int8 else np.float32)
    times = []
    for _ in range(PASSES):
        started = time.perf_counter()
        session.run(None, {"left": left})
        times.append(time.perf_counter() - started)
    return int(2 * SIZE**3 / min(times))


def _program(int8: bool) -> bytes:
    """One product with a constant."""
    helper, arrays, kinds = (load_attribute(f"onnx:{name}") for name in ("helper", "numpy_helper", "TensorProto"))
    left, product = (kinds.UINT8, kinds.INT32) if int8 else (kinds.FLOAT, kinds.FLOAT)
    right = np.random.default_rng(0).integers(-64, 64, (SIZE, SIZE)).astype(np.int8 if int8 else np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger" if int8 else "MatMul", ["left", "right"], ["product"])],
        "product",
        [helper.make_tensor_value_info("left", left, (SIZE, SIZE))],
        [helper.make_tensor_value_info("product", product, (SIZE, SIZE))],
        [arrays.from_array(right, "right")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    made: bytes = model.SerializeToString()
    return made
