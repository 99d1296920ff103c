"""The gate inside convert(): no program passes that was not run, is worse than its scheme's bound, or larger than its parent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.bundle import GOLDENS, Bundle, Program, open_bundle
from edgekit.companion import companion
from edgekit.errors import BundleError, ConversionError, GenerationError, SourceError
from edgekit.goldens import Goldens, make_goldens, read_goldens
from edgekit.graph import TensorReport
from edgekit.plan import Plan
from edgekit.progress import ProgressFn
from edgekit.registry import EXECUTORS, LOADER, load_attribute
from edgekit.source import Source, open_source
from edgekit.verify import Comparison, compare, compare_with_goldens, greedy_match

if TYPE_CHECKING:
    from edgekit.runtimes.engine import LoadedModel

__all__ = ["kl_bound", "oversize", "verify_bundle", "verify_program"]

# Mean KL against full precision that a scheme may cost, in nats. 4 bits hurt small models more.
BOUND_8_BITS = 0.02
BOUND_4_BITS_SMALL, BOUND_4_BITS = 0.6, 0.2
SMALL_PARAMETERS = 1_000_000_000
_FLOAT_BYTES = {"F64": 8, "F32": 4}  # all else, quantized checkpoints too, came from 16 bits


def kl_bound(weights: Iterable[TensorReport], parameters: int) -> float:
    """The mean KL that weights stored so must not exceed: by the fewest bits that any was rounded to."""
    rounded = [report.bits for report in weights if report.block_size and report.relative_error]
    if min(rounded, default=32) > 4:
        return BOUND_8_BITS
    return BOUND_4_BITS_SMALL if parameters < SMALL_PARAMETERS else BOUND_4_BITS


def oversize(source: Source, plan: Plan) -> str | None:
    """What is wrong with a quantized program that would be larger than the full-precision one; None where it is not."""

    def full_bytes(role: str) -> int:
        return sum(prod(tensor.shape) * _FLOAT_BYTES.get(tensor.dtype, 2) for tensor in source.parts[role])

    whole, stored = sum(map(full_bytes, plan.weights)), plan.memory.weights_bytes
    if not plan.scheme.quantized or stored <= whole:
        return None
    grown = [role for role, weight in plan.weights.items() if weight.size_bytes > full_bytes(role)]
    return f"the quantized program takes {stored:,} bytes, full precision {whole:,}: {', '.join(grown[:3])} grew"


def verify_program(
    unfinished: Bundle, source: Source, plan: Plan, *, allow_low_quality: bool, on_progress: ProgressFn | None
) -> dict[str, Any]:
    """Run the program, write the goldens, compare with the full-precision reference; the program's quality card.

    Raises:
        ConversionError: The program does not run, or fails its bound and `allow_low_quality` is not set.
    """
    program = unfinished.program(plan.format)
    try:
        model: LoadedModel = load_attribute(LOADER)(unfinished, program)
    except BundleError as error:
        if plan.scheme.activation_bits == 16:
            return {"status": "not-executed", "executed": None, "reason": f"no provider here runs it: {error.message}"}
        raise ConversionError(f"the program does not load: {error.message}", hint=error.hint) from error
    with model:
        try:
            card, goldens = _quality_card(model, source, plan, unfinished, on_progress)
        except GenerationError as error:
            raise ConversionError(f"the program does not run: {error.message}", hint=error.hint) from error
    if card["status"] == "failed" and not allow_low_quality:
        finer = "int8" if any(weight.format.bits == 4 for weight in plan.weights.values()) else "fp32"
        raise ConversionError(
            card["reason"], hint=f"use --quant {finer}, or --allow-low-quality to keep it all the same"
        )
    text = json.dumps(goldens.to_json(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    (unfinished.directory / GOLDENS).write_text(text + "\n", encoding="utf-8", newline="\n")
    return card


def _quality_card(
    model: LoadedModel, source: Source, plan: Plan, unfinished: Bundle, on_progress: ProgressFn | None
) -> tuple[dict[str, Any], Goldens]:
    goldens = make_goldens(model, plan.format, on_progress=on_progress)
    card: dict[str, Any] = {"executed": EXECUTORS[plan.format]}
    if not goldens.texts:
        return card | {"status": "not-compared", "reason": "the context is too short for any test prompt"}, goldens
    if not plan.scheme.quantized and plan.scheme.activation_bits == 32:
        return card | {"status": "ok", "reason": "this is the full-precision program"}, goldens
    try:
        comparison, goldens = _compare_with(source, unfinished, unfinished.program(), model, goldens, on_progress)
    except (BundleError, ConversionError, OSError) as error:  # no room for the reference, as a rule
        return card | {"status": "not-compared", "reason": f"the reference could not be run: {error}"}, goldens
    bound = kl_bound(unfinished.program().graph.weights, source.parameters)
    card |= asdict(comparison) | {"reference": "float32 program of the same source", "kl_bound": bound}
    if comparison.kl_mean <= bound:
        return card | {"status": "ok", "reason": None}, goldens
    return card | {"status": "failed", "reason": _blame(comparison, bound, unfinished)}, goldens


def verify_bundle(
    directory: str | Path,
    *,
    formats: Sequence[str] = (),
    reference: str | Path | None = None,
    threads: int | None = None,
    on_progress: ProgressFn | None = None,
) -> list[dict[str, Any]]:
    """Run a bundle's programs again and compare them with the reference: its source, or what the bundle remembers of it.

    Returns:
        A row for each program, as `edgekit verify --json` has it.

    Raises:
        BundleError, SourceError: The bundle or the source can't be opened.
    """
    bundle = open_bundle(directory)
    programs = [bundle.program(name) for name in formats] or list(bundle.manifest.programs)
    source = open_source(reference) if reference is not None else None
    return [_verify_row(bundle, program, source, threads, on_progress) for program in programs]


def _verify_row(
    bundle: Bundle, program: Program, source: Source | None, threads: int | None, on_progress: ProgressFn | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"format": program.graph.format} | dict.fromkeys(
        ("executed", "kl_mean", "top1_agreement", "greedy_match_tokens", "reason")
    )
    try:
        model: LoadedModel = load_attribute(LOADER)(bundle, program, threads=threads)
    except BundleError as error:
        return row | {"status": "not-executed", "reason": error.message}
    with model:
        try:
            return row | _verified(bundle, program, source, model, on_progress)
        except GenerationError as error:
            return row | {"status": "failed", "reason": error.message}


def _verified(
    bundle: Bundle, program: Program, source: Source | None, model: LoadedModel, on_progress: ProgressFn | None
) -> dict[str, Any]:
    format = program.graph.format
    remembered = (bundle.directory / GOLDENS).is_file()
    if not remembered and source is None:
        return {"status": "not-compared", "reason": "converted without verification; give --reference"}
    goldens = read_goldens(bundle, program) if remembered else make_goldens(model, format)
    matched, excusable = greedy_match(model, goldens, format)
    found: dict[str, Any] = {"executed": EXECUTORS[format], "greedy_match_tokens": matched}
    if source is not None:
        comparison: Comparison | None = _compare_with(source, bundle, program, model, goldens, on_progress)[0]
    else:
        comparison = compare_with_goldens(model, goldens)
    if not excusable:
        return found | {"status": "failed", "reason": "greedy tokens differ from those the bundle was verified with"}
    if comparison is None:
        return found | {"status": "ok", "reason": program.quality.get("reason")}
    found |= {"kl_mean": comparison.kl_mean, "top1_agreement": comparison.top1_agreement}
    bound = kl_bound(program.graph.weights, bundle.manifest.model.get("parameters") or 0)
    if not comparison.kl_mean <= bound:
        return found | {"status": "failed", "reason": f"mean KL {comparison.kl_mean:.3g} is over the bound of {bound}"}
    return found | {"status": "ok"}


def _compare_with(
    source: Source,
    bundle: Bundle,
    program: Program,
    model: LoadedModel,
    goldens: Goldens,
    on_progress: ProgressFn | None,
) -> tuple[Comparison, Goldens]:
    """Compare with the source in float32, computed from its mapped file."""
    format, config = program.graph.format, source.config
    theirs = bundle.manifest.model.get("model_type"), program.graph.vocab_size
    if (config.model_type, config.vocab_size) != theirs:
        raise SourceError(
            f"the reference is a {config.model_type} with {config.vocab_size:,} tokens, the bundle a {theirs[0]} with "
            f"{theirs[1]:,}",
            hint="give the checkpoint that the bundle was converted from",
        )
    with companion(
        source, bundle.directory, quant="fp32", context=program.context, format=format, stage="reference",
        mapped=True, on_progress=on_progress,
    ) as reference:  # fmt: skip
        return compare(model, reference, goldens, on_progress=on_progress)


def _blame(comparison: Comparison, bound: float, unfinished: Bundle) -> str:
    weights = unfinished.manifest.programs[0].graph.weights
    worst = sorted(weights, key=lambda report: -report.relative_error)[:3]
    named = ", ".join(f"{report.role} ({report.bits} bits, error {report.relative_error:.1%})" for report in worst)
    return f"mean KL {comparison.kl_mean:.3g} is over the bound of {bound}; least exact: {named}"
