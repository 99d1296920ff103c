"""Literal tables from names to the code that serves them; imported on use, so that the core stays light."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from edgekit.errors import MissingExtraError

__all__ = [
    "ARCHITECTURES",
    "BACKENDS",
    "COMPILERS",
    "COMPUTE_SPEED",
    "CONVERTERS",
    "FORMAT_EXTRAS",
    "LOADER",
    "MEASURE_COSTS",
    "MULTIMODAL",
    "OPTIONAL",
    "OUTLINE_READERS",
    "PROCESS_MEMORY",
    "PROFILE_WORKER",
    "PROGRAM_BYTES",
    "PROVIDERS_OF_FORMATS",
    "PROVIDER_LIST",
    "REHEARSAL_WORKER",
    "SERVER",
    "SERVER_SETTINGS",
    "SOURCE_READERS",
    "check_installed",
    "load_attribute",
]

SOURCE_READERS = {
    "safetensors": "edgekit.converters.from_safetensors:open_directory",
    "gguf": "edgekit.converters.from_gguf:open_gguf",
    "hub": "edgekit.converters.from_hub:open_hub",
}
OUTLINE_READERS = {
    "safetensors": "edgekit.converters.outlines:outline_of_directory",
    "gguf": "edgekit.converters.outlines:outline_of_gguf",
    "hub": "edgekit.converters.outlines:outline_of_hub",
}
ARCHITECTURES = {
    "gemma2": "edgekit.converters.architectures.gemma2",
    "gemma3_text": "edgekit.converters.architectures.gemma3",
    "llama": "edgekit.converters.architectures.llama",
    "ministral": "edgekit.converters.architectures.ministral",
    "ministral3": "edgekit.converters.architectures.ministral3",
    "mistral": "edgekit.converters.architectures.mistral",
    "phi3": "edgekit.converters.architectures.phi3",
    "qwen2": "edgekit.converters.architectures.qwen2",
    "qwen3": "edgekit.converters.architectures.qwen3",
    "smollm3": "edgekit.converters.architectures.smollm3",
}
# Multimodal checkpoints whose text part is one of these, and which one where their text_config does not say.
MULTIMODAL = {"gemma3": "gemma3_text", "mistral3": "mistral"}
CONVERTERS = {
    "coreai": "edgekit.converters.to_coreai:export",
    "onnx": "edgekit.converters.to_onnx:export",
    "onnx-qdq": "edgekit.converters.to_onnx_qdq:export",
    "coreml": "edgekit.converters.to_coreml:export",
    "executorch": "edgekit.converters.to_executorch:export",
    "litert": "edgekit.converters.to_litert:export",
}
BACKENDS = {
    "coreai": "edgekit.runtimes.backend_coreai:CoreAIBackend",
    "onnx": "edgekit.runtimes.backend_onnxruntime:OnnxRuntimeBackend",
    "onnx-qdq": "edgekit.runtimes.backend_onnx_qdq:QdqBackend",
    "executorch": "edgekit.runtimes.backend_executorch:ExecuTorchBackend",
    "coreml": "edgekit.runtimes.backend_coreml:CoreMLBackend",
    "litert": "edgekit.runtimes.backend_litert:LitertBackend",
}
MEASURE_COSTS = "edgekit.converters.sensitivity:measure_costs"
# Formats whose programs can be written to a size: what they would take.
PROGRAM_BYTES = {"onnx": "edgekit.converters.to_onnx:program_bytes"}
# Execution providers that can run a format's programs, besides what the plan prefers in this order; the CPU last.
PROVIDERS_OF_FORMATS = {"onnx": ("cpu",), "onnx-qdq": ("qnn", "openvino", "cpu")}
COMPILERS = {"qnn": "edgekit.runtimes.npu_contexts:write_contexts"}  # of NPU graphs, by provider
LOADER = "edgekit.runtimes.engine:load_model"
PROFILE_WORKER = "edgekit.runtimes.profile_worker"
PROCESS_MEMORY = "edgekit.runtimes.process_memory:memory_use"
COMPUTE_SPEED = "edgekit.runtimes.compute_speed:measure_operations"
PROVIDER_LIST = "edgekit.runtimes.provider_choice:list_providers"
REHEARSAL_WORKER = "edgekit.runtimes.rehearsal_worker"
SERVER = "edgekit.runtimes.server.serve:serve"
SERVER_SETTINGS = "edgekit.runtimes.server.settings:Settings"

# Modules of optional dependencies: the package that brings each, and the extra that asks for it.
OPTIONAL = {
    "onnx": ("onnx", "convert"),
    "threadpoolctl": ("threadpoolctl", "convert"),
    "gguf": ("gguf", "convert"),
    "huggingface_hub": ("huggingface_hub", "convert"),
    "onnxruntime_ep_openvino": ("onnxruntime-ep-openvino", "openvino"),
    "onnxruntime_qnn": ("onnxruntime-qnn", "qnn"),
    "openvino": ("openvino", "openvino"),
    "starlette": ("starlette", "serve"),
    "uvicorn": ("uvicorn", "serve"),
    "pydantic": ("pydantic", "serve"),
    "pydantic_core": ("pydantic", "serve"),
    "prometheus_client": ("prometheus-client", "serve"),
}

# What formats are written and run with besides: the modules of their extra, each with the package that brings it, and for which
# machines there are such packages.
FORMAT_EXTRAS = {
    "executorch": ({"torch": "torch", "executorch": "executorch"}, "Linux, macOS on arm64, Windows on x86-64"),
    "coreml": ({"torch": "torch", "coremltools": "coremltools"}, "macOS on arm64, Linux on x86-64, Python up to 3.13"),
    "coreai": (
        {"torch": "torch", "coreai": "coreai-core", "coreai_torch": "coreai-torch"},
        "macOS 26 and later on arm64, Linux on x86-64",
    ),
    "litert": ({"torch": "torch", "ai_edge_litert": "ai-edge-litert"}, "Linux, macOS on arm64, Windows on x86-64"),
}
# Of these, what conversion alone needs.
ONLY_TO_CONVERT = {"litert": ("torch",)}


def check_installed(format: str, *, to_run: bool = False) -> None:
    """Refuse a format whose extra is not installed, before any work; nothing of it is imported.

    Args:
        to_run: What conversion alone needs may be missing.

    Raises:
        MissingExtraError: The extra's name is the format's.
    """
    modules, machines = FORMAT_EXTRAS.get(format, ({}, ""))
    spared = ONLY_TO_CONVERT.get(format, ()) if to_run else ()
    for module, package in modules.items():
        if module not in spared and not _is_installed(module):
            raise MissingExtraError(package, format, machines)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # imported by hand, without a spec
        return True


def load_attribute(path: str) -> Any:
    """Import `module:attribute` (or just `module`).

    Raises:
        MissingExtraError: An optional dependency is not installed, or what one of a format's packages needs itself. Any other
            ImportError passes through.
    """
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = _missing_extra(path, (error.name or "").partition(".")[0])
        if missing:
            raise missing from error
        raise
    return getattr(module, attribute) if attribute else module


def _missing_extra(path: str, module: str) -> MissingExtraError | None:
    """What to install where a module is missing when `path` is imported; None where no extra brings it."""
    if module in OPTIONAL:
        return MissingExtraError(*OPTIONAL[module])
    if module in {"", "edgekit"}:  # a fault of our own
        return None
    for format, (modules, machines) in FORMAT_EXTRAS.items():
        if path in {CONVERTERS[format], BACKENDS[format]}:
            return MissingExtraError(modules.get(module, module), format, machines)
    return None
