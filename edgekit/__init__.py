"""EdgeKit: language models on phones, Raspberry Pi boards and Copilot+ PCs.

    import edgekit

    edgekit.convert("sample", target="raspberry-pi-5", out="smollm2.edgekit")
    with edgekit.load("smollm2.edgekit") as model:
        print(model.generate("Why is the sky blue?", max_tokens=64).text)
"""

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
from edgekit.pipeline import convert
from edgekit.plan import Plan, make_plan
from edgekit.progress import Progress
from edgekit.session import Chunk, GenerateOptions, Model, Reply, Session, Stats
from edgekit.source import Source, open_source
from edgekit.target import Target, list_targets, load_target

__version__ = "0.1.0"
__all__ = [
    "Bundle",
    "BundleError",
    "Chunk",
    "ConversionError",
    "EdgeKitError",
    "GenerateOptions",
    "GenerationError",
    "Manifest",
    "MissingExtraError",
    "Model",
    "Plan",
    "PlanError",
    "Progress",
    "Reply",
    "Session",
    "Source",
    "SourceError",
    "Stats",
    "Target",
    "TargetError",
    "UnsupportedError",
    "__version__",
    "convert",
    "list_targets",
    "load",
    "load_target",
    "make_plan",
    "open_bundle",
    "open_source",
]
