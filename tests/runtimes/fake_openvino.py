"""A stand-in for the package `openvino`, put before it on a child's path: ONNX Runtime's kernels, and a fault to order.

Not a simulation of OpenVINO: it is there to be wrong, so that tests see what EdgeKit makes of a provider that is.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

FAULT = os.environ.get("EDGEKIT_TEST_FAULT", "")
_TYPES = {"float": "f32", "float16": "f16"}

if FAULT == "crash":
    ctypes.string_at(0)
if FAULT == "hang":
    time.sleep(600)


class _Dimension:
    def __init__(self, length: object) -> None:
        self.is_static, self._length = isinstance(length, int), length

    def get_length(self) -> object:
        return self._length


class _Port:
    """An input or output."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def get_any_name(self) -> str:
        return str(self._value.name)

    def get_partial_shape(self) -> Iterator[_Dimension]:
        return (_Dimension(dimension) for dimension in self._value.shape)

    def get_element_type(self) -> _Port:
        return self

    def get_type_name(self) -> str:
        kind = str(self._value.type).removeprefix("tensor(").removesuffix(")")
        return _TYPES.get(kind, kind)


class _Tensor:
    def __init__(self, data: Any) -> None:
        self.data = data


class _Model:
    """A graph, its compiled form and a request to it, in one."""

    def __init__(self, path: Path) -> None:
        self._session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.inputs = [_Port(value) for value in self._session.get_inputs()]
        self.outputs = [_Port(value) for value in self._session.get_outputs()]

    def create_infer_request(self) -> _Model:
        return self

    def infer(self, feed: Mapping[str, Any]) -> None:
        self._found = self._session.run(None, feed)

    def get_output_tensor(self, place: int) -> _Tensor:
        found = self._found[place]
        return _Tensor(np.flip(found, -1).copy() if FAULT == "wrong" else found)


class Core:
    """The part of `openvino.Core` that EdgeKit calls."""

    def read_model(self, path: Path) -> _Model:
        if FAULT == "refuse":
            raise RuntimeError("operation Conjure is not supported\nat core.cpp:117")
        return _Model(path)

    def compile_model(self, model: _Model, device: str, settings: Mapping[str, Any]) -> _Model:
        assert device == "CPU", settings
        return model
