"""A Core ML package on disk: the program's protocol buffer, its weights, and the manifest beside them. Same input, same bytes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coremltools.converters.mil.backend.mil.load import CoreMLProtoExporter, MILProtoExporter

from .coreml_weights import IOS_18, WEIGHT_FILE, WeightFile

__all__ = ["MODEL", "PACKAGE_FILES", "WEIGHTS", "write_package"]

_DATA = "Data/com.apple.CoreML"
MODEL, WEIGHTS = f"{_DATA}/model.mlmodel", f"{_DATA}/weights/{WEIGHT_FILE}"
MANIFEST = "Manifest.json"
PACKAGE_FILES = (MANIFEST, MODEL, WEIGHTS)
AUTHOR = "com.apple.CoreML"
# What the package's items are numbered from: they need identifiers, which need not differ between packages.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://edgekit/coreml")


def write_package(package: Path, program: Any, weights: WeightFile, metadata: Mapping[str, str]) -> None:
    """Write the program and the manifest; the weights are there already.

    Args:
        package: The package's folder.
        program: A MIL program of several functions.
        weights: The weight file, which lies in the package.
        metadata: `description`, `author`, `license` and `version`, and what else an app may look up by its own name.
    """
    folder = str((package / WEIGHTS).parent)
    exporter = MILProtoExporter(program, folder, IOS_18)
    exporter.weight_id_to_file_value.update(weights.places())
    written = exporter.export()
    if exporter.blob_writers:
        raise ValueError("an array of the program is not in the weight file, which the exporter would overwrite")
    model = CoreMLProtoExporter(program, written, "", "", None, "mlprogram", "milinternal", IOS_18).export(IOS_18)
    described = model.description.metadata
    more = dict(metadata)
    described.shortDescription, described.author = more.pop("description"), more.pop("author")
    described.license, described.versionString = more.pop("license"), more.pop("version")
    described.userDefined.update(more)
    (package / MODEL).write_bytes(model.SerializeToString(deterministic=True))
    (package / MANIFEST).write_text(
        json.dumps(_manifest(), indent=4, sort_keys=True) + "\n", encoding="utf-8", newline="\n"
    )


def _manifest() -> dict[str, Any]:
    """As Core ML's own tools write it, with fixed identifiers."""
    model, weights = (str(uuid.uuid5(_NAMESPACE, name)).upper() for name in ("model.mlmodel", "weights"))
    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            model: {
                "author": AUTHOR,
                "description": "CoreML Model Specification",
                "name": "model.mlmodel",
                "path": "com.apple.CoreML/model.mlmodel",
            },
            weights: {
                "author": AUTHOR,
                "description": "CoreML Model Weights",
                "name": "weights",
                "path": "com.apple.CoreML/weights",
            },
        },
        "rootModelIdentifier": model,
    }
