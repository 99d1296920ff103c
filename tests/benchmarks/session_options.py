"""What each of ONNX Runtime's options costs and saves: speed as ratios to the default, and memory, private and mapped.

Every set of options has a process of its own; they take short turns, so that each round compares what ran within seconds.
The table shows medians of the rounds' ratios with an interval (bootstrap, 95%). Memory is that of a process which has
generated; peaks are from loading on.

    python tests/benchmarks/session_options.py BUNDLE [--rounds 15] [--threads 2] [--only TEXT] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from convert import print_table
from speed import PASSAGE

from edgekit.bundle import open_bundle
from edgekit.runtime_options import RuntimeOptions
from edgekit.runtimes.engine import load_model
from edgekit.runtimes.process_memory import memory_use

NEW_TOKENS = 48
RESAMPLES = 2000
CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "no spinning": {"spinning": False},
    "no arena": {"arena": False},
    "not packed": {"prepacking": False},
    "read, not mapped": {"mapped_weights": False},
    "one thread": {"threads": 1},
}


def work(bundle: str, changes: dict[str, Any], threads: int) -> None:
    """In the child: load, then answer each line of standard input with the figures of one reply."""
    opened = open_bundle(bundle)
    program = opened.program()
    options = replace(RuntimeOptions(threads=threads), **changes)
    with load_model(opened, replace(program, runtime=options)) as model:
        model.end_tokens = frozenset()
        for _ in sys.stdin:
            stats = model.generate(PASSAGE, max_tokens=NEW_TOKENS, raw=True, speculate=False).stats
            row = {"prefill": stats.prefill_tokens_per_s, "decode": stats.decode_tokens_per_s, "load_s": stats.load_s}
            print(json.dumps(row | asdict(memory_use())), flush=True)


class Child:
    """One set of options, loaded and waiting."""

    def __init__(self, bundle: Path, changes: dict[str, Any], threads: int) -> None:
        command = [sys.executable, __file__, str(bundle), "--worker", json.dumps(changes), "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(self) -> dict[str, Any]:
        """The figures of one reply."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def measure(bundle: Path, names: Sequence[str], rounds: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    """All rounds of all sets; one more that is not counted comes first."""
    children = {name: Child(bundle, CHOICES[name], threads) for name in names}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for turn in range(rounds + 1):
            for name, child in children.items():
                row = child.turn()
                if turn:
                    rows[name].append(row)
    finally:
        for child in children.values():
            child.close()
    return rows


def ratio(rows: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> str:
    """The median of the rounds' ratios and its interval."""
    ratios = np.array([row[key] / other[key] for row, other in zip(rows, base, strict=True)])
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return f"{np.median(ratios):.2f} ({low:.2f}-{high:.2f})"


def show(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Print a row for each set."""
    memory = ("rss_bytes", "private_bytes", "mapped_bytes", "peak_rss_bytes")
    cells = [
        (
            name, *(ratio(found, rows["default"], key) for key in ("prefill", "decode")), f"{found[0]['load_s']:.2f}",
            *(f"{found[-1][key] / 1e6:.0f}" for key in memory),
        )
        for name, found in rows.items()
    ]  # fmt: skip
    print_table(("options", "prefill", "decode", "load s", "RSS MB", "private", "mapped", "peak"), cells)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="sets of options whose name contains this text, beside the default")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(str(arguments.bundle), json.loads(arguments.worker), arguments.threads)
        return 0
    names = [name for name in CHOICES if name == "default" or arguments.only in name]
    rows = measure(arguments.bundle, names, arguments.rounds, arguments.threads)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
