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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from convert import (
    CommandError,
    add_common_arguments,
    edgekit_command,
    genai_command,
    print_table,
    require,
    run,
    workspace,
    write_gguf,
)
from peers import Contender, Prompt, Worker, take_turns

PASSAGE = """The lighthouse stood at the end of a long stone pier, and for most of the year nobody walked out to it. In
winter the waves came over the wall and froze on the railings. The keeper had lived there for eleven years. He kept a
notebook in which he wrote the direction of the wind, the height of the barometer and the names of the ships that came
past, and in the evening he read the entries of the same day in other years. On a Tuesday in November he found a letter
under the door. It was addressed to a man who had kept the light before him, and it had been sent thirty years ago from
a town on the other side of the sea. """
EDGEKIT_SCHEMES = ("int8", "int4-mixed", "int4")
LLAMA_CPP_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}
QUANTIZE = """
import ctypes, sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.nthread, options.ftype = 2, int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
"""
MEASURES = ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A contender whose artifact is still to be made."""

    name: str
    engine: str
    python: str | None
    make: Callable[[], Path]

    def resolve(self) -> Contender:
        """Make the artifact, or say why not."""
        require(self.engine, self.python)
        assert self.python
        return Contender(self.name, self.engine, self.make(), self.python)


def contenders(source: Path, work: Path, peers_python: str | None) -> list[Candidate]:
    """EdgeKit's schemes and its peers' builds of one checkpoint. Bundles are made anew, peers' files once."""

    def bundle(scheme: str) -> Path:
        out = work / f"{scheme}.edgekit"
        run(edgekit_command(source, out, scheme, "--no-verify"), work / "edgekit.log")
        return out

    def genai() -> Path:
        out = work / "genai-int4"
        if not (out / "genai_config.json").exists():
            run(genai_command(source, out, str(peers_python)), work / "genai.log")
        return out

    def llama(kind: str) -> Path:
        whole, out = work / "f16.gguf", work / f"{kind}.gguf"
        if not whole.exists():
            write_gguf(source, whole)
        if not out.exists():
            command = [str(peers_python), "-c", QUANTIZE, str(whole), str(out), str(LLAMA_CPP_TYPES[kind])]
            run(command, work / "llama.log")
        return out

    return [
        *(Candidate(f"edgekit {s}", "edgekit", sys.executable, partial(bundle, s)) for s in EDGEKIT_SCHEMES),
        Candidate("onnxruntime-genai int4", "onnxruntime-genai", peers_python, genai),
        *(Candidate(f"llama.cpp {k}", "llama.cpp", peers_python, partial(llama, k)) for k in LLAMA_CPP_TYPES),
    ]


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
        values = {key: [run[key] for run in runs[contender.name]] for key in MEASURES}
        spread = {key: {"median": statistics.median(v), "min": min(v), "max": max(v)} for key, v in values.items()}
        rows[contender.name] = {**spread, "engine": contender.engine, "file_bytes": contender.file_bytes}
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
    ready: list[Contender] = []
    failed: dict[str, dict[str, Any]] = {}
    for candidate in contenders(source, work, arguments.peers_python):
        try:
            ready.append(candidate.resolve())
        except (CommandError, OSError) as error:
            failed[candidate.name] = {"error": str(error)}
    rows = measure_all(ready, make_prompt(source, arguments.prompt), arguments) | failed
    print(json.dumps({"threads": arguments.threads, "rows": rows})) if arguments.json else show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
