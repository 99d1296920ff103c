"""Plans as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgekit.cli.options import size_text, table
from edgekit.lint import Finding
from edgekit.outline import Outline
from edgekit.plan import MemoryPlan, Plan

__all__ = ["model_text", "plan_text", "ranking_text"]

_FITS = {"yes": "fits", "no": "does not fit", "unknown": "unknown"}


def model_text(outline: Outline) -> str:
    """The model in one line."""
    anatomy = outline.anatomy
    sizes = f"{count_text(anatomy.parameters)} parameters"
    if anatomy.active_parameters < 0.75 * anatomy.parameters:
        sizes += f", {count_text(anatomy.active_parameters)} active"
    return f"{outline.name}: {anatomy.model_type}, {sizes}, {len(anatomy.caches)} layers, context {anatomy.context:,}"


def plan_text(plan: Plan, findings: Iterable[Finding]) -> str:
    """A plan line by line, with what lint found."""
    speed = plan.speed
    lines = [
        f"  on {plan.target}: {_FITS[plan.fits]}",
        f"  format      {plan.format}, {plan.quant}, context {plan.context:,}, keys and values as {plan.cache.value}",
        *_memory_lines(plan.memory),
        f"  speed       decode {speed_text(speed.decode_tokens_per_s)}, prefill "
        f"{speed_text(speed.prefill_tokens_per_s)} tokens/s, {speed.basis}",
        f"              a token reads {size_text(speed.bytes_per_token)}",
    ]
    lines += [f"  note        {note}" for note in plan.notes]
    lines += [f"  {finding.severity:<11} {finding.message} ({finding.hint})" for finding in findings]
    return "\n".join(lines)


def _memory_lines(memory: MemoryPlan) -> list[str]:
    mapped = "mapped: " if memory.weights_mapped else ""
    rows = [
        ("weights", memory.weights_bytes, mapped + _parts(memory.weights_by_kind)),
        ("packed copies", memory.packed_bytes, ""),
        ("keys, values", memory.kv_bytes, _parts(memory.kv_by_kind)),
        ("activations", memory.activations_bytes, ""),
        ("runtime", memory.runtime_bytes, ""),
        ("loading", memory.loading_bytes, ""),
    ]
    lines = [f"  memory      {size_text(memory.total_bytes)} of {size_text(memory.budget_bytes)}"]
    lines += [f"    {name:<13} {size_text(size):>8}  {parts}".rstrip() for name, size, parts in rows if size]
    if memory.unread_bytes:
        lines.append(f"    less          {size_text(memory.unread_bytes):>8}  of the embedding, which stay in the file")
    return lines


def _parts(sizes: Mapping[Any, int]) -> str:
    """The parts of a line, the largest first."""
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return ", ".join(f"{name.replace('_', '-')} {size_text(size)}" for name, size in ordered if size)


def ranking_text(plans: Sequence[Plan]) -> str:
    """Plans as a table."""
    rows = [("target", "fits", "memory", "of", "decode", "prefill", "format", "quant", "context", "cache")]
    for plan in plans:
        memory, speed = plan.memory, plan.speed
        rows.append(
            (
                plan.target,
                plan.fits,
                size_text(memory.total_bytes),
                size_text(memory.budget_bytes),
                speed_text(speed.decode_tokens_per_s),
                speed_text(speed.prefill_tokens_per_s),
                plan.format,
                plan.quant,
                f"{plan.context:,}",
                plan.cache.value,
            )
        )
    return table(rows)


def speed_text(tokens_per_s: float) -> str:
    """Tokens per second for people."""
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.2g}"


def count_text(count: int) -> str:
    """A number of parameters for people."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if count >= 0.9995 * size:  # from there on it is shown as 1
            return f"{count / size:.3g}{unit}"
    return str(count)
