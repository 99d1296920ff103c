"""Plans of five known models on five devices, from their configs alone, beside figures that others published.

    python tests/benchmarks/plan_tables.py

Prints Markdown. The configs under models/ hold the sizes that the publishers' config.json have. What stands under "ours" is
the plan's model of ONNX Runtime on the processor, not a measurement; what was published is for the engine that is named.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from edgekit.cli.options import size_text
from edgekit.cli.plan_text import count_text, speed_text
from edgekit.outline import Outline, open_outline
from edgekit.plan import Plan, make_plan
from edgekit.target import load_target

MODELS = Path(__file__).parent / "models"
NAMES = ("Llama-3.2-1B", "Llama-3.2-3B", "Gemma-4-E2B", "gpt-oss-20b", "DeepSeek-V3")
DEVICES = ("raspberry-pi-5-16gb", "iphone-17-pro", "galaxy-s25", "copilot-snapdragon-x-elite", "copilot-lunar-lake")
# Decode / prefill tokens a second and memory: field.md, section 3.
PUBLISHED: Mapping[tuple[str, str], str] = {
    ("Llama-3.2-1B", "iphone-17-pro"): "36, 2.4 GB (XNNPACK, RNE 2026-06)",
    ("Llama-3.2-1B", "galaxy-s25"): "64 (NPU, AI Hub 2026-02)",
    ("Llama-3.2-1B", "copilot-snapdragon-x-elite"): "24 (NPU, AI Hub 2026-02)",
    ("Llama-3.2-3B", "galaxy-s25"): "28 (NPU, AI Hub 2026-02)",
    ("Llama-3.2-3B", "copilot-snapdragon-x-elite"): "12 (NPU, AI Hub 2026-02)",
    ("Gemma-4-E2B", "raspberry-pi-5-16gb"): "8 / 133, 1.5 GB (LiteRT-LM CPU, 2026)",
    ("Gemma-4-E2B", "iphone-17-pro"): "25 / 532, 0.6 GB (LiteRT-LM CPU, 2026)",
    ("Gemma-4-E2B", "copilot-lunar-lake"): "30 / 435, 3.5 GB (LiteRT-LM CPU, 2026)",
}
# Parameters, all and active: model cards and reports of the publishers.
PUBLISHED_SIZES = {
    "Llama-3.2-1B": "1.24B",
    "Llama-3.2-3B": "3.21B",
    "Gemma-4-E2B": "5.1B, 2.3B effective",
    "gpt-oss-20b": "20.9B, 3.6B active",
    "DeepSeek-V3": "671B, 37B active",
}


def main() -> None:
    """Print both tables."""
    started = time.perf_counter()
    outlines = {name: outline_of_model(name) for name in NAMES}
    print_models(outlines)
    print_plans(outlines)
    print(f"\n{len(NAMES) * len(DEVICES)} plans with their configs read: {time.perf_counter() - started:.2f} s")


def outline_of_model(name: str) -> Outline:
    """Of one of the models here."""
    outline = open_outline(MODELS / name)
    assert isinstance(outline, Outline)
    return outline


def print_models(outlines: Mapping[str, Outline]) -> None:
    """What the config says of each model."""
    print("| model | parameters | active for a token | published | cache for a token, 16 bits | converted |")
    print("|---|---|---|---|---|---|")
    for name, outline in outlines.items():
        anatomy = outline.anatomy
        cache = 2 * sum(layer.per_token for layer in anatomy.caches)
        print(
            f"| {name} | {count_text(anatomy.parameters)} | {count_text(anatomy.active_parameters)} "
            f"| {PUBLISHED_SIZES[name]} | {size_text(cache)} | {'not yet' if outline.obstacle else 'yes'} |"
        )


def print_plans(outlines: Mapping[str, Outline]) -> None:
    """Memory of what an app may use, decode and prefill, on each device."""
    print("\n| model | device | ours: scheme | memory of what an app may use | decode / prefill | published |")
    print("|---|---|---|---|---|---|")
    for name, outline in outlines.items():
        for device in DEVICES:
            plan = make_plan(outline, load_target(device), format="onnx")
            print(f"| {name} | {device} | {plan.quant}, {plan.context:,} tokens | {_memory(plan)} | {_speed(plan)} "
                  f"| {PUBLISHED.get((name, device), '')} |")  # fmt: skip


def _memory(plan: Plan) -> str:
    sizes = f"{size_text(plan.memory.total_bytes)} of {size_text(plan.memory.budget_bytes)}"
    return f"{'fits' if plan.fits == 'yes' else '**does not fit**'}: {sizes}"


def _speed(plan: Plan) -> str:
    if plan.fits == "no":
        return "-"
    return f"{speed_text(plan.speed.decode_tokens_per_s)} / {speed_text(plan.speed.prefill_tokens_per_s)}"


if __name__ == "__main__":
    main()
