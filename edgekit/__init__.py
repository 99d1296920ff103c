"""EdgeKit: language models on phones, Raspberry Pi boards and Copilot+ PCs.

import edgekit

edgekit.convert("sample", target="raspberry-pi-5", out="smollm2.edgekit")
with edgekit.load("smollm2.edgekit") as model:
    print(model.generate("Why is the sky blue?", max_tokens=64).text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekit.bundle import Bundle, Manifest, open_bundle
    from edgekit.errors import (
        BundleError,
        ConversionError,
        EdgeKitError,
        GenerationError,
        MissingExtraError,
        PlanError,
        SourceError,
        TargetError,
        UnsupportedError,
    )
    from edgekit.loading import load
    from edgekit.outline import Outline, UnknownModel, open_outline
    from edgekit.pipeline import convert
    from edgekit.plan import Plan, make_plan
    from edgekit.progress import Progress
    from edgekit.session import Chunk, GenerateOptions, Model, Reply, Session, Stats, TokenLogprob, ToolCall
    from edgekit.source import Source, open_source
    from edgekit.structure import Choice, JsonSchema, Lark, Regex
    from edgekit.target import Target, list_targets, load_target

__version__ = "0.1.0"
__all__ = [
    "Bundle",
    "BundleError",
    "Choice",
    "Chunk",
    "ConversionError",
    "EdgeKitError",
    "GenerateOptions",
    "GenerationError",
    "JsonSchema",
    "Lark",
    "Manifest",
    "MissingExtraError",
    "Model",
    "Outline",
    "Plan",
    "PlanError",
    "Progress",
    "Regex",
    "Reply",
    "Session",
    "Source",
    "SourceError",
    "Stats",
    "Target",
    "TargetError",
    "TokenLogprob",
    "ToolCall",
    "UnknownModel",
    "UnsupportedError",
    "__version__",
    "convert",
    "list_targets",
    "load",
    "load_target",
    "make_plan",
    "open_bundle",
    "open_outline",
    "open_source",
]

# Imported when first asked for, so that `import edgekit` and the command line start at once.
_MODULES = {
    "edgekit.bundle": ("Bundle", "Manifest", "open_bundle"),
    "edgekit.errors": (
        "BundleError",
        "ConversionError",
        "EdgeKitError",
        "GenerationError",
        "MissingExtraError",
        "PlanError",
        "SourceError",
        "TargetError",
        "UnsupportedError",
    ),
    "edgekit.loading": ("load",),
    "edgekit.outline": ("Outline", "UnknownModel", "open_outline"),
    "edgekit.pipeline": ("convert",),
    "edgekit.plan": ("Plan", "make_plan"),
    "edgekit.progress": ("Progress",),
    "edgekit.session": ("Chunk", "GenerateOptions", "Model", "Reply", "Session", "Stats", "TokenLogprob", "ToolCall"),
    "edgekit.source": ("Source", "open_source"),
    "edgekit.structure": ("Choice", "JsonSchema", "Lark", "Regex"),
    "edgekit.target": ("Target", "list_targets", "load_target"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgekit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
