"""ExecuTorch's Python runtime: programs from files, methods, and the threads that they share.

The bindings are taken from their own module: `executorch.runtime` loads the whole exporter first, which takes seconds and 140 MB.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from edgekit.errors import BundleError, MissingExtraError, first_line
from edgekit.quiet import quieted

__all__ = ["ProgramFile", "executorch_version", "set_threads"]

# Libraries of operators in the package: attention with a cache, and quantized embeddings. Loading one registers them.
_OPERATORS = (("extension/llm/custom_ops", "*custom_ops_aot_lib.*"), ("kernels/quantized", "*quantized_ops_aot_lib.*"))
# runtime/core/error.h
_REASONS = {
    0x10: "an operation that this ExecuTorch does not support",
    0x12: "arguments that it does not take",
    0x14: "operators that this ExecuTorch does not have",
    0x20: "a delegate or data that are not there",
    0x21: "more memory than there is",
    0x23: "a malformed program",
    0x30: "a delegate of another version",
}


def executorch_version() -> str:
    """The installed package's version."""
    return importlib.metadata.version("executorch")


class ProgramFile:
    """A .pte file in memory, mapped or read.

    Args:
        path: The file; see `pte_file.check_pte` for what must be checked first.
        mapped: Map the weights rather than read them.

    Raises:
        BundleError: ExecuTorch does not take it.
    """

    def __init__(self, path: Path, *, mapped: bool = True) -> None:
        bindings, self.path = _bindings(), path
        self._data = b"" if mapped else path.read_bytes()  # the program refers to it
        verification = bindings.Verification.InternalConsistency
        try:
            with quieted():
                self._program: Any = (
                    bindings._load_program(str(path), program_verification=verification)
                    if mapped
                    else bindings._load_program_from_buffer(self._data, program_verification=verification)
                )
        except Exception as error:  # the bindings raise RuntimeError, and what C++ threw
            raise _not_loaded(path, error) from error

    def constant(self, name: str) -> list[Any] | None:
        """What a method without inputs returns; None where there is none of this name.

        Raises:
            BundleError: ExecuTorch does not run it.
        """
        if name not in [self._program.get_method_name(index) for index in range(self._program.num_methods())]:
            return None
        method = self.load_method(name)
        try:
            return list(method.call(()))
        except RuntimeError as error:
            raise _not_loaded(self.path, error) from error

    def load_method(self, name: str) -> Any:
        """A method with its weights packed for this processor.

        Raises:
            BundleError: There is none of this name, or ExecuTorch does not load it.
        """
        try:
            with quieted():
                return self._program.load_method(name)
        except Exception as error:
            raise _not_loaded(self.path, error) from error


def set_threads(threads: int) -> None:
    """Let this process's methods compute with so many threads; 0 leaves it to ExecuTorch, which takes the big cores.

    There is one pool for all models of a process, so this is called before each forward; it costs where the number changes.
    """
    bindings, big_cores = _bindings(), _big_cores()
    wanted = threads or big_cores
    if bindings._threadpool_get_thread_count() != wanted:
        bindings._unsafe_reset_threadpool(wanted)


@cache
def _big_cores() -> int:
    """How many threads ExecuTorch takes by itself: asked before any number was set."""
    return int(_bindings()._threadpool_get_thread_count())


@cache
def _bindings() -> Any:
    home = _home()
    if sys.platform == "win32":
        os.add_dll_directory(str(home / "extension" / "pybindings"))
    with quieted():  # it prints how it looks for the processor's name
        from executorch.extension.pybindings import _C

        for folder, pattern in _OPERATORS:
            for library in sorted((home / folder).glob(pattern)):
                torch.ops.load_library(library)  # type: ignore[no-untyped-call]  # it has no types
        _C._threadpool_get_thread_count()
    return _C


def _home() -> Path:
    spec = importlib.util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("executorch", "executorch")
    return Path(next(iter(spec.submodule_search_locations)))


def _not_loaded(path: Path, error: Exception) -> BundleError:
    said = first_line(error)
    code = re.search(r"0x:?([0-9a-f]+)", said)
    reason = _REASONS.get(int(code[1], 16), said) if code else said
    return BundleError(
        f"{path.name} is not loaded by ExecuTorch {executorch_version()}: {reason}",
        hint="convert the model again with this version of EdgeKit",
    )
