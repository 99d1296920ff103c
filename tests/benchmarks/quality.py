"""Quality of the quantized programs: how far each engine's distribution is from the full-precision model's.

Measures the mean KL divergence over the full vocabulary (nats, with a 95% interval from a bootstrap over texts), its
99th percentile, and top-1 agreement, beside the size of the files. The text is sampled by the full-precision model
itself (transformers, float32, temperature 1, fixed seed) from chat prompts and plain ones; every engine reads the same
tokens, and only sampled positions count. Any Linux machine: the numbers depend a little on its kernels, not its load.

    python tests/benchmarks/quality.py --source DIR_OR_sample --peers-python PEERS/bin/python
        [--positions 2000] [--seed 0] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from convert import CommandError, add_common_arguments, print_table, workspace
from peers import Contender, Logits, Worker, WorkerError
from speed import Candidate, contenders

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]
CHAT_PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain how a bicycle stays upright.",
    "Give me a recipe for vegetable soup with step-by-step instructions.",
    "What should I see in Lisbon in two days?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Summarise the causes of the First World War.",
    "How do I ask my manager for a day off? Draft the email.",
    "What is the difference between a virus and a bacterium?",
    "List five tips for sleeping better and say why each works.",
)
PLAIN_PROMPTS = (
    "The history of the printing press begins",
    "In this chapter we introduce the notion of a derivative. Let f be",
    "It was raining when the train finally arrived, and",
    "The committee announced on Tuesday that",
    "Photosynthesis is the process by which",
    "def read_config(path):\n",
)
NEW_TOKENS = 192


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled text; `tokens[start:]` were sampled."""

    tokens: list[int]
    start: int


class Reference:
    """The full-precision model on transformers."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch: Any = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")

    def _prompts(self) -> list[str]:
        plain = [*PLAIN_PROMPTS]
        if not self._tokenizer.chat_template:
            return [*plain, *CHAT_PROMPTS]
        chats: list[list[dict[str, str]]] = [[{"role": "user", "content": text}] for text in CHAT_PROMPTS]
        return [*plain, *self._tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)]

    def sample(self, positions: int, seed: int) -> list[Sample]:
        """Continue every prompt, over and over, until at least `positions` tokens are sampled."""
        samples: list[Sample] = []
        self._torch.manual_seed(seed)
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        batch = self._tokenizer(self._prompts(), return_tensors="pt", padding=True, add_special_tokens=False)
        pads = (batch["attention_mask"] == 0).sum(dim=1).tolist()
        width = batch["input_ids"].shape[1]
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": NEW_TOKENS}
        ends = self._model.generation_config.eos_token_id
        stops = set(ends if isinstance(ends, list) else [ends])
        while sum(len(sample.tokens) - sample.start for sample in samples) < positions:
            rows = self._model.generate(**batch, **options, pad_token_id=self._tokenizer.pad_token_id).tolist()
            for row, pad in zip(rows, pads, strict=True):
                end = next((i + 1 for i, token in enumerate(row) if i >= width and token in stops), len(row))
                samples.append(Sample(row[pad:end], width - pad))
        return samples

    def logits(self, tokens: Sequence[int]) -> Logits:
        """The logits after every token."""
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([list(tokens)])).logits[0]
        return np.asarray(logits.numpy(), dtype=np.float32)


def load_samples(reference: Reference, cache: Path, positions: int, seed: int) -> list[Sample]:
    """The sampled texts, from the cache when the same ones were asked for before."""
    file = cache / f"samples-{positions}-{seed}.json"
    if not file.exists():
        samples = reference.sample(positions, seed)
        file.write_text(json.dumps([[sample.tokens, sample.start] for sample in samples]))
    return [Sample(tokens, start) for tokens, start in json.loads(file.read_text())]


def log_softmax(logits: Logits) -> Logits:
    """Log-probabilities along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), dtype=np.float32)


@dataclass(slots=True)
class Divergence:
    """What one contender's logits gave: per sequence, KL and agreement at each position."""

    kl: list[Floats]
    same: list[npt.NDArray[np.bool_]]

    def add(self, reference: Logits, logits: Logits) -> None:
        """Compare the logits of one sequence."""
        expected, actual = log_softmax(reference), log_softmax(logits)
        self.kl.append((np.exp(expected) * (expected - actual)).sum(axis=-1, dtype=np.float64))
        self.same.append(reference.argmax(axis=-1) == logits.argmax(axis=-1))

    def interval(self, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """The 95% bootstrap interval of the mean KL; it draws whole texts, whose positions are not independent."""
        sums, counts = np.array([kl.sum() for kl in self.kl]), np.array([len(kl) for kl in self.kl])
        picks = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
        means = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
        return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))

    def summary(self) -> Row:
        """The figures of one row."""
        kl, same = np.concatenate(self.kl), np.concatenate(self.same)
        low, high = self.interval()
        return {
            "kl_mean": float(kl.mean()),
            "kl_low": low,
            "kl_high": high,
            "kl_p99": float(np.percentile(kl, 99)),
            "top1_agreement": float(same.mean()),
            "positions": len(kl),
        }


def sampled_rows(samples: list[Sample], logits_of: Callable[[Sequence[int]], Logits]) -> Iterator[Logits]:
    """The logits that predict the sampled tokens, one array per text."""
    for sample in samples:
        yield logits_of(sample.tokens[:-1])[sample.start - 1 :]


def compare(contender: Contender, samples: list[Sample], expected: list[Path], threads: int) -> Row:
    """One row of the table."""
    divergence = Divergence([], [])
    with Worker(contender, threads=threads, context=1024) as worker:
        for path, logits in zip(expected, sampled_rows(samples, worker.logits), strict=True):
            divergence.add(np.load(path), logits)
    return {"name": contender.name, "file_bytes": contender.file_bytes, **divergence.summary()}


def write_reference(reference: Reference, samples: list[Sample], folder: Path) -> list[Path]:
    """Write the full-precision logits of each text to a file: together they can be larger than the memory."""
    paths = [folder / f"{index}.npy" for index in range(len(samples))]
    for path, logits in zip(paths, sampled_rows(samples, reference.logits), strict=True):
        np.save(path, logits)
    return paths


def compare_all(candidates: list[Candidate], samples: list[Sample], expected: list[Path], threads: int) -> list[Row]:
    """The rows of the table; one that could not be made says why."""
    rows: list[Row] = []
    for candidate in candidates:
        print(f"comparing {candidate.name}", file=sys.stderr)
        try:
            rows.append(compare(candidate.resolve(), samples, expected, threads))
        except (CommandError, WorkerError, OSError) as error:
            rows.append({"name": candidate.name, "error": str(error)})
    return rows


def show(rows: list[Row]) -> None:
    """Print the table."""
    cells = [
        (
            row["name"],
            f"{row['file_bytes'] / 1e6:.1f}",
            f"{row['kl_mean']:.4f}",
            f"{row['kl_low']:.4f}-{row['kl_high']:.4f}",
            f"{row['kl_p99']:.3f}",
            f"{row['top1_agreement']:.4f}",
        )
        for row in rows
        if "error" not in row
    ]
    print_table(("engine", "file MB", "mean KL", "95%", "p99 KL", "top-1"), cells)
    for row in rows:
        if "error" in row:
            print(f"{row['name']}: {row['error']}")


def main() -> int:
    """Compare every contender with the full-precision model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source, work = workspace(arguments)
    reference = Reference(source, arguments.threads)
    samples = load_samples(reference, work, arguments.positions, arguments.seed)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        expected = write_reference(reference, samples, Path(folder))
        del reference
        candidates = contenders(source, work, arguments.peers_python)
        rows = compare_all(candidates, samples, expected, arguments.threads)
    print(json.dumps({"rows": rows})) if arguments.json else show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
