"""Profile: how fast a bundle's program runs on this machine and in how much memory, cold and warm, by prompt length.

Each figure comes from processes of their own, which take turns: what disturbs the machine for a while disturbs all lengths
alike, and the spread over processes is what another process will meet.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from edgekit.bundle import MANIFEST, Bundle, Program, hash_file, open_bundle
from edgekit.child import run_child
from edgekit.errors import GenerationError
from edgekit.machine import describe_machine
from edgekit.measure import measure_bandwidth
from edgekit.profile_record import (
    PROFILE_KIND,
    SCHEMA_VERSION,
    Cold,
    ColdRun,
    LengthProfile,
    Prediction,
    Profile,
    Run,
    Spread,
    Sustained,
    SustainedSample,
    TokenTimes,
)
from edgekit.progress import Progress, ProgressFn
from edgekit.registry import PROFILE_WORKER
from edgekit.target import load_target

__all__ = ["profile_bundle"]

PROMPT_TOKENS = (256, 32, 1024)
NEW_TOKENS = 64
LARGEST_FIGURE = 10**18  # that a manifest may say: no device has as many bytes, or is as fast
RUNS = 5  # the fewest whose medians `--compare` can tell apart


@dataclass(frozen=True, slots=True)
class _Task:
    """What the processes are asked for."""

    bundle: Path
    load: Mapping[str, Any]
    new_tokens: int

    def run(self, prompt_tokens: int, **more: Any) -> dict[str, Any]:
        task = {
            "bundle": str(self.bundle),
            "load": dict(self.load),
            "new_tokens": self.new_tokens,
            "prompt_tokens": prompt_tokens,
            "spawned": time.time(),
        }
        return run_child(PROFILE_WORKER, task | more)


def profile_bundle(
    directory: str | Path,
    *,
    format: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    prompt_tokens: Sequence[int] = (),
    new_tokens: int = NEW_TOKENS,
    runs: int = RUNS,
    sustained_s: float = 0.0,
    target: str | Path | None = None,
    on_progress: ProgressFn | None = None,
) -> Profile:
    """Measure a program.

    Args:
        format: Of the program; None takes the bundle's first.
        provider, threads: As `edgekit.load`.
        prompt_tokens: Lengths of prompts; the figures at the top are of the first one. None given: 256, 32 and 1,024, as
            far as they fit the context.
        new_tokens: Of each reply, at least 2. Replies do not end earlier, and are not speculated.
        runs: Processes of each length.
        sustained_s: Seconds of replies without a pause, besides.
        target: A profile whose memory bandwidth is taken for this machine's (`edgekit doctor --calibrate` writes one);
            None measures it.

    Raises:
        EdgeKitError: The bundle can't be opened, its program does not run, or a prompt does not fit its context.
    """
    bundle = open_bundle(directory)
    program = bundle.program(format)
    lengths = _lengths(prompt_tokens, new_tokens, program.context)
    load = {"format": program.graph.format, "provider": provider, "threads": threads, "check_hashes": False}
    task = _Task(bundle.directory, load, new_tokens)
    bandwidth, basis = _bandwidth(target, threads)
    cold, warm = _take_turns(task, lengths, runs, on_progress)
    sustained = _sustained(task, lengths[0], sustained_s) if sustained_s else None
    return _summary(bundle, program, task, (bandwidth, basis), cold, warm, sustained)


def _lengths(asked: Sequence[int], new_tokens: int, context: int) -> list[int]:
    lengths = list(dict.fromkeys(asked)) or [length for length in PROMPT_TOKENS if length + new_tokens <= context]
    lengths = lengths or [max(context - new_tokens, 1)]
    for length in lengths:
        if length + new_tokens > context:
            raise GenerationError(
                f"{length} tokens of prompt and {new_tokens} new ones do not fit the context of {context}",
                hint=f"use --prompt-tokens {max(context - new_tokens, 1)} or less, or fewer --new-tokens",
            )
    return lengths


def _bandwidth(target: str | Path | None, threads: int | None) -> tuple[int, str]:
    if target is None:
        return round(measure_bandwidth(threads)), "measured in this run"
    chosen = load_target(target)
    return chosen.memory.bandwidth_bytes_per_s, f"as {chosen.id} has it"


def _take_turns(
    task: _Task, lengths: list[int], runs: int, on_progress: ProgressFn | None
) -> tuple[list[dict[str, Any]], dict[int, list[dict[str, Any]]]]:
    """What the processes found: the cold ones, and the others by prompt length."""
    cold, warm = list[dict[str, Any]](), {length: list[dict[str, Any]]() for length in lengths}
    for round_ in range(runs):
        cold.append(task.run(lengths[0], drop_files=True, first_only=True))
        for length in lengths:
            warm[length].append(task.run(length))
        if on_progress:
            on_progress(Progress("profile", round_ + 1, runs, "rounds"))
    return cold, warm


def _sustained(task: _Task, prompt_tokens: int, seconds: float) -> Sustained:
    found = task.run(prompt_tokens, sustained_s=seconds)
    samples = tuple(SustainedSample(**sample) for sample in found["samples"])
    speeds = [sample.decode_tokens_per_s for sample in samples]
    fifth = -(-len(speeds) // 5)
    return Sustained(samples[-1].time_s, median(speeds[-fifth:]) / median(speeds[:fifth]), samples)


def _summary(
    bundle: Bundle,
    program: Program,
    task: _Task,
    bandwidth: tuple[int, str],
    cold: list[dict[str, Any]],
    warm: dict[int, list[dict[str, Any]]],
    sustained: Sustained | None,
) -> Profile:
    lengths = tuple(_length_profile(found) for found in warm.values())
    first, runs = lengths[0], [run for length in lengths for run in length.runs]
    token_bytes = _bytes_per_token(program, first.prompt_tokens + task.new_tokens // 2)
    ran = cold[0]["provider"]
    return Profile(
        kind=PROFILE_KIND,
        schema_version=SCHEMA_VERSION,
        bundle=str(bundle.manifest.model.get("name")),
        bundle_sha256=hash_file(bundle.directory / MANIFEST),
        format=program.graph.format,
        executed=ran["executed"],
        provider=ran["name"],
        provider_reason=ran["reason"],
        threads=cold[0]["threads"],
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        new_tokens=task.new_tokens,
        load_s=Spread.of(run.load_s for run in runs),
        ttft_s=first.ttft_s,
        prefill_tokens_per_s=first.prefill_tokens_per_s,
        decode_tokens_per_s=first.decode_tokens_per_s,
        between_tokens_s=first.between_tokens_s,
        peak_rss_bytes=first.peak_rss_bytes,
        idle_rss_bytes=round(median(run.idle_rss_bytes for run in first.runs)),
        weights_bytes=sum(report.size_bytes for report in program.graph.weights),
        bytes_per_token=token_bytes,
        bandwidth_bytes_per_s=bandwidth[0],
        bandwidth_basis=bandwidth[1],
        roofline_fraction=first.decode_tokens_per_s.median * token_bytes / bandwidth[0],
        cold=_cold(cold),
        lengths=lengths,
        sustained=sustained,
        plan=_prediction(bundle, program),
        machine=describe_machine(),
    )


def _length_profile(found: list[dict[str, Any]]) -> LengthProfile:
    names = [field.name for field in fields(Run)]
    runs = tuple(Run(**{name: _frozen(values[name]) for name in names}) for values in found)
    return LengthProfile(
        prompt_tokens=found[0]["prompt_tokens"],
        prompt_sha256=found[0]["prompt_sha256"],
        ttft_s=Spread.of(run.ttft_s for run in runs),
        prefill_tokens_per_s=Spread.of(run.prefill_tokens_per_s for run in runs),
        decode_tokens_per_s=Spread.of(run.decode_tokens_per_s for run in runs),
        between_tokens_s=TokenTimes.of(time for run in runs for time in run.between_tokens_s),
        peak_rss_bytes=round(median(run.peak_rss_bytes for run in runs)),
        runs=runs,
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _cold(found: list[dict[str, Any]]) -> Cold:
    runs = tuple(ColdRun(values["start_s"], values["load_s"], values["first_ttft_s"]) for values in found)
    return Cold(
        files="disk" if all(values["files_dropped"] for values in found) else "cache",
        start_s=Spread.of(run.start_s for run in runs),
        load_s=Spread.of(run.load_s for run in runs),
        ttft_s=Spread.of(run.ttft_s for run in runs),
        runs=runs,
    )


def _bytes_per_token(program: Program, length: int) -> int:
    """What a decode step reads: all weights, but of an untied embedding one row; and the cache of `length` tokens."""
    graph = program.graph
    roles = {report.role for report in graph.weights}
    read = [report for report in graph.weights if report.role != "embedding" or "head" not in roles]
    seen = min(length, graph.window or length)
    return sum(report.size_bytes for report in read) + graph.cache.token_bytes * seen


def _prediction(bundle: Bundle, program: Program) -> Prediction | None:
    """What the plan said; None where the manifest, which is not to be trusted, does not hold it as numbers over zero."""
    plan = bundle.plan_of(program)
    try:
        decode, prefill = (plan["speed"][f"{name}_tokens_per_s"] for name in ("decode", "prefill"))
        total = plan["memory"]["total_bytes"]
    except (KeyError, TypeError):
        return None
    if not all(type(figure) in (int, float) and 0 < figure < LARGEST_FIGURE for figure in (decode, prefill, total)):
        return None
    return Prediction(bundle.manifest.target, float(decode), float(prefill), int(total))
