"""Every format of one checkpoint: time, peak memory and size of its conversion, and speed where it runs here.

Conversions are whole processes without verification; speeds are of processes of their own, in turns, medians over the
rounds, on an otherwise idle Linux machine. ExecuTorch stands beside a plain export (`plain_executorch.py`), and all beside
the figures that were known before EdgeKit had these formats, in brackets. Core ML's and Core AI's evaluators on Linux are
right for numbers and are not timed.

    python tests/benchmarks/formats.py [--source sample] [--work DIR] [--only FORMAT]... [--convert-again] [--no-plain]
        [--rounds 5] [--prompt 256] [--new 64] [--threads 2] [--json]

What was converted is kept in --work, with its figures, and is not converted again unless asked for: a plain export takes
ten minutes and more. The table says when each was converted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import EDGEKIT, CommandError, add_common_arguments, checkpoint, print_table, run
from engines import Prompt
from peers import Contender, Worker, file_bytes, take_turns
from speed import MEASURES, make_prompt, measure, medians

CONTEXT = 2048
PLAIN = "executorch, plain export"
NOT_TIMED = ("coreml", "coreai")


@dataclass(frozen=True, slots=True)
class Known:
    """Figures from before, on the same kind of machine; None where there are none."""

    what: str
    convert_s: float | None = None
    convert_peak_mb: float | None = None
    file_mb: float | None = None
    prefill: float | None = None
    decode: float | None = None
    peak_mb: float | None = None


@dataclass(frozen=True, slots=True)
class Build:
    """One row: a format and a scheme, or the plain export, which has none."""

    format: str
    scheme: str
    target: str
    known: Known | None = None

    @property
    def name(self) -> str:
        """As the tables have it."""
        return f"{self.format} {self.scheme}" if self.scheme else PLAIN

    @property
    def engine(self) -> str:
        """What runs it."""
        return "edgekit" if self.scheme else "executorch"

    def path(self, work: Path) -> Path:
        """Where it is kept."""
        return work / (f"{self.format}-{self.scheme}.edgekit" if self.scheme else "plain-executorch.pte")

    def command(self, source: str, hf_source: Path, out: Path) -> list[str]:
        """What makes it; the plain export starts from full precision."""
        if not self.scheme:
            script = Path(__file__).with_name("plain_executorch.py")
            return [sys.executable, "-W", "ignore", str(script), str(hf_source), str(out), "--context", str(CONTEXT)]
        options = ["--target", self.target, "--format", self.format, "--quant", self.scheme, "--context", str(CONTEXT)]
        return [EDGEKIT, "convert", source, *options, "--no-verify", "--force", "--out", str(out)]


PLAIN_BUILD = Build(
    "executorch", "", "", Known("8da4w, group 32", convert_s=600, file_mb=105, prefill=555, decode=67, peak_mb=519)
)
BUILDS = (
    Build("onnx", "int8", "linux-x86-64", Known("8 bits, block 64", file_mb=144, prefill=500, decode=76)),
    Build("onnx", "int4", "linux-x86-64", Known("4 bits, block 32", 1.8, 700, 87, 394, 85, 272)),
    Build("executorch", "int8", "linux-x86-64"),
    Build("executorch", "int4", "linux-x86-64", PLAIN_BUILD.known),
    Build("coreml", "fp16", "iphone-16", Known("fp16", convert_s=62, convert_peak_mb=2400, file_mb=270)),
    Build("coreml", "int4", "iphone-16", Known("fp16, then 4 bits", convert_s=114, convert_peak_mb=2400, file_mb=77)),
    Build("coreai", "int8", "iphone-16"),
    Build("coreai", "int4", "iphone-16"),
    Build("litert", "int8", "galaxy-s24"),
)


def convert(build: Build, source: str, hf_source: Path, work: Path) -> dict[str, Any]:
    """Make a row's artifact; its figures, or why it was not made."""
    out = build.path(work)
    if not out.is_dir():
        out.unlink(missing_ok=True)
    print(f"converting {build.name}", file=sys.stderr)
    try:
        seconds, peak = run(build.command(source, hf_source, out), work / f"{out.stem}.log")
    except (CommandError, OSError) as error:
        return {"error": str(error)}
    return {"convert_s": seconds, "convert_peak_bytes": peak, "date": time.strftime("%Y-%m-%d %H:%M")}


def conversions(builds: list[Build], arguments: argparse.Namespace, work: Path) -> dict[str, dict[str, Any]]:
    """The figures of every row, those of earlier runs among them."""
    kept_in = work / "conversions.json"
    kept: dict[str, dict[str, Any]] = json.loads(kept_in.read_text()) if kept_in.exists() else {}
    hf_source, rows = checkpoint(arguments.source, work), {}
    for build in builds:
        there = build.path(work).exists() and "error" not in kept.get(build.name, {})
        if not there or (arguments.convert_again and build.scheme):
            kept[build.name] = convert(build, arguments.source, hf_source, work)
            kept_in.write_text(json.dumps(kept, indent=1))
        rows[build.name] = kept.get(build.name, {"date": "before, not timed"})
        if "error" not in rows[build.name]:
            rows[build.name] |= {"file_bytes": file_bytes(build.path(work))}
    return rows


def speeds(builds: list[Build], rows: dict[str, dict[str, Any]], prompt: Prompt, arguments: argparse.Namespace) -> None:
    """Add speed and memory to the rows that run here."""
    timed = [build for build in builds if build.format not in NOT_TIMED and "error" not in rows[build.name]]
    ready = [Contender(build.name, build.engine, build.path(arguments.work), sys.executable) for build in timed]
    for contender in ready:  # a .pte that is new here is tried out in a process of its own, once
        with Worker(contender, threads=arguments.threads, context=CONTEXT) as worker:
            worker.prefill(prompt)
    runs, failed = take_turns(
        ready, arguments.rounds, lambda contender: measure(contender, prompt, arguments.new, arguments.threads)
    )
    for contender in ready:
        rows[contender.name] |= failed.get(contender.name) or medians(runs[contender.name])


def _figure(value: float | None, known: float | None, scale: float = 1.0, digits: int = 0) -> str:
    measured = "" if value is None else f"{value / scale:.{digits}f}"
    return measured if known is None else f"{measured} ({known:g})".strip()


def _median(row: Mapping[str, Any], key: str) -> float | None:
    found: float | None = row[key]["median"] if key in row else None
    return found


def show(builds: list[Build], rows: dict[str, dict[str, Any]]) -> None:
    """Print the figures, those known before in brackets; then ExecuTorch as a multiple of the plain export."""
    cells = []
    for build in builds:
        row, known = rows[build.name], build.known or Known("")
        prefill, decode, peak = (_median(row, key) for key in MEASURES)
        if "error" not in row:
            cells.append(
                (
                    build.name,
                    _figure(row.get("convert_s"), known.convert_s, digits=1),
                    _figure(row.get("convert_peak_bytes"), known.convert_peak_mb, 1e6),
                    _figure(row["file_bytes"], known.file_mb, 1e6, 1),
                    _figure(prefill, known.prefill),
                    _figure(decode, known.decode),
                    _figure(peak, known.peak_mb, 1e6),
                    row["date"],
                )
            )
    head = ("format", "convert s", "peak MB", "file MB", "prefill tok/s", "decode tok/s", "run peak MB", "converted")
    print_table(head, cells)
    _show_ratios(builds, rows)
    for name, row in rows.items():
        if "error" in row:
            print(f"{name}: {row['error']}")


def _show_ratios(builds: list[Build], rows: dict[str, dict[str, Any]]) -> None:
    plain = rows.get(PLAIN, {})
    ours = [build.name for build in builds if build.format == "executorch" and build.scheme]
    if MEASURES[0] not in plain:
        return
    print()
    cells = []
    for name in (name for name in ours if MEASURES[0] in rows[name]):
        ratios = [f"{rows[name][key]['median'] / plain[key]['median']:.2f}" for key in MEASURES]
        cells.append((name, *ratios, f"{rows[name]['file_bytes'] / plain['file_bytes']:.3f}"))
    print_table((f"divided by: {PLAIN}", "prefill", "decode", "peak memory", "file"), cells)


def main() -> int:
    """Convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "edgekit-benchmarks" / "formats")
    parser.add_argument("--only", action="append", default=[], metavar="FORMAT", help="only this one; may be repeated")
    parser.add_argument("--convert-again", action="store_true", help="all but the plain export, though they are there")
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain ExecuTorch export")
    parser.add_argument("--no-speed", action="store_true", help="conversions only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    arguments = parser.parse_args()
    if shutil.which(EDGEKIT) is None:
        parser.error(f"{EDGEKIT} is not there: install EdgeKit with the formats' extras into this environment")
    arguments.work.mkdir(parents=True, exist_ok=True)
    plain = [] if arguments.no_plain else [PLAIN_BUILD]
    builds = [build for build in (*BUILDS, *plain) if not arguments.only or build.format in arguments.only]
    rows = conversions(builds, arguments, arguments.work)
    if not arguments.no_speed:
        speeds(builds, rows, make_prompt(checkpoint(arguments.source, arguments.work), arguments.prompt), arguments)
    if arguments.json:
        print(json.dumps({"threads": arguments.threads, "context": CONTEXT, "rows": rows}))
    else:
        show(builds, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
