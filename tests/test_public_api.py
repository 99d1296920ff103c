"""The names that `import edgekit` promises. A change here is a change for every user."""

from __future__ import annotations

import subprocess
import sys

import pytest

import edgekit

NAMES = [
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


def test_exported_names_are_pinned() -> None:
    assert edgekit.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_name_is_importable(name: str) -> None:
    assert getattr(edgekit, name) is not None


def test_star_import_brings_them_all() -> None:
    program = "from edgekit import *\nprint(*sorted(name for name in dir() if name != '__builtins__'))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert set(NAMES) <= set(done.stdout.split())


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        edgekit.nothing  # noqa: B018


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("Error") and name != "EdgeKitError"])
def test_every_error_has_one_base(name: str) -> None:
    assert issubclass(getattr(edgekit, name), edgekit.EdgeKitError)
