"""Work in another process: for a fresh start, or where a crash must not be ours."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgekit.errors import EdgeKitError, GenerationError

__all__ = ["ChildError", "ChildTimeoutError", "answer", "child_command", "run_child"]

_LONGEST_REASON = 300
# Not `python -m`: that would import what lies in the working directory, whosever it is. EdgeKit itself is found where it is.
_START = (
    "import runpy, sys; sys.path.append(sys.argv[1]); module = sys.argv[2]; del sys.argv[1:3]; "
    "runpy.run_module(module, run_name='__main__')"
)
_HOME = Path(__file__).resolve().parent.parent


class ChildError(GenerationError):
    """A child process crashed, took too long, or said what is wrong."""


class ChildTimeoutError(ChildError):
    """A child process took too long, and was ended."""


def child_command(module: str, *arguments: str, python: str | Path = sys.executable) -> list[str]:
    """What runs a module in another process."""
    return [str(python), "-P", "-c", _START, str(_HOME), module, *arguments]


def run_child(
    module: str, task: Mapping[str, Any], *, timeout_s: float | None = None, python: str | Path = sys.executable
) -> dict[str, Any]:
    """Run a module that ends with `answer`: it gets `task` as JSON, and its answer is returned.

    Args:
        module: Its name.
        task: What to do; JSON.
        timeout_s: How long it may take; None waits for ever.
        python: Whose packages it sees.

    Raises:
        ChildError: It crashed, did not end in time, or raised an EdgeKitError, whose message and hint this one has.
    """
    try:
        done = subprocess.run(
            child_command(module, python=python), input=json.dumps(task), capture_output=True, check=False, timeout=timeout_s,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ChildTimeoutError(f"it did not end within {timeout_s:g} s") from error
    except OSError as error:
        raise ChildError(f"no process can be started: {error.strerror or error}") from error
    if done.returncode:
        raise ChildError(_reason(done.returncode, done.stderr))
    try:
        reply = json.loads(done.stdout.splitlines()[-1])  # a vendor's library may write to stdout before
    except (IndexError, ValueError) as error:
        raise ChildError("it ended without an answer") from error
    if "error" in reply:
        raise ChildError(reply["error"], hint=reply.get("hint"))
    found: dict[str, Any] = reply["answer"]
    return found


def answer(work: Callable[..., Mapping[str, Any]]) -> None:
    """In the child: do `work(**task)` and give its result, a JSON object, to the parent; or the EdgeKitError that it raised."""
    task = json.loads(sys.stdin.read())
    reply: dict[str, Any]
    try:
        reply = {"answer": work(**task)}
    except EdgeKitError as error:
        reply = {"error": error.message, "hint": error.hint}
    sys.stdout.write(f"\n{json.dumps(reply)}\n")
    sys.stdout.flush()


def _reason(code: int, stderr: str) -> str:
    lines = stderr.strip().splitlines()
    said = f": {lines[-1][:_LONGEST_REASON]}" if lines else ""
    if code >= 0:
        return f"it ended with code {code}{said}"
    try:
        return f"it crashed with {signal.Signals(-code).name}{said}"
    except ValueError:
        return f"it crashed with signal {-code}{said}"
