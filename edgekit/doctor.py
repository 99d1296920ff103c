"""What `edgekit doctor` finds: this machine, and what is installed, with the pip lines for what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import defaultdict
from dataclasses import asdict
from typing import Any

from edgekit.cpu_features import instruction_sets
from edgekit.machine import describe_machine, free_memory_bytes
from edgekit.memory_limit import memory_limit
from edgekit.registry import FORMAT_EXTRAS, OPTIONAL, PROVIDER_LIST, load_attribute
from edgekit.source import SAMPLE_HINT, SAMPLE_PACKAGE

__all__ = ["examine"]

_CORE = ("edgekit-toolkit", "onnxruntime", "numpy", "tokenizers", "jinja2", "llguidance")
_TRIED_BYTES = 1 << 30


def examine() -> dict[str, Any]:
    """As `edgekit doctor --json` has it."""
    with memory_limit(_TRIED_BYTES) as limit:
        rehearsal = limit.enforced_by if limit else None
    return {
        "machine": asdict(describe_machine())
        | {"free_bytes": free_memory_bytes(), "instruction_sets": list(instruction_sets())},
        "packages": {name: _version(name) for name in _CORE},
        "extras": _extras(),
        "providers": load_attribute(PROVIDER_LIST)(),
        "sample": {
            "installed": importlib.util.find_spec(SAMPLE_PACKAGE) is not None,
            "install": SAMPLE_HINT,
        },
        "rehearsal": rehearsal,
    }


def _extras() -> list[dict[str, Any]]:
    """Each extra with the packages that it brings and their versions; `missing` has nothing in it where all are there."""
    packages: dict[str, dict[str, str | None]] = defaultdict(dict)
    for package, extra in OPTIONAL.values():
        packages[extra][package] = _version(package)
    for extra, (modules, _) in FORMAT_EXTRAS.items():
        packages[extra] = {package: _version(package) for package in modules.values()}
    return [
        {
            "name": extra,
            "packages": found,
            "missing": [name for name, version in found.items() if version is None],
            "install": f'pip install "edgekit-toolkit[{extra}]"',
        }
        for extra, found in packages.items()
    ]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
