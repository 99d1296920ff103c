"""How fast this machine reads memory and multiplies: what `edgekit doctor --calibrate` puts into a local profile.

Each figure is the best of several passes: others who use the machine only make a pass slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.runtime_options import RuntimeOptions

from .session_options import session_options

__all__ = ["measure_bandwidth", "measure_float32", "measure_int8"]

READ_BYTES = 1 << 28  # larger than any cache
SIZE = 1024  # rows and columns of the matrices: large enough for full speed, small enough for a Raspberry Pi
PASSES = 7


def measure_bandwidth(threads: int, *, passes: int = PASSES) -> int:
    """Bytes a second that `threads` threads read together: each sums its part of 256 MiB with numpy, outside of Python's lock."""
    parts = np.array_split(np.ones(READ_BYTES // 8, np.uint64), threads)
    with ThreadPoolExecutor(threads) as pool:

        def read_all() -> None:
            for _ in pool.map(np.sum, parts):
                pass

        return int(READ_BYTES / _best_s(read_all, passes))


def measure_int8(threads: int, *, passes: int = PASSES) -> int:
    """Operations a second (a product and its addition are two) of ONNX Runtime's MatMulInteger on 1024 x 1024 matrices."""
    generator = np.random.default_rng(0)
    left, right = (generator.integers(0, 128, (SIZE, SIZE)).astype(kind) for kind in (np.uint8, np.int8))
    return _operations_per_s("MatMulInteger", left, right, threads, passes)


def measure_float32(threads: int, *, passes: int = PASSES) -> int:
    """The same of MatMul in float32."""
    generator = np.random.default_rng(0)
    left, right = (generator.standard_normal((SIZE, SIZE)).astype(np.float32) for _ in range(2))
    return _operations_per_s("MatMul", left, right, threads, passes)


def _operations_per_s(
    operator: str, left: NDArray[np.generic], right: NDArray[np.generic], threads: int, passes: int
) -> int:
    session = ort.InferenceSession(
        _one_operator(operator, left, right),
        session_options(RuntimeOptions(threads=threads)),
        providers=["CPUExecutionProvider"],
    )
    return int(2 * SIZE**3 / _best_s(lambda: session.run(None, {"left": left}), passes))


def _one_operator(operator: str, left: NDArray[np.generic], right: NDArray[np.generic]) -> bytes:
    """A program of one matrix product whose right side is constant, as weights are."""
    from onnx import TensorProto, helper, numpy_helper

    result = TensorProto.INT32 if operator == "MatMulInteger" else TensorProto.FLOAT
    kind = helper.np_dtype_to_tensor_dtype(left.dtype)
    graph = helper.make_graph(
        [helper.make_node(operator, ["left", "right"], ["product"])],
        operator,
        [helper.make_tensor_value_info("left", kind, left.shape)],
        [helper.make_tensor_value_info("product", result, left.shape)],
        [numpy_helper.from_array(right, "right")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    made: bytes = model.SerializeToString()
    return made


def _best_s(work: Callable[[], object], passes: int) -> float:
    work()  # touches the memory and starts the threads
    times = []
    for _ in range(passes):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
