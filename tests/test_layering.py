"""Who may import whom: converters and runtimes import the core, never each other, and the core neither of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekit.registry import FORMAT_EXTRAS

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "edgekit": ("edgekit.converters", "edgekit.runtimes"),
    "edgekit/cli": ("edgekit.converters", "edgekit.runtimes"),
    "converters": ("edgekit.runtimes", "edgekit.cli"),
    "converters/anatomies": ("edgekit.runtimes", "edgekit.cli"),
    "converters/architectures": ("edgekit.runtimes", "edgekit.cli"),
    "runtimes/python": ("edgekit.converters", "edgekit.cli"),
}
HEAVY = ("numpy", "onnxruntime", "onnx", "tokenizers", "jinja2", "rich", "torch", "transformers", "gguf")


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Absolute names of what a module imports, at any depth, but for what only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            home = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{home}.{alias.name}" for alias in node.names)
        yield from _imports(node, package)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_layer_imports_only_what_lies_below(folder: str) -> None:
    package = {"converters": "edgekit.converters", "runtimes": "edgekit.runtimes"}.get(folder.partition("/")[0])
    package = package or folder.replace("/", ".")
    if folder.startswith("converters/"):
        package += "." + folder.rpartition("/")[2]
    files = sorted((ROOT / folder).glob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in _imports(ast.parse(path.read_text(encoding="utf-8")), package)
        if f"{name}.".startswith(tuple(f"{layer}." for layer in FORBIDDEN[folder]))
    ]
    assert not wrong


def test_relative_imports_are_resolved() -> None:
    tree = ast.parse(
        "from ..runtimes import engine\nfrom . import rope\nif TYPE_CHECKING:\n    import edgekit.runtimes"
    )
    assert list(_imports(tree, "edgekit.converters")) == ["edgekit.runtimes.engine", "edgekit.converters.rope"]


@pytest.mark.parametrize(
    "statement", ["import edgekit", "from edgekit.cli import main; main(['--help']); main(['targets'])"]
)
def test_start_imports_nothing_heavy(statement: str) -> None:
    program = f"{statement}\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_onnx_needs_no_other_formats_packages() -> None:
    """Nor PyTorch, which takes seconds and hundreds of megabytes."""
    modules = ["pipeline", "gate", "converters.to_onnx", "converters.to_onnx_qdq", "runtimes.engine"]
    modules += ["runtimes.backend_onnxruntime", "runtimes.backend_onnx_qdq"]
    names = {name for found, _ in FORMAT_EXTRAS.values() for name in found}
    program = "\n".join(
        [*(f"import edgekit.{name}" for name in modules), "import sys", f"print(sorted({names} & set(sys.modules)))"]
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
