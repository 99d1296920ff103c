"""Execution providers of ONNX Runtime: which there are, what devices they have here, and sessions that run on one of them.

A plugin provider comes in a package of its own, whose library is registered with ONNX Runtime when it is first asked for.
Registering loads a vendor's drivers into this process: `provider_choice` first tries it in another one.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.errors import BundleError, UnsupportedError, first_line
from edgekit.registry import load_attribute

__all__ = [
    "PROVIDERS",
    "ExecutionProvider",
    "GraphSession",
    "executor_name",
    "find_devices",
    "is_installed",
    "open_session",
    "package_versions",
]

_QUIET = 3  # ONNX Runtime's severity "error": its warnings are for the program's author
_DISABLE_FALLBACK = "session.disable_cpu_ep_fallback"
_PROCESS = threading.RLock()  # one at a time changes what belongs to the whole process: its providers, its stdout


@dataclass(frozen=True, slots=True)
class ExecutionProvider:
    """A provider: ONNX Runtime's name for it, and the module and distribution that bring its library.

    `devices` are the kinds it is worth choosing for, best first; on others it only runs when it is asked for, to verify.
    """

    ep_name: str
    module: str = ""
    distribution: str = "onnxruntime"
    devices: tuple[str, ...] = ()


PROVIDERS: Mapping[str, ExecutionProvider] = {
    "cpu": ExecutionProvider("CPUExecutionProvider", devices=("cpu",)),
    "qnn": ExecutionProvider("QNNExecutionProvider", "onnxruntime_qnn", "onnxruntime-qnn", ("npu",)),
    "openvino": ExecutionProvider(
        "OpenVINOExecutionProvider", "onnxruntime_ep_openvino", "onnxruntime-ep-openvino", ("npu",)
    ),
}
# What ran a program, as `verify` and the manifest call it. QNN's only device that is no NPU is the emulator of one.
_EXECUTORS = {
    ("cpu", "cpu"): "onnxruntime",
    ("qnn", "npu"): "qnn-htp",
    ("qnn", "cpu"): "qnn-htp-emulator",
}


class GraphSession(Protocol):
    """What a session must do, whoever made it: the part of `onnxruntime.InferenceSession` that backends use."""

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[NDArray[np.generic]]:
        """Compute outputs, by name or all of them."""
        ...

    def get_inputs(self) -> list[Any]:
        """The inputs: each has a name, a shape and a type."""
        ...

    def get_outputs(self) -> list[Any]:
        """The outputs, likewise."""
        ...


def executor_name(provider: str, device: str) -> str:
    """The name under which a quality card says what ran a program."""
    return _EXECUTORS.get((provider, device), f"{provider}-{device}")


def is_installed(provider: str) -> bool:
    """Whether a provider's package is there; nothing of it is loaded."""
    module = _known(provider).module
    return not module or _is_importable(module) or _runs_alone(provider)


def package_versions(provider: str) -> dict[str, str]:
    """The versions that decide how a provider behaves, by distribution."""
    names = ["onnxruntime", _known(provider).distribution, *(["openvino"] if provider == "openvino" else [])]
    return {name: _version(name) for name in names}


def find_devices(provider: str) -> dict[str, Any]:
    """The devices of a provider on this machine, by kind: `npu`, `gpu`, `cpu`.

    Raises:
        MissingExtraError: Its package is not installed.
        BundleError: Its library is not loaded.
    """
    described = _known(provider)
    if _is_importable(described.module) or not _runs_alone(provider):
        with _PROCESS:
            _register(provider)
    found: dict[str, Any] = {}
    for device in ort.get_ep_devices():
        if device.ep_name == described.ep_name:
            found.setdefault(device.device.type.name.lower(), device)
    if _runs_alone(provider):
        found.setdefault("cpu", None)
    return found


def open_session(
    path: Path,
    provider: str = "cpu",
    *,
    device: str | None = None,
    options: Any = None,
    provider_options: Mapping[str, str] | None = None,
    only: bool = False,
) -> GraphSession:
    """Load an ONNX file on one provider.

    Args:
        path: The file.
        provider: `cpu`, `qnn` or `openvino`.
        device: `npu`, `gpu` or `cpu`; None takes the best that the provider has here.
        options: An `onnxruntime.SessionOptions` to start from. It is changed.
        provider_options: The provider's own, by its names; those that EdgeKit sets can be replaced.
        only: Refuse a graph of which any part would run on ONNX Runtime's own CPU kernels.

    Raises:
        MissingExtraError: The provider's package is not installed.
        UnsupportedError: The provider is not known, or has no such device here.
        BundleError: The provider does not take the graph.
    """
    options = options or ort.SessionOptions()
    options.log_severity_level = _QUIET
    kind, found = _pick_device(provider, device)
    if only and provider != "cpu":
        options.add_session_config_entry(_DISABLE_FALLBACK, "1")
    try:
        session = _open(path, provider, found, options, dict(provider_options or {}))
    except Exception as error:  # ONNX Runtime's errors share no base class but this
        raise BundleError(
            f"{path.name} is not taken by {executor_name(provider, kind)}: {first_line(error)}",
            hint="use --provider cpu, or convert the model again with this version of EdgeKit",
        ) from error
    if only and provider != "cpu":
        _check_fixed_shapes(session, path)
    return session


def _open(path: Path, provider: str, device: Any, options: Any, provider_options: dict[str, str]) -> GraphSession:
    if provider == "cpu":
        cpu: GraphSession = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return cpu
    if device is None:
        from .openvino_session import OpenVinoSession

        return OpenVinoSession(path, threads=options.intra_op_num_threads)
    options.add_provider_for_devices([device], _options_of(provider) | provider_options)
    with _stdout_kept():
        plugin: GraphSession = ort.InferenceSession(path, options)
        return plugin


def _check_fixed_shapes(session: GraphSession, path: Path) -> None:
    """NPUs take fixed dimensions only; their emulators and a vendor's library for the CPU would take more."""
    for value in (*session.get_inputs(), *session.get_outputs()):
        if not all(isinstance(dimension, int) for dimension in value.shape):
            raise BundleError(
                f"{path.name}: {value.name} has a dimension that is not fixed, which no NPU takes",
                hint="convert the model again with this version of EdgeKit",
            )


def _is_importable(module: str) -> bool:
    return bool(module) and importlib.util.find_spec(module) is not None


def _runs_alone(provider: str) -> bool:
    """Whether the vendor's own library is there, which is called where the plugin has no device: see `openvino_session`."""
    return provider == "openvino" and _is_importable("openvino")


def _known(provider: str) -> ExecutionProvider:
    if provider not in PROVIDERS:
        raise UnsupportedError(f"provider {provider!r} is not known", hint=f"known: {', '.join(PROVIDERS)}")
    return PROVIDERS[provider]


@functools.cache
def _register(provider: str) -> None:
    """Load a provider's library, once a process: ONNX Runtime refuses a second time."""
    described = _known(provider)
    if not described.module:
        return
    path = load_attribute(f"{described.module}:get_library_path")()
    try:
        ort.register_execution_provider_library(described.ep_name, path)
    except Exception as error:  # as above
        raise BundleError(
            f"the library of {described.distribution} is not loaded: {first_line(error)}",
            hint=f"install it again, or use --provider cpu: {described.distribution} {_version(described.distribution)}",
        ) from error


def _pick_device(provider: str, wanted: str | None) -> tuple[str, Any]:
    devices = find_devices(provider)
    order = (wanted,) if wanted else (*_known(provider).devices, "gpu", "cpu")
    for kind in order:
        if kind in devices:
            return kind, devices[kind]
    raise UnsupportedError(
        f"{provider} has no {wanted or 'device'} here",
        hint=f"it has: {', '.join(devices) or 'none'}; use --provider cpu",
    )


def _options_of(provider: str) -> dict[str, str]:
    if provider == "qnn":
        path: str = load_attribute("onnxruntime_qnn:get_qnn_htp_path")()
        return {"backend_path": path}
    return {}


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """Send what a vendor's library writes to stdout to stderr: stdout is for data. One thread at a time."""
    with _PROCESS, _stdout_moved():
        yield


@contextmanager
def _stdout_moved() -> Iterator[None]:
    try:
        os.fstat(2)
        kept = os.dup(1)
    except OSError:  # a windowed app has neither
        yield
        return
    if sys.stdout:
        sys.stdout.flush()
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
