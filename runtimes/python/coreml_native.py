"""Core ML itself, on macOS 15 or later, through coremltools."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BundleError, GenerationError, MissingExtraError, first_line
from edgekit.quiet import quieted

from .backend import Runtime
from .mil_types import ArrayLike

__all__ = ["NativeProgram"]


class NativeProgram:
    """A package's functions, each of them a model of its own to Core ML, which maps the weights once.

    States made for one function serve the others: they are declared alike.

    Args:
        package: The .mlpackage; it is compiled to a temporary directory, which goes when nothing uses this any more.
        functions: The functions to load.

    Raises:
        BundleError: Core ML does not compile or load it, as on macOS 14, which knows no states.
        MissingExtraError: coremltools is not installed.
    """

    runtime = Runtime("coreml")

    def __init__(self, package: Path, functions: Sequence[str]) -> None:
        directory = tempfile.mkdtemp(prefix="edgekit-")
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        path = str(Path(directory) / "model.mlmodelc")
        try:
            with quieted():
                from coremltools.models import CompiledMLModel
                from coremltools.models.utils import compile_model

                compile_model(str(package), path)
                self._models = {name: CompiledMLModel(path, function_name=name) for name in functions}
        except ModuleNotFoundError as error:
            raise MissingExtraError("coremltools", "coreml") from error
        except Exception as error:  # coremltools passes on what Core ML says as RuntimeError and plain Exception
            raise BundleError(f"{package.name} is not loaded by Core ML: {first_line(error)}") from error
        self._first = functions[0]

    def new_states(self) -> Any:
        """See `CoreMLProgram.new_states`."""
        return self._models[self._first].make_state()

    def run(self, function: str, inputs: Mapping[str, NDArray[np.int32]], states: Any, output: str) -> ArrayLike:
        """See `CoreMLProgram.run`.

        Raises:
            GenerationError: Core ML fails.
        """
        try:
            return np.asarray(self._models[function].predict(dict(inputs), states)[output])
        except Exception as error:  # as above
            raise GenerationError(f"Core ML failed: {first_line(error)}") from error

    def read_state(self, states: Any, name: str) -> ArrayLike:
        """See `CoreMLProgram.read_state`."""
        return np.asarray(states.read_state(name))

    def write_state(self, states: Any, name: str, array: ArrayLike) -> None:
        """See `CoreMLProgram.write_state`."""
        states.write_state(name, array)
