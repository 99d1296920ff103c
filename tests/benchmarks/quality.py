"""Quality of the quantized programs beside their size and speed: how far each engine's distribution is from full precision.

Every engine reads the same tokens: text that the full-precision model itself samples (transformers, float32, temperature 1,
fixed seed; chat and plain, several topics), from prompts that recipes were tuned on and from held-out ones, and a user's own
file. For each it prints the mean KL divergence over the whole vocabulary (nats), its 99th percentile, top-1 agreement and the
perplexity ratio (`edgekit.divergence` says what they are), the means with 95% intervals, the size of the weights, and decode
speed: medians of alternating rounds, as in `speed.py`, which need an idle machine. Linux.

    python tests/benchmarks/quality.py --source sample --off-grid --peers-python PEERS/bin/python
        [--prompts tuned|held-out|both] [--text FILE] [--positions 2000] [--rounds 5] [--only GLOB]... [--plot FILE.svg] [--json]

--off-grid measures on a copy of the checkpoint that computes the same and whose weights lie on no grid (`off_grid.py`):
right for `sample`, whose weights were 4-bit values before. Where the source is a GGUF file, the file itself is measured too,
carried over by EdgeKit and on llama.cpp, against its own dequantized weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from builds import GGUF_FILE, Candidate, contenders, of_file, variants
from convert import CommandError, add_common_arguments, folder_for, gguf_file, print_table, workspace
from off_grid import make_off_grid
from peers import Contender, Worker, WorkerError, take_turns
from speed import MEASURES, make_prompt, measure, medians, resolve_all
from texts import PROMPTS, Reference, Text, sampled_texts, write_log_probabilities

from edgekit.divergence import Divergence, Interval, log_probabilities
from edgekit.plot import Point, scatter

Row = dict[str, Any]
OWN = "own text"
BASES = ("onnxruntime-genai int4", "llama.cpp Q4_K_M")  # what EdgeKit's rows are compared with


@dataclass(frozen=True, slots=True)
class TextSet:
    """Texts of one kind, and the files of the reference's log-probabilities."""

    name: str
    texts: list[Text]
    expected: list[Path]


def read_text_sets(source: Path, work: Path, folder: Path, arguments: argparse.Namespace) -> list[TextSet]:
    """All texts, read by the full-precision model; the first set is the one that the table's main columns show.

    Raises:
        CommandError: The user's file can't be used.
    """
    reference = Reference(source, arguments.threads)
    names = [name for name in ("held-out", "tuned") if arguments.prompts in {name, "both"}]
    found = {name: sampled_texts(reference, name, work, arguments.positions, arguments.seed) for name in names}
    if arguments.text:
        found[OWN] = reference.read(arguments.text, arguments.positions)
    sets = []
    for number, (name, texts) in enumerate(found.items()):
        (folder / str(number)).mkdir()
        sets.append(TextSet(name, texts, list(write_log_probabilities(reference, texts, folder / str(number)))))
    return sets


def compare(contender: Contender, sets: Sequence[TextSet], threads: int) -> tuple[int, dict[str, Divergence]]:
    """One engine's size in bytes, and how far it is from the reference on each set of texts."""
    found = {texts.name: Divergence() for texts in sets}
    with Worker(contender, threads=threads, context=1024) as worker:
        for texts in sets:
            for text, path in zip(texts.texts, texts.expected, strict=True):
                logits = worker.logits(text.tokens[:-1])[text.start - 1 :]
                followers = np.asarray(text.tokens[text.start :])
                found[texts.name].add(np.load(path).astype(np.float64), log_probabilities(logits), followers)
        return contender.file_bytes or worker.weight_bytes(), found


def summary(divergences: Mapping[str, Divergence]) -> dict[str, Row]:
    """The figures of each set of texts."""
    rows: dict[str, Row] = {}
    for name, divergence in divergences.items():
        rows[name] = asdict(divergence.figures()) | asdict(divergence.perplexity())
    return rows


def measure_speed(ready: Sequence[Contender], source: Path, arguments: argparse.Namespace) -> dict[str, Row]:
    """Speed and memory of each engine, or why it was not timed."""
    prompt = make_prompt(source, 256)
    runs, failed = take_turns(ready, arguments.rounds, lambda one: measure(one, prompt, 64, arguments.threads))
    return {name: medians(rows) for name, rows in runs.items() if rows} | {
        name: {"not_timed": row["error"]} for name, row in failed.items()
    }


def ratios(divergences: Mapping[str, dict[str, Divergence]], rows: Mapping[str, Row], main: str) -> list[Row]:
    """EdgeKit's rows beside those that it is held to: bytes, KL (of the same positions) and decode speed, divided."""
    pairs = [(name, base) for base in BASES for name in divergences if name.startswith("edgekit")]
    pairs.append((f"{GGUF_FILE}: edgekit keep", f"{GGUF_FILE}: llama.cpp"))
    found = []
    for name, base in pairs:
        if not {name, base} <= set(divergences):
            continue
        ratio, interval = divergences[name][main].kl_ratio(divergences[base][main])
        speeds = [rows[each].get(MEASURES[1], {}).get("median") for each in (name, base)]
        found.append(
            {
                "name": name,
                "base": base,
                "bytes": rows[name]["file_bytes"] / rows[base]["file_bytes"],
                "kl": ratio,
                "kl_interval": interval,
                "decode": speeds[0] / speeds[1] if all(speeds) else None,
            }
        )
    return found


def measure_all(candidates: list[Candidate], sets: list[TextSet], source: Path, arguments: argparse.Namespace) -> Row:
    """The rows of the table, and EdgeKit's ratios to others."""
    ready, failed = resolve_all(candidates)
    rows: dict[str, Row] = dict(failed)
    divergences: dict[str, dict[str, Divergence]] = {}
    for contender in ready:
        print(f"comparing {contender.name}", file=sys.stderr)
        try:
            size, found = compare(contender, sets, arguments.threads)
        except WorkerError as error:
            rows[contender.name] = {"error": str(error)}
            continue
        divergences[contender.name] = found
        rows[contender.name] = {"engine": contender.engine, "file_bytes": size, "texts": summary(found)}
        kl = rows[contender.name]["texts"][sets[0].name]["kl_mean"]
        print(f"{contender.name}: {size / 1e6:.1f} MB, mean KL {kl:.4f}", file=sys.stderr)
    timed = [one for one in ready if one.name in divergences]
    for name, speed in measure_speed(timed, source, arguments).items():
        rows[name] |= speed
    ordered = {candidate.name: rows[candidate.name] for candidate in candidates}
    return {"rows": ordered, "ratios": ratios(divergences, rows, sets[0].name)}


def _span(interval: Interval, digits: int) -> str:
    return f"({interval[0]:.{digits}f}-{interval[1]:.{digits}f})"


def _cells(name: str, row: Row, sets: Sequence[str]) -> list[str]:
    main = row["texts"][sets[0]]
    ratio = f"{main['perplexity_ratio']:.3f} {_span(main['perplexity_ratio_interval'], 3)}"
    agreement = f"{main['top1_agreement']:.3f} {_span(main['top1_interval'], 3)}"
    cells = [name, f"{row['file_bytes'] / 1e6:.1f}", f"{main['kl_mean']:.4f} {_span(main['kl_mean_interval'], 4)}"]
    cells += [f"{main['kl_p99']:.3f}", agreement, ratio]
    for other in sets[1:]:
        figures = row["texts"][other]
        cells.append(f"{figures['kl_mean']:.4f}")
        if other == OWN:
            cells.append(f"{figures['perplexity_ratio']:.3f}")
    speed = row.get(MEASURES[1])
    return [*cells, f"{speed['median']:.0f} ({speed['min']:.0f}-{speed['max']:.0f})" if speed else "-"]


def show(found: Row, sets: Sequence[str]) -> None:
    """Print the table, the ratios, and what could not be measured."""
    good = {name: row for name, row in found["rows"].items() if "error" not in row}
    counts = {name: next(iter(good.values()))["texts"][name]["positions"] for name in sets} if good else {}
    print("positions: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    others = [column for name in sets[1:] for column in (f"KL {name}", *(["ppl ratio"] if name == OWN else []))]
    head = ["engine", "MB", f"mean KL {sets[0]} (95%)", "p99 KL", "top-1 (95%)", "perplexity ratio (95%)", *others]
    print_table([*head, "decode tok/s"], [_cells(name, row, sets) for name, row in good.items()])
    if found["ratios"]:
        print()
        cells = [
            (
                row["name"],
                row["base"],
                f"{row['bytes']:.2f}",
                f"{row['kl']:.2f} {_span(row['kl_interval'], 2)}",
                f"{row['decode']:.2f}" if row["decode"] else "-",
            )
            for row in found["ratios"]
        ]
        print_table(("edgekit", "divided by", "bytes", "mean KL (95%)", "decode"), cells)
    for name, row in found["rows"].items():
        if reason := row.get("error") or row.get("not_timed"):
            print(f"{name}: {reason}")


def plot(rows: Mapping[str, Row], main: str, title: str) -> str:
    """Size against KL, as an SVG."""
    groups: dict[str, dict[str, Point]] = {}
    for name, row in rows.items():
        if "error" not in row and not name.startswith(GGUF_FILE):  # a file's own weights are others
            figures = row["texts"][main]
            point = Point(row["file_bytes"] / 1e6, figures["kl_mean"], *figures["kl_mean_interval"])
            groups.setdefault(row["engine"], {})[name.removeprefix(row["engine"]).strip()] = point
    return scatter(title, "weights, MB", "mean KL against full precision, nats", groups)


def chosen(candidates: list[Candidate], patterns: Sequence[str]) -> list[Candidate]:
    """Those whose name fits a pattern; without patterns all.

    Raises:
        CommandError: None does.
    """
    found = [one for one in candidates if not patterns or any(fnmatch(one.name, pattern) for pattern in patterns)]
    if not found:
        raise CommandError(f"--only fits none of: {', '.join(one.name for one in candidates)}")
    return found


def off_grid_copy(source: Path, work: Path) -> Path:
    """The copy, made once."""
    copy = work / "off-grid"
    if not copy.exists():
        print("writing the off-grid copy", file=sys.stderr)
        make_off_grid(source, copy)
    return copy


def arguments_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--torchao-python", help="an interpreter that has torchao; by default that of --peers-python")
    parser.add_argument("--off-grid", action="store_true", help="measure on a copy whose weights lie on no grid")
    parser.add_argument(
        "--prompts", choices=(*PROMPTS, "both"), default="both", help="those that texts are sampled from"
    )
    parser.add_argument("--text", type=Path, help="a text file of your own")
    parser.add_argument("--positions", type=int, default=2000, help="of each set of texts, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 leaves it out")
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="names of the engines to measure")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw size against KL")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> tuple[Row, list[str]]:
    """Measure; the findings, and the names of the sets of texts."""
    original, original_work = workspace(arguments)
    source = off_grid_copy(original, original_work) if arguments.off_grid else original
    work = folder_for(source, arguments.cache)
    python = arguments.peers_python
    candidates = contenders(source, work, python) + variants(source, work, python, arguments.torchao_python or python)
    if file := gguf_file(arguments.source):
        candidates += of_file(file, original_work, python)
    candidates = chosen(candidates, arguments.only)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        sets = read_text_sets(original, original_work, Path(folder), arguments)
        found = measure_all(candidates, sets, source, arguments)
    return found, [texts.name for texts in sets]


def main() -> int:
    """Compare every contender with the full-precision model."""
    arguments = arguments_of()
    try:
        found, sets = run(arguments)
    except CommandError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found)) if arguments.json else show(found, sets)
    if arguments.plot:
        arguments.plot.write_text(plot(found["rows"], sets[0], f"{arguments.source}: size against KL"), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
