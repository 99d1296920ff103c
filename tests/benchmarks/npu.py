"""How near an NPU program comes to full precision, on Qualcomm's emulator of its Hexagon processor, fall-back disabled.

Converts a checkpoint to `onnx-qdq` with 8 and with 4-bit weights, lets the float32 reference write texts, and prints for each
program the mean KL divergence and the top-1 agreement over what was written, the bytes of its parts, and a greedy reply. It
is an emulator: times say nothing about a device and are not printed as speed. Needs onnxruntime-qnn.

    python tests/benchmarks/npu.py [--source sample] [--target copilot-snapdragon-x-elite] [--texts 2] [--tokens 96] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from convert import print_table

import edgekit
from edgekit.companion import companion
from edgekit.goldens import Goldens, GoldenText, greedy_tokens, render_prompts, sampled_tokens
from edgekit.registry import LOADER, load_attribute
from edgekit.verify import compare

QUESTIONS = ("Why do leaves turn red in autumn?", "Write a short poem about the sea.", "What is a prime number?")
OPENINGS = ("Leaves turn red in autumn because", "The sea is", "A prime number is")
SEED = 77
REPLY_TOKENS = 24


def reference_texts(reference: Any, count: int, tokens: int) -> Goldens:
    """Texts that the reference samples at temperature 1."""
    texts = []
    for number, (prompt, special) in enumerate(render_prompts(reference, QUESTIONS, OPENINGS)[:count]):
        ids = reference.token_ids(prompt, add_special_tokens=special)
        texts.append(GoldenText(prompt, (*ids, *sampled_tokens(reference, ids, tokens, SEED + number)), len(ids)))
    return Goldens(tuple(texts), {}, {}, (), ())


def part_bytes(bundle: edgekit.Bundle) -> dict[str, int]:
    """Sizes of the layers' weights, of the ends' and of the compiled binary that both NPU graphs share."""
    graph = bundle.manifest.programs[0].graph
    sizes = {name: entry["size_bytes"] for name, entry in bundle.manifest.files.items()}
    ends = {"layers_bytes": "layers.data", "ends_bytes": "ends.data"}
    found = {key: sum(size for name, size in sizes.items() if name.endswith(end)) for key, end in ends.items()}
    return found | {"context_binary_bytes": sum(sizes[name] for name in graph.contexts)}


def measure(args: argparse.Namespace, quant: str, reference: Any, goldens: Goldens, folder: Path) -> dict[str, Any]:
    """Convert, run on the emulator, compare."""
    started = time.perf_counter()
    bundle = edgekit.convert(
        args.source, target=args.target, format="onnx-qdq", quant=quant, context=args.context, verify=False,
        out=folder / f"{quant}.edgekit",
    )  # fmt: skip
    with load_attribute(LOADER)(bundle, bundle.program(), provider="qnn", verifying=True) as model:
        compared, _ = compare(model, reference, goldens)
        text = goldens.texts[0]
        reply, _ = greedy_tokens(model, list(text.tokens[: text.start]), REPLY_TOKENS)
        written = model.tokenizer.decode(list(reply))
        executed = model.provider.executed
    print(f"{quant}: {time.perf_counter() - started:.0f} s in all, which says nothing about a device", file=sys.stderr)
    return {"quant": quant, "executed": executed} | asdict(compared.figures) | part_bytes(bundle) | {"reply": written}


def main() -> int:
    """Print a row for each scheme."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="sample")
    parser.add_argument("--target", default="copilot-snapdragon-x-elite")
    parser.add_argument("--quant", nargs="+", default=["int8", "int4"])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    opened = edgekit.open_source(args.source)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with companion(
            opened, folder / "x", quant="fp32", context=args.context, stage="reference", mapped=True
        ) as reference:
            goldens = reference_texts(reference, args.texts, args.tokens)
            rows = [measure(args, quant, reference, goldens, folder) for quant in args.quant]
    if args.json:
        print(json.dumps(rows, ensure_ascii=False))
        return 0
    print_table(
        ["weights", "run on", "positions", "mean KL", "top-1", "layers MB", "ends MB", "context binary MB"],
        [
            [
                row["quant"], row["executed"], str(row["positions"]), f"{row['kl_mean']:.3g}",
                f"{row['top1_agreement']:.1%}",
                *(f"{row[key] / 1e6:.1f}" for key in ("layers_bytes", "ends_bytes", "context_binary_bytes")),
            ]
            for row in rows
        ],
    )  # fmt: skip
    for row in rows:
        print(f"\n{row['quant']}: {row['reply']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
