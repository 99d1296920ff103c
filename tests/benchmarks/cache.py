"""Key-value caches kept as float32, float16 and int8: quality, decode speed and bytes at several lengths.

Quality: one program for each cache with weights of full precision reads the same texts; mean KL divergence and top-1 agreement
against the float32 cache at the positions just before each length. The texts are the model's own (temperature 1, fixed seeds,
end tokens barred), or a file's windows. Speed: milliseconds a token of programs with the device's default weights, medians of
rounds in turns on an otherwise idle machine.

    python tests/benchmarks/cache.py --source sample [--lengths 256 1024 4096] [--texts 3] [--text FILE] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from convert import CommandError, edgekit_command, print_table, run

import edgekit
from edgekit.divergence import Divergence, log_probabilities
from edgekit.quant import CacheFormat

CHUNK = 128
COMPARED = 64  # positions before each length
UNIT = 32  # neighbours that intervals count as one
STEPS = 32  # tokens decoded for each measurement
Tokens = npt.NDArray[np.int64]


def main() -> int:
    """Measure and print; 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--texts", type=int, default=3, help="that many texts of the model's own, or windows of --text")
    parser.add_argument("--text", type=Path, help="a text file to read instead")
    parser.add_argument("--rounds", type=int, default=5, help="of speed; 0 measures quality alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if any(length < CHUNK or length % CHUNK for length in arguments.lengths):
        parser.error(f"--lengths are multiples of {CHUNK}, in which the texts are read")
    try:
        with tempfile.TemporaryDirectory() as work:
            rows = measure(arguments, Path(work))
    except (CommandError, edgekit.EdgeKitError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(rows))
    else:
        show(rows)
    return 0


def measure(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """A row for each cache and length."""
    context = max(arguments.lengths)
    fast = {kind: converted(arguments.source, work, "auto", kind, context) for kind in CacheFormat}
    texts = read_texts(fast[CacheFormat.FLOAT32], arguments)
    rows = [
        {"cache": kind.value, "length": length} | figures
        for kind, found in quality(arguments, work, texts).items()
        for length, figures in found.items()
    ]
    if arguments.rounds:
        speeds = speed(fast, texts[0], arguments)
        rows = [row | speeds[row["cache"], row["length"]] for row in rows]
    return rows


def converted(source: str, work: Path, quant: str, kind: CacheFormat, context: int) -> Path:
    """A bundle with this cache."""
    out = work / f"{quant}-{kind.value}"
    options = ("--cache", kind.value, "--context", str(context), "--no-verify")
    run(edgekit_command(Path(source), out, quant, *options), work / "log")
    return out


def read_texts(bundle: Path, arguments: argparse.Namespace) -> list[Tokens]:
    """Texts as long as the longest length: written by the model, or windows of a file."""
    length = max(arguments.lengths)
    with edgekit.load(bundle, threads=arguments.threads) as model:
        if arguments.text:
            ids = np.array(model.token_ids(arguments.text.read_text(encoding="utf-8"), add_special_tokens=False))
            if len(ids) < length:
                raise CommandError(f"{arguments.text} has {len(ids)} tokens, fewer than {length}")
            starts = np.linspace(0, len(ids) - length, arguments.texts).astype(int)
            return [ids[start : start + length] for start in starts]
        return [written(model, length, seed) for seed in range(arguments.texts)]


def written(model: Any, length: int, seed: int) -> Tokens:
    """A text that the model samples."""
    random, ends = np.random.default_rng(seed), sorted(model.end_tokens)
    tokens = model.token_ids("The history of the printing press begins", add_special_tokens=True)
    decoder = model.backend.decoder()
    logits = decoder.forward(np.array(tokens, np.int64), rows=1, rope_length=length)
    while len(tokens) < length:
        weights = np.exp(logits[0].astype(np.float64) - logits[0].max())
        weights[ends] = 0
        cumulative = np.cumsum(weights)
        tokens.append(int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")))
        logits = decoder.forward(np.array(tokens[-1:], np.int64), rows=1, rope_length=length)
    return np.array(tokens, np.int64)


def quality(
    arguments: argparse.Namespace, work: Path, texts: list[Tokens]
) -> dict[CacheFormat, dict[int, dict[str, Any]]]:
    """Figures of each cache at each length, against the float32 cache."""
    context = max(arguments.lengths)
    found: dict[CacheFormat, dict[int, dict[str, Any]]] = {}
    expected: list[dict[int, npt.NDArray[np.float64]]] = []
    for kind in CacheFormat:
        bundle = converted(arguments.source, work, "fp32", kind, context)
        with edgekit.load(bundle, threads=arguments.threads) as model:
            read = [read_rows(model, text, arguments.lengths) for text in texts]
            token_bytes = model.program.graph.cache.token_bytes
        expected = expected or read
        found[kind] = {
            length: {"cache_bytes": token_bytes * length} | compared(expected, read, texts, length)
            for length in arguments.lengths
        }
    return found


def read_rows(model: Any, text: Tokens, lengths: list[int]) -> dict[int, npt.NDArray[np.float64]]:
    """Log-probabilities of the positions before each length, from one pass over the text."""
    decoder, found = model.backend.decoder(), {}
    ends = sorted({*range(CHUNK, max(lengths) + 1, CHUNK), *lengths, *(length - COMPARED for length in lengths)})
    start = 0
    for end in ends:
        rows = end - start if end in lengths else 1
        logits = decoder.forward(text[start:end], rows=rows, rope_length=len(text))
        if end in lengths:
            found[end] = log_probabilities(logits[-COMPARED:])
        start = end
    decoder.close()
    return found


def compared(
    expected: list[dict[int, npt.NDArray[np.float64]]],
    read: list[dict[int, npt.NDArray[np.float64]]],
    texts: list[Tokens],
    length: int,
) -> dict[str, Any]:
    """KL divergence and agreement at one length."""
    divergence = Divergence()
    for reference, mine, text in zip(expected, read, texts, strict=True):
        followers = np.append(text[length - COMPARED + 1 : length], text[0])  # the last one is unknown; KL needs none
        for start in range(0, COMPARED, UNIT):
            part = slice(start, start + UNIT)
            divergence.add(reference[length][part], mine[length][part], followers[part])
    return divergence.figures().rounded().to_json()


def speed(
    bundles: dict[CacheFormat, Path], text: Tokens, arguments: argparse.Namespace
) -> dict[tuple[str, int], dict[str, float]]:
    """Milliseconds a token of prefill and of decode at each length, the caches in turns."""
    times: dict[tuple[str, int], list[tuple[float, float]]] = {}
    models = {kind: edgekit.load(bundle, threads=arguments.threads) for kind, bundle in bundles.items()}
    for _ in range(arguments.rounds):
        for kind, model in models.items():
            decoder, start = model.backend.decoder(), 0
            for length in sorted(arguments.lengths):
                prefill_s = forwards(decoder, text, range(start, length - STEPS, CHUNK), length - STEPS)
                decode_s = forwards(decoder, text, range(length - STEPS, length), length)
                times.setdefault((kind.value, length), []).append(
                    (prefill_s / (length - STEPS - start), decode_s / STEPS)
                )
                start = length
            decoder.close()
    for model in models.values():
        model.close()
    return {
        key: {
            name: 1000 * statistics.median(column)
            for name, column in zip(("prefill_ms", "decode_ms"), zip(*runs, strict=True), strict=True)
        }
        for key, runs in times.items()
    }


def forwards(decoder: Any, text: Tokens, starts: range, stop: int) -> float:
    """Seconds that these tokens take, in steps of the range."""
    begun = time.perf_counter()
    for start in starts:
        decoder.forward(text[start : min(start + starts.step, stop)], rows=1, rope_length=len(text))
    return time.perf_counter() - begun


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    head = ["cache", "length", "cache MB", "mean KL", "p99 KL", "top-1", "prefill ms/token", "decode ms/token"]
    print_table(
        head,
        [
            [
                row["cache"],
                f"{row['length']:,}",
                f"{row['cache_bytes'] / 1e6:.1f}",
                f"{row['kl_mean']:.2g}",
                f"{row['kl_p99']:.2g}",
                f"{row['top1_agreement']:.3f}",
                *(f"{row[name]:.2f}" if name in row else "-" for name in ("prefill_ms", "decode_ms")),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
