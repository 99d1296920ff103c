"""Rehearsal: a bundle in processes of their own with the memory and the cores of a device, to see whether it survives there.

First a process that fills the program's whole context, as the plan counts it; then the command that was asked for.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from edgekit.bundle import Bundle, open_bundle
from edgekit.child import child_command
from edgekit.errors import GenerationError
from edgekit.memory_limit import Enforcer, MemoryLimit, Outcome, memory_limit, run_limited
from edgekit.registry import REHEARSAL_WORKER
from edgekit.runtime_options import usable_cores
from edgekit.target import Target

__all__ = ["Rehearsal", "rehearse"]


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What came of it.

    Attributes:
        target: The device's id.
        limit_bytes: What an app may use there.
        cores: Processors that the processes had: the device's big cores, and no more than there are here.
        enforced_by: What kept the limit; None where nothing can: then it was not rehearsed.
        survived: Whether no process was killed for memory; None where it was not rehearsed.
        peak_rss_bytes: The highest resident memory of a process; of a killed one up to then.
        planned_bytes: What the bundle's plan says it takes; None where the manifest does not.
        planned_to_fit: Whether that is within the limit.
    """

    target: str
    limit_bytes: int
    cores: int
    enforced_by: Enforcer | None
    survived: bool | None
    peak_rss_bytes: int
    planned_bytes: int | None
    planned_to_fit: Literal["yes", "no", "unknown"]

    def to_json(self) -> dict[str, Any]:
        """As `run --json` and `verify --json` have it."""
        return asdict(self)


def rehearse(
    directory: str | Path,
    target: Target,
    command: Sequence[str],
    *,
    format: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    captured: bool = False,
) -> tuple[Rehearsal, int, str]:
    """Fill the context of a bundle's program, then run a command, under a target's limits.

    Args:
        command: Arguments of `edgekit`.
        format, provider, threads: As `edgekit.load`.
        captured: Return what the command writes to stdout, instead of letting it through.

    Returns:
        The rehearsal, and of the command its exit code and captured output; 1 and nothing where it was not come to.

    Raises:
        BundleError: The bundle can't be opened.
        GenerationError: The program does not load or run, for another reason than memory.
    """
    bundle = open_bundle(directory)
    cores = min(target.cpu.big_cores, usable_cores())
    task = {"bundle": str(directory), "format": format, "provider": provider, "threads": threads}
    with memory_limit(target.memory.app_bytes) as limit:
        first = _fill_context(task, limit, cores) if limit else None
        if first and first.killed:
            return _rehearsal(bundle, format, target, cores, limit, (first,)), 1, ""
        last, output = _run(child_command("edgekit", *command), limit, cores, captured=captured)
        outcomes = (first, last) if first else (last,)
        return _rehearsal(bundle, format, target, cores, limit, outcomes), 1 if last.killed else last.returncode, output


def _fill_context(task: dict[str, Any], limit: MemoryLimit, cores: int) -> Outcome:
    outcome, output = _run(child_command(REHEARSAL_WORKER), limit, cores, captured=True, text=json.dumps(task))
    if outcome.killed:
        return outcome
    try:
        reply = json.loads(output.strip().splitlines()[-1]) if output.strip() and not outcome.returncode else {}
    except ValueError:  # a vendor's library had the last word
        reply = {"error": "it ended without an answer"}
    if "answer" not in reply:
        reason = reply.get("error", f"it ended with code {outcome.returncode}")
        raise GenerationError(f"the rehearsal failed, and not for memory: {reason}", hint=reply.get("hint"))
    return outcome


def _run(
    command: Sequence[str], limit: MemoryLimit | None, cores: int, *, captured: bool, text: str | None = None
) -> tuple[Outcome, str]:
    """Run a command; what it wrote to stdout where that is captured. `text` is for its stdin."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as written:
        given.write((text or "").encode())
        given.seek(0)
        outcome = run_limited(
            command, limit, cores=cores, stdin=None if text is None else given, stdout=written if captured else None
        )
        written.seek(0)
        return outcome, written.read().decode("utf-8", errors="replace")


def _rehearsal(
    bundle: Bundle,
    format: str | None,
    target: Target,
    cores: int,
    limit: MemoryLimit | None,
    outcomes: Sequence[Outcome],
) -> Rehearsal:
    memory = bundle.plan_of(bundle.program(format)).get("memory")
    planned = memory.get("total_bytes") if isinstance(memory, dict) else None
    planned = planned if isinstance(planned, int) else None
    return Rehearsal(
        target=target.id,
        limit_bytes=target.memory.app_bytes,
        cores=cores,
        enforced_by=limit.enforced_by if limit else None,
        survived=not any(outcome.killed for outcome in outcomes) if limit else None,
        peak_rss_bytes=max(outcome.peak_rss_bytes for outcome in outcomes),
        planned_bytes=planned,
        planned_to_fit="unknown" if planned is None else "yes" if planned <= target.memory.app_bytes else "no",
    )
