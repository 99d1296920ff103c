"""The manifest of a program as far as it is known before verification: what it is, and what it was made from and with."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from typing import Any

from edgekit.bundle import Manifest, Program
from edgekit.graph import Graph
from edgekit.plan import Plan
from edgekit.source import Source

__all__ = ["NOT_VERIFIED", "describe"]

NOT_VERIFIED: Mapping[str, Any] = {
    "status": "not-executed",
    "executed": None,
    "reason": "converted without verification",
}
_TOOLS = ("edgekit-toolkit", "numpy", "onnx", "onnxruntime", "gguf")


def describe(source: Source, plan: Plan, graph: Graph) -> Manifest:
    """Put source, plan and program into a manifest that has no files and no quality card yet."""
    config, tokenizer, provenance = source.config, source.tokenizer, source.provenance
    versions = {"python": platform.python_version()} | dict(_installed_versions())
    return Manifest(
        edgekit_version=versions["edgekit-toolkit"],
        model={
            "name": provenance.name,
            "model_type": config.model_type,
            "parameters": source.parameters,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "layers": len(config.layers),
            "trained_context": config.context,
        },
        target=plan.target,
        plan=plan.to_json() | {"scheme": plan.scheme.to_json(), "accuracy_level": plan.accuracy_level},
        programs=(Program(graph, plan.context, NOT_VERIFIED),),
        eos_token_ids=tokenizer.eos_token_ids,
        bos_token_id=tokenizer.bos_token_id,
        special_tokens=tokenizer.special_tokens,
        chat_template=tokenizer.chat_template,
        generation_defaults=tokenizer.generation_defaults,
        provenance={
            "kind": provenance.kind,
            "name": provenance.name,
            "revision": provenance.revision,
            "tools": versions,
            "machine": platform.machine(),
        },
        licence=provenance.licence,
    )


def _installed_versions() -> Iterator[tuple[str, str]]:
    for name in _TOOLS:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"
