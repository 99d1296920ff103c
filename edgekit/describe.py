"""The manifest of a program as far as it is known before verification: what it is, and what it was made from and with."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from edgekit.bundle import Manifest, Program
from edgekit.graph import Graph, TensorReport
from edgekit.plan import Plan
from edgekit.precision import kept_in_floats
from edgekit.source import Source

__all__ = ["NOT_VERIFIED", "describe", "outlier_note"]

NOT_VERIFIED: Mapping[str, Any] = {
    "status": "not-executed",
    "executed": None,
    "reason": "converted without verification",
}
OUTLIER = 100.0  # times the root mean square of its tensor; SmolLM2-135M's largest weight is at 51
_TOOLS = ("edgekit-toolkit", "numpy", "onnx", "onnxruntime", "gguf")
# Besides, what writes and runs programs of a format; a bundle without one has nothing of them.
_TOOLS_OF_FORMATS = {
    "executorch": ("torch", "executorch"),
    "coreml": ("torch", "coremltools"),
    "coreai": ("torch", "coreai-core", "coreai-torch"),
    "litert": ("torch", "ai-edge-litert"),
}


def describe(source: Source, plan: Plan, graph: Graph) -> Manifest:
    """Put source, plan and program into a manifest that has no files and no quality card yet."""
    config, tokenizer, provenance = source.config, source.tokenizer, source.provenance
    graph = replace(graph, kept_in_floats={**kept_in_floats(plan), **graph.kept_in_floats})
    versions = {"python": platform.python_version()} | dict(_installed_versions(plan.format))
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
        plan=plan.to_json()
        | {
            "notes": [*plan.notes, *outlier_note(graph.weights)],
            "scheme": plan.scheme.to_json(),
            "accuracy_level": plan.accuracy_level,
        },
        programs=(Program(graph, plan.context, NOT_VERIFIED, plan.runtime),),
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


def outlier_note(weights: Iterable[TensorReport]) -> tuple[str, ...]:
    """Which quantized weights hold outliers: each takes the precision of the block around it."""
    found = sorted((report for report in weights if report.block_size and report.peak > OUTLIER), key=lambda r: -r.peak)
    if not found:
        return ()
    named = ", ".join(f"{report.role} ({report.bits} bits, {report.peak:,.0f} times)" for report in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return (f"outlier weights, by their tensor's root mean square: {named}{more}; 8 bits keep more of their blocks",)


def _installed_versions(format: str) -> Iterator[tuple[str, str]]:
    for name in (*_TOOLS, *_TOOLS_OF_FORMATS.get(format, ())):
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"
