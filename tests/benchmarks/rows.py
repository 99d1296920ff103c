"""How often the most probable token changes when several rows are computed in one forward.

Speculation keeps a drafted token where it is the argmax of its row in a forward of several rows. Kernels for one row and
for several add in different orders, so near ties can turn out otherwise than in plain decoding. This samples texts from
each bundle, one token at a time (temperature 1, fixed seed), computes the same texts again in forwards of several rows,
and counts the positions whose argmax differs. It prints with them the margin of the top two logits there: how near the
ties were. The counts depend on the kernels of the machine, not on its load.

    python tests/benchmarks/rows.py BUNDLE... [--positions 5000] [--rows 2 4 8 16] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from convert import print_table
from texts import PROMPTS

TEXT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens of which `tokens[start:]` were sampled, and the argmax and the margin of each row computed alone."""

    tokens: list[int]
    start: int
    best: npt.NDArray[np.int64]
    margins: npt.NDArray[np.float32]


def _margin(row: npt.NDArray[np.float32]) -> float:
    top = np.partition(row, len(row) - 2)[-2:]
    return float(top[1] - top[0])


def sample(model: Any, prompt: list[int], seed: int) -> Text:
    """Continue a prompt one token at a time, whatever comes."""
    random, decoder, tokens = np.random.default_rng(seed), model.backend.decoder(), list(prompt)
    row = decoder.forward(np.asarray(tokens), rows=1, rope_length=0)[0]
    best, margins = [], []
    for _ in range(TEXT_TOKENS):
        best.append(int(row.argmax()))
        margins.append(_margin(row))
        weights = np.exp(row.astype(np.float64) - row.max())
        tokens.append(int(random.choice(len(row), p=weights / weights.sum())))
        row = decoder.forward(np.asarray(tokens[-1:]), rows=1, rope_length=0)[0]
    decoder.close()
    return Text(tokens, len(prompt), np.array(best), np.array(margins, np.float32))


def best_together(model: Any, text: Text, rows: int) -> npt.NDArray[np.int64]:
    """The argmax at every sampled position, computed `rows` at a time."""
    decoder, found = model.backend.decoder(), []
    decoder.forward(np.asarray(text.tokens[: text.start - 1]), rows=1, rope_length=0)
    for start in range(text.start - 1, len(text.tokens) - 1, rows):
        part = np.asarray(text.tokens[start : min(start + rows, len(text.tokens) - 1)])
        found.append(decoder.forward(part, rows=len(part), rope_length=0).argmax(axis=1))
    decoder.close()
    return np.concatenate(found)


def measure(bundle: str, positions: int, several: list[int]) -> list[dict[str, Any]]:
    """One row of figures for each number of rows."""
    import edgekit

    texts = []
    with edgekit.load(bundle) as opened:
        model: Any = opened
        prompts = [model.encode(text, _options(raw=False)).tokens for text in PROMPTS["tuned"].chat]
        prompts += [model.encode(text, _options(raw=True)).tokens for text in PROMPTS["tuned"].plain]
        for seed in range(-(-positions // TEXT_TOKENS)):
            texts.append(sample(model, prompts[seed % len(prompts)], seed))
        margins = np.concatenate([text.margins for text in texts])
        best = np.concatenate([text.best for text in texts])
        found = []
        for rows in several:
            differ = np.concatenate([best_together(model, text, rows) for text in texts]) != best
            widest = float(margins[differ].max()) if differ.any() else 0.0
            found.append({"rows": rows, "positions": len(best), "differ": int(differ.sum()), "widest_margin": widest})
    return found


def _options(*, raw: bool) -> Any:
    from edgekit.session import GenerateOptions

    return GenerateOptions(raw=raw)


def main() -> int:
    """Measure every bundle and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--positions", type=int, default=5000)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {Path(bundle).name: measure(bundle, arguments.positions, arguments.rows) for bundle in arguments.bundles}
    if arguments.json:
        print(json.dumps(found))
        return 0
    cells = []
    for name, rows in found.items():
        for row in rows:
            share, widest = f"{row['differ'] / row['positions']:.2%}", f"{row['widest_margin']:.4f}"
            cells.append((name, str(row["rows"]), f"{row['positions']:,}", str(row["differ"]), share, widest))
    print_table(("bundle", "rows", "positions", "differ", "share", "widest margin"), cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
