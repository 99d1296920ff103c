"""How far the plan is from what is measured: peak memory and decode speed of models, schemes, contexts and caches.

Each point is a bundle, converted here and loaded in a process of its own, with its whole context in use when the peak is
taken and half of it while decoding is timed, as the plan means both. The bandwidth that decoding is planned with is measured
in the same process, in turns with decoding, so that others who use the machine slow down both. Prints each point, the
distribution of the errors, and whether they stay in the bands; its exit code is 1 where they do not. Needs Linux, 8 GB of
memory and 12 GB of disk.

    python tests/benchmarks/plan_accuracy.py [--work DIR] [--only TEXT] [--rounds 5] [--threads 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from convert import print_table
from seeded_models import SHAPES, write_model

import edgekit
from edgekit.measure import measure_bandwidth
from edgekit.plan import make_plan
from edgekit.quant import CacheFormat
from edgekit.source import open_source
from edgekit.target import Target, load_target

TARGET = "linux-x86-64"
# Issue 5: nine of ten memory figures within 10%, none under by more than 5%; decode within 25%.
MEMORY_BAND, MEMORY_UNDER, SPEED_BAND = 0.10, 0.05, 0.25
QUANTILE = 0.9
CHUNK, STEPS = 128, 24


@dataclass(frozen=True, slots=True)
class Point:
    """What is converted and measured."""

    model: str
    quant: str
    context: int
    cache: str = "float32"


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one process. `decode_steps`: for each round, tokens a second and the bandwidth beside it."""

    peak_rss_bytes: int
    private_bytes: int
    mapped_bytes: int
    decode_steps: tuple[tuple[float, float], ...]


POINTS = (
    *(Point("sample", quant, context) for quant in ("int8", "int4") for context in (512, 4096)),
    *(Point("sample", quant, 2048) for quant in ("fp32", "keep", "int4-block128", "int4-symmetric")),
    *(Point("tiny-30m", quant, context) for quant, context in (("int8", 1024), ("fp32", 4096), ("int4", 8192))),
    *(Point("smollm2-360m", quant, context) for quant, context in (("int8", 1024), ("int4", 4096), ("fp32", 1024))),
    *(Point("many-heads-400m", quant, context) for quant, context in (("int8", 2048), ("int4", 1024), ("int4", 8192))),
    *(
        Point("qwen3-0.6b", quant, context)
        for quant, context in (("int8", 1024), ("int4-block64", 4096), ("int4", 512))
    ),
    *(
        Point("llama3.2-1b", quant, context)
        for quant, context in (("int4", 2048), ("int8", 1024), ("int4-block128", 8192))
    ),
    *(Point("sample", "int8", 4096, cache) for cache in ("float16", "int8")),
    Point("many-heads-400m", "int8", 4096, "float16"),
    Point("many-heads-400m", "int4", 4096, "int8"),
)


def measure(bundle: str, threads: int, rounds: int) -> Measured:
    """Load a bundle, fill its context, then time decoding with half of it; in this process."""
    from edgekit.runtimes.process_memory import memory_use, peak_rss_bytes

    with edgekit.load(bundle, threads=threads, session_cache_bytes=0) as loaded:
        model: Any = loaded
        model.end_tokens = frozenset()
        model.generate("hello", max_tokens=16, raw=True)
        decoder = model.backend.decoder()
        _fill(decoder, model.program.graph.cache, model.context - CHUNK - STEPS)
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, CHUNK)  # each has another row of the embedding
        decoder.forward(tokens, rows=1, rope_length=model.context)
        for _ in range(STEPS):
            decoder.forward(tokens[:1], rows=1, rope_length=model.context)
        use, peak = memory_use(), peak_rss_bytes()
        steps = []
        for _ in range(rounds):
            decoder.rewind(model.context // 2)
            seconds = _seconds(lambda: decoder.forward(tokens[:1], rows=1, rope_length=model.context), STEPS)
            steps.append((STEPS / seconds, measure_bandwidth(threads)))
    return Measured(peak, use.private_bytes, use.mapped_bytes, tuple(steps))


def _fill(decoder: Any, layout: Any, length: int) -> None:
    """Put zeros into the cache as if tokens had been computed: all of it is memory that is in use."""
    zeros = np.broadcast_to(np.zeros((), layout.dtype), (layout.kv_heads, max(length, 0), layout.head_dim))
    decoder.write_cache([zeros] * (2 * layout.layers))


def _seconds(work: Any, count: int) -> float:
    import time

    work()
    started = time.perf_counter()
    for _ in range(count):
        work()
    return time.perf_counter() - started


def source_of(model: str, work: Path) -> str:
    """The checkpoint: `sample`, or a seeded one that is written first."""
    if model == "sample":
        return model
    directory = work / model
    if not (directory / "model.safetensors").exists():
        write_model(directory, SHAPES[model])
    return str(directory)


def run_point(point: Point, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Convert, measure in a child, and compare with the plan; or say why not."""
    source, bundle = source_of(point.model, work), work / "point.edgekit"
    options: dict[str, Any] = {"quant": point.quant, "context": point.context, "verify": False, "force": True}
    if point.cache != "float32":
        options["cache"] = CacheFormat(point.cache)
    edgekit.convert(source, target=TARGET, out=bundle, **options)
    command = [sys.executable, __file__, "--worker", str(bundle), "--threads", str(arguments.threads)]
    done = subprocess.run([*command, "--rounds", str(arguments.rounds)], capture_output=True, text=True, check=False)
    if done.returncode:
        return asdict(point) | {"error": done.stderr.strip().splitlines()[-1] if done.stderr else "killed"}
    measured: dict[str, Any] = json.loads(done.stdout)
    return asdict(point) | measured | _compare(point, source, measured)


def _compare(point: Point, source: str, measured: dict[str, Any]) -> dict[str, Any]:
    """The plan's figures for the bandwidth of each round, and how far they are off."""
    opened, target, ratios = open_source(source), load_target(TARGET), []
    for tokens_per_s, bandwidth in measured["decode_steps"]:
        plan = make_plan(
            opened, _with_bandwidth(target, bandwidth), quant=point.quant, context=point.context,
            cache=CacheFormat(point.cache),
        )  # fmt: skip
        ratios.append(plan.speed.decode_tokens_per_s / tokens_per_s)
    memory = asdict(plan.memory)
    return {
        "memory": memory,
        "bytes_per_token": plan.speed.bytes_per_token,
        "layers": len(opened.config.layers),
        "memory_error": memory["total_bytes"] / measured["peak_rss_bytes"] - 1,
        "speed_error": statistics.median(ratios) - 1,
    }


def _with_bandwidth(target: Target, bytes_per_s: float) -> Target:
    return replace(target, memory=replace(target.memory, bandwidth_bytes_per_s=int(bytes_per_s)))


def summary(rows: Sequence[dict[str, Any]]) -> tuple[list[tuple[str, ...]], bool]:
    """The distributions of both errors, and whether they stay in the bands."""
    memory, speed = (sorted(row[key] for row in rows) for key in ("memory_error", "speed_error"))
    lines, far = [], {}
    for name, errors in (("peak memory", memory), ("decode speed", speed)):
        far[name] = float(np.quantile(np.abs(errors), QUANTILE))
        cells = (errors[0], statistics.median(errors), errors[-1], far[name])
        lines.append((name, str(len(errors)), *(f"{value:+.1%}" for value in cells)))
    passed = far["peak memory"] <= MEMORY_BAND and memory[0] >= -MEMORY_UNDER and far["decode speed"] <= SPEED_BAND
    return lines, passed


def show(rows: Sequence[dict[str, Any]]) -> bool:
    """Print every point and the distribution; whether all is in the bands."""
    good = [row for row in rows if "error" not in row]
    cells = [
        (
            row["model"], row["quant"], str(row["context"]), row["cache"],
            f"{row['memory']['total_bytes'] / 1e6:.0f}", f"{row['peak_rss_bytes'] / 1e6:.0f}", f"{row['memory_error']:+.1%}",
            f"{statistics.median(step[0] for step in row['decode_steps']):.1f}", f"{row['speed_error']:+.1%}",
        )
        for row in good
    ]  # fmt: skip
    head = ("model", "quant", "context", "cache", "planned MB", "peak MB", "error", "decode tok/s", "plan's error")
    print_table(head, cells)
    for row in rows:
        if "error" in row:
            print(f"{row['model']} {row['quant']} {row['context']} {row['cache']}: {row['error']}")
    if not good:
        return False
    lines, passed = summary(good)
    print()
    print_table(("error", "points", "least", "median", "most", "90% of sizes under"), lines)
    print(
        f"{'PASS' if passed else 'FAIL'}: memory within {MEMORY_BAND:.0%} for nine of ten and never under by more than "
        f"{MEMORY_UNDER:.0%}, decode within {SPEED_BAND:.0%} for nine of ten"
    )
    return passed and len(good) == len(rows)


def main() -> int:
    """Measure every point and print how far the plan is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where models and bundles are written; by default a temporary folder")
    parser.add_argument("--only", default="", help="points whose model, scheme, context and cache contain this text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(asdict(measure(arguments.worker, arguments.threads, arguments.rounds))))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for point in POINTS:
            name = " ".join(map(str, asdict(point).values()))
            if arguments.only in name:
                print(name, file=sys.stderr)
                rows.append(run_point(point, work, arguments))
                if arguments.json:  # so far: an interrupted run is not lost
                    arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0 if show(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
