"""Generation as an app sees it: EdgeKit beside ONNX Runtime GenAI and llama.cpp, and what its own parts cost.

Every figure is a median over rounds in which all take turns, each in a process of its own, on an otherwise idle Linux
machine; ratios are of pairs of the same round, with a 95% interval from a bootstrap over the rounds.

- engines: cold start (process, weights, first token), time to first token, prefill, decode with and without speculation
  by n-grams, peak memory. Replies are greedy and end where the model ends them, so that their texts differ a little.
- speculation: EdgeKit's decode speed with over without, for each workload.
- overhead: decode with a JSON schema and with the full sampling set, over plain greedy decode; no speculation.
- sessions: time to first token of a second turn after a history of 1,000 tokens over that of the first; resident memory
  over 10,000 generated tokens and over 1,000 opened and closed sessions.

    python tests/benchmarks/generate.py --source DIR_OR_sample --peers-python PEERS/bin/python
        [--rounds 7] [--new 128] [--threads 2] [--only engines speculation overhead sessions] [--plot FILE.svg] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from builds import contenders
from convert import CommandError, add_common_arguments, print_table, workspace
from engines import Prompt, Timing
from peers import Contender, Worker, take_turns
from sessions import measure_memory, measure_turns
from workloads import COPY_HEAVY, FIELDS_SCHEMA, FREE_TEXT, FULL_SAMPLING, OPTIONS

from edgekit.plot import bars

Row = dict[str, Any]
NAMES = ("edgekit int8", "edgekit int4-mixed", "onnxruntime-genai int4", "llama.cpp Q8_0", "llama.cpp Q4_0")
SECTIONS = ("engines", "speculation", "overhead", "sessions")
RESAMPLES = 2_000
CONTEXT = 1_024


class Prompts:
    """The workloads in the words of the checkpoint's chat template."""

    def __init__(self, source: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        self.ends = [self._tokenizer.eos_token_id]

    def chat(self, text: str) -> Prompt:
        """One user message."""
        message = [{"role": "user", "content": text}]
        rendered = self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return Prompt(rendered, self._tokenizer.encode(rendered, add_special_tokens=False))


def median_interval(values: Sequence[float]) -> dict[str, float]:
    """The median and a 95% interval of it."""
    array, random = np.asarray(values), np.random.default_rng(0)
    medians = np.median(random.choice(array, size=(RESAMPLES, len(array))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return {"median": float(np.median(array)), "low": float(low), "high": float(high)}


def measure_engine(contender: Contender, prompts: Prompts, new: int, threads: int) -> Row:
    """One round of one engine: its start, then every workload without options of its own, both ways."""
    started = time.perf_counter()
    row: Row = {"decode": {}, "ttft_s": {}, "prefill_tokens_per_s": {}}
    with Worker(contender, threads=threads, context=CONTEXT) as worker:
        plain = {"speculate": False, "ends": prompts.ends} if contender.engine != "edgekit" else {"speculate": False}
        worker.reply(prompts.chat("Hi"), 1, plain)
        row["cold_start_s"] = time.perf_counter() - started
        for name, text in (COPY_HEAVY | FREE_TEXT).items():
            if name in OPTIONS:
                continue
            prompt = prompts.chat(text)
            for speculate in (False, True):
                timing = worker.reply(prompt, new, plain | {"speculate": speculate})
                row["decode"][f"{name}{', speculated' * speculate}"] = timing.decode_tokens_per_s
                if not speculate:
                    row["ttft_s"][name] = timing.ttft_s
                    row["prefill_tokens_per_s"][name] = len(prompt.tokens) / timing.ttft_s
        row["peak_rss_bytes"] = worker.peak_rss_bytes()
    return row


def measure_engines(ready: Sequence[Contender], prompts: Prompts, arguments: argparse.Namespace) -> dict[str, Row]:
    """All rounds of all engines; medians, or why one did not run."""
    runs, failed = take_turns(
        ready, arguments.rounds, lambda contender: measure_engine(contender, prompts, arguments.new, arguments.threads)
    )
    return {c.name: failed[c.name] if c.name in failed else _medians(runs[c.name]) for c in ready}


def _medians(rows: Sequence[Row]) -> Row:
    first = rows[0]
    return {
        key: _medians([row[key] for row in rows])
        if isinstance(first[key], dict)
        else statistics.median(row[key] for row in rows)
        for key in first
    }


def measure_pairs(
    contender: Contender, cases: Mapping[str, tuple[Prompt, Row, Row]], new: int, rounds: int, threads: int
) -> dict[str, Row]:
    """Decode speed with the second options over that with the first, in turns within one process."""
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    with Worker(contender, threads=threads, context=CONTEXT) as worker:
        for turn in range(-1, rounds):  # the first round warms up
            for name, (prompt, first, second) in cases.items():
                order = (first, second) if turn % 2 else (second, first)
                timings: list[Timing] = [worker.reply(prompt, new, options) for options in order]
                if turn < 0 or min(timing.tokens for timing in timings) < 2:
                    continue
                ordered = timings if turn % 2 else timings[::-1]
                speeds[name].append((ordered[0].decode_tokens_per_s, ordered[1].decode_tokens_per_s))
    return {
        name: {
            "ratio": median_interval([after / before for before, after in pairs]),
            "before_tokens_per_s": statistics.median(before for before, _ in pairs),
            "after_tokens_per_s": statistics.median(after for _, after in pairs),
        }
        for name, pairs in speeds.items()
    }


def speculation_cases(prompts: Prompts) -> dict[str, tuple[Prompt, Row, Row]]:
    """Every workload without and with speculation."""
    cases = {}
    for name, text in (COPY_HEAVY | FREE_TEXT).items():
        options = OPTIONS.get(name, {})
        cases[name] = (prompts.chat(text), {**options, "speculate": False}, {**options, "speculate": True})
    return cases


def overhead_cases(prompts: Prompts) -> dict[str, tuple[Prompt, Row, Row]]:
    """What masks and filters cost."""
    plain, json_prompt = {"speculate": False}, prompts.chat(COPY_HEAVY["JSON"])
    story = prompts.chat(FREE_TEXT["story"])
    return {
        "JSON schema": (json_prompt, plain, plain | {"schema": FIELDS_SCHEMA}),
        "full sampling": (story, plain, plain | FULL_SAMPLING),
    }


def show_engines(rows: Mapping[str, Row]) -> None:
    """Print what the engines reach."""
    good = {name: row for name, row in rows.items() if "error" not in row}
    cells: list[tuple[str, ...]] = []
    for name, row in good.items():
        ttft = statistics.median(row["ttft_s"].values())
        prefill = statistics.median(row["prefill_tokens_per_s"].values())
        spans = (
            f"{row['cold_start_s']:.2f}",
            f"{1e3 * ttft:.0f}",
            f"{prefill:.0f}",
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
        )
        cells.append((name, *spans))
    print_table(("engine", "cold start s", "first token ms", "prefill tok/s", "peak MB"), cells)
    print()
    workloads = list(next(iter(good.values()))["ttft_s"]) if good else []
    cells = []
    for name, row in good.items():
        pairs = [(row["decode"][work], row["decode"][f"{work}, speculated"]) for work in workloads]
        cells.append((name, *(f"{plain:.0f} > {fast:.0f}" for plain, fast in pairs)))
    print_table(("decode tok/s, plain > speculated", *workloads), cells)
    for name, row in rows.items():
        if "error" in row:
            print(f"{name}: {row['error']}")


def show_pairs(title: str, rows: Mapping[str, Row]) -> None:
    """Print ratios with their intervals."""
    cells = []
    for name, row in rows.items():
        ratio, speeds = row["ratio"], (row["before_tokens_per_s"], row["after_tokens_per_s"])
        interval = f"{ratio['low']:.2f}-{ratio['high']:.2f}"
        cells.append((name, *(f"{speed:.0f}" for speed in speeds), f"{ratio['median']:.2f}", interval))
    print()
    print_table((title, "tok/s without", "with", "ratio", "95%"), cells)


def plot(path: Path, rows: Mapping[str, Row]) -> None:
    """Draw decode speeds: EdgeKit as it comes, peers as they come and with their own lookup."""
    groups: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        for work, speed in row.get("decode", {}).items():
            workload, _, speculated = work.partition(", ")
            series = f"{name}{', n-gram drafts' * bool(speculated)}"
            if name.startswith("edgekit") and not speculated:
                continue
            groups.setdefault(workload, {})[series] = speed
    if groups:
        chart = bars("Decode speed, SmolLM2-135M", "tokens a second, greedy; longer is faster", groups)
        path.write_text(chart, encoding="utf-8")


def measure(arguments: argparse.Namespace) -> Row:
    """Everything that was asked for."""
    source, work = workspace(arguments)
    prompts, ready, found = Prompts(source), [], {"threads": arguments.threads}
    missing: dict[str, Row] = {}
    for candidate in contenders(source, work, arguments.peers_python):
        ours = candidate.name == NAMES[0] or "engines" in arguments.only
        if candidate.name not in NAMES or not ours:
            continue
        try:
            ready.append(candidate.resolve())
        except (CommandError, OSError) as error:
            missing[candidate.name] = {"error": str(error)}
    if "engines" in arguments.only:
        found["engines"] = measure_engines(ready, prompts, arguments) | missing
    bundles = [contender for contender in ready if contender.engine == "edgekit"]
    limits = (arguments.new, arguments.rounds, arguments.threads)
    if "speculation" in arguments.only:
        found["speculation"] = {c.name: measure_pairs(c, speculation_cases(prompts), *limits) for c in bundles}
    if "overhead" in arguments.only:
        found["overhead"] = {c.name: measure_pairs(c, overhead_cases(prompts), *limits) for c in bundles}
    if "sessions" in arguments.only:
        found["turns"] = measure_turns(str(bundles[0].artifact), arguments.threads, arguments.rounds)
        found["memory"] = measure_memory(str(bundles[0].artifact), arguments.threads)
    return found


def show(found: Row) -> None:
    """Print all tables."""
    if "engines" in found:
        show_engines(found["engines"])
    for section, title in (("speculation", "speculation"), ("overhead", "overhead")):
        for name, rows in found.get(section, {}).items():
            show_pairs(f"{title}, {name}", rows)
    if "turns" in found:
        turns, memory = found["turns"], found["memory"]
        print(f"\nfirst token of the first turn ({turns['first_tokens']} tokens): {1e3 * turns['first_s']:.0f} ms")
        ratio = median_interval(turns["ratios"])
        print(f"first token of the second: {ratio['median']:.1%} of that ({ratio['low']:.1%}-{ratio['high']:.1%})")
        for name, (before, after) in memory.items():
            print(f"resident memory, {name}: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after")


def main() -> int:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=128, help="most tokens of a reply")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--plot", type=Path, help="write the engines' decode speeds as SVG")
    arguments = parser.parse_args()
    found = measure(arguments)
    print(json.dumps(found)) if arguments.json else show(found)
    if arguments.plot:
        plot(arguments.plot, found.get("engines", {}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
