"""OpenVINO's own library as a session, where ONNX Runtime's plugin of it offers no device.

The plugin lists devices of Intel's only. On other x86-64 machines, build machines above all, the same reader of ONNX files
and the same processor kernels are called directly, so that a program for Intel is executed before it ships.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

__all__ = ["OpenVinoSession"]

# OpenVINO's element types as ONNX Runtime names them.
_TYPES = {
    "f32": "float",
    "f16": "float16",
    "i64": "int64",
    "i32": "int32",
    "u16": "uint16",
    "u8": "uint8",
    "i8": "int8",
}


@dataclass(frozen=True, slots=True)
class _Value:
    """An input or output: its name, its shape (None where a dimension is not fixed) and ONNX Runtime's word for its type."""

    name: str
    shape: list[int | None]
    type: str


class OpenVinoSession:
    """An ONNX file on OpenVINO's CPU device; a `GraphSession`.

    Args:
        path: The file.
        threads: 0 leaves it to OpenVINO.

    Raises:
        RuntimeError: OpenVINO does not read or compile the graph.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        # Else it computes in bfloat16 where the processor can, and rounds activations to 8 bits at weights that are stored in
        # 8: right for speed, wrong for telling what a program is worth.
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "EXECUTION_MODE_HINT": "ACCURACY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        model = core.read_model(path)
        # The file's own names: compiling merges operators, and their outputs' names with them.
        self._inputs = [_described(port) for port in model.inputs]
        self._outputs = [_described(port) for port in model.outputs]
        self._places = {value.name: place for place, value in enumerate(self._outputs)}
        self._lock = threading.Lock()
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[NDArray[np.generic]]:
        """See `GraphSession.run`. The arrays are copies."""
        places = range(len(self._outputs)) if output_names is None else [self._places[name] for name in output_names]
        with self._lock:  # sequences of several threads share the session, whose one request holds inputs and outputs
            self._request.infer(dict(input_feed))
            return [np.array(self._request.get_output_tensor(place).data) for place in places]

    def get_inputs(self) -> list[Any]:
        """See `GraphSession.get_inputs`."""
        return list(self._inputs)

    def get_outputs(self) -> list[Any]:
        """See `GraphSession.get_outputs`."""
        return list(self._outputs)


def _described(port: Any) -> _Value:
    shape = [dimension.get_length() if dimension.is_static else None for dimension in port.get_partial_shape()]
    kind = port.get_element_type().get_type_name()
    return _Value(port.get_any_name(), shape, f"tensor({_TYPES.get(kind, kind)})")
