"""Speed and memory of EdgeKit's bundles beside ONNX Runtime GenAI and llama.cpp, on the machine it runs on.

Measures prefill and greedy decode in tokens a second, peak resident memory and file size, for one checkpoint at 4 and 8
bits, all from the same full-precision weights. Every engine runs in a process of its own, in turns, once a round; the
table shows medians over the rounds. Run it on an otherwise idle Linux machine (x86-64 or ARM), with `--threads` set to
its number of physical cores.

    python tests/benchmarks/speed.py --source DIR_OR_sample --peers-python PEERS/bin/python
        [--rounds 5] [--prompt 256] [--new 64] [--threads 2] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from builds import Candidate, contenders
from convert import CommandError, add_common_arguments, print_table, workspace
from engines import Prompt
from peers import Contender, Worker, take_turns

PASSAGE = """The lighthouse stood at the end of a long stone pier, and for most of the year nobody walked out to it. In
winter the waves came over the wall and froze on the railings. The keeper had lived there for eleven years. He kept a
notebook in which he wrote the direction of the wind, the height of the barometer and the names of the ships that came
past, and in the evening he read the entries of the same day in other years. On a Tuesday in November he found a letter
under the door. It was addressed to a man who had kept the light before him, and it had been sent thirty years ago from
a town on the other side of the sea. """
MEASURES = ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes")


def resolve_all(candidates: list[Candidate]) -> tuple[list[Contender], dict[str, dict[str, Any]]]:
    """Make every artifact; those that could be made, and why others could not."""
    ready: list[Contender] = []
    failed: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        print(f"making {candidate.name}", file=sys.stderr)
        try:
            ready.append(candidate.resolve())
        except (CommandError, OSError) as error:
            failed[candidate.name] = {"error": str(error)}
    return ready, failed


def make_prompt(source: Path, length: int) -> Prompt:
    """A text of `length` tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokens = tokenizer.encode(PASSAGE, add_special_tokens=False).ids
    tokens = (tokens * (length // len(tokens) + 1))[:length]
    return Prompt(tokenizer.decode(tokens), tokens)


def measure(contender: Contender, prompt: Prompt, new: int, threads: int) -> dict[str, float]:
    """One round of one engine: warm it up, then time it."""
    with Worker(contender, threads=threads, context=len(prompt.tokens) + new + 64) as worker:
        worker.prefill(prompt)
        worker.decode(8)
        prefill, decode = worker.prefill(prompt), worker.decode(new)
        values = (len(prompt.tokens) / prefill, new / decode, worker.peak_rss_bytes())
    return dict(zip(MEASURES, values, strict=True))


def medians(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median and range of each measure over the rounds."""
    values = {key: [run[key] for run in runs] for key in MEASURES}
    return {key: {"median": statistics.median(v), "min": min(v), "max": max(v)} for key, v in values.items()}


def measure_all(ready: list[Contender], prompt: Prompt, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All rounds: medians and ranges of every engine, or why it did not run."""
    runs, failed = take_turns(
        ready, arguments.rounds, lambda contender: measure(contender, prompt, arguments.new, arguments.threads)
    )
    rows: dict[str, dict[str, Any]] = {}
    for contender in ready:
        if contender.name in failed:
            rows[contender.name] = dict(failed[contender.name])
            continue
        rows[contender.name] = {
            **medians(runs[contender.name]),
            "engine": contender.engine,
            "file_bytes": contender.file_bytes,
        }
    return rows


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print the figures, then EdgeKit's speed as a multiple of each peer's."""
    good = {name: row for name, row in rows.items() if "error" not in row}
    cells = []
    for name, row in good.items():
        spans = [f"{row[key]['median']:.0f} ({row[key]['min']:.0f}-{row[key]['max']:.0f})" for key in MEASURES[:2]]
        cells.append((name, *spans, f"{row['peak_rss_bytes']['median'] / 1e6:.0f}", f"{row['file_bytes'] / 1e6:.1f}"))
    print_table(("engine", "prefill tok/s", "decode tok/s", "peak MB", "file MB"), cells)
    ours = [name for name, row in good.items() if row["engine"] == "edgekit"]
    ratios = [
        (name, peer, *(f"{good[name][key]['median'] / row[key]['median']:.2f}" for key in MEASURES))
        for name in ours
        for peer, row in good.items()
        if row["engine"] != "edgekit"
    ]
    if ratios:
        print()
        print_table(("edgekit", "divided by", "prefill", "decode", "peak memory"), ratios)
    for name, row in rows.items():
        if "error" in row:
            print(f"{name}: {row['error']}")


def main() -> int:
    """Measure every engine and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt, at most 512")
    parser.add_argument("--new", type=int, default=64, help="tokens to decode")
    arguments = parser.parse_args()
    source, work = workspace(arguments)
    ready, failed = resolve_all(contenders(source, work, arguments.peers_python))
    rows = measure_all(ready, make_prompt(source, arguments.prompt), arguments) | failed
    print(json.dumps({"threads": arguments.threads, "rows": rows})) if arguments.json else show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
