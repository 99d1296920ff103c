"""The gate inside convert(): no program passes that was not run, is worse than its scheme's bound, or larger than its parent."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.bundle import GOLDENS, TOKENIZER, Bundle, Program, open_bundle
from edgekit.errors import BundleError, ConversionError, GenerationError
from edgekit.goldens import Goldens, make_goldens, read_goldens
from edgekit.graph import Graph
from edgekit.plan import Plan, make_plan
from edgekit.progress import ProgressFn
from edgekit.registry import CONVERTERS, EXECUTORS, LOADER, load_attribute
from edgekit.source import Source, open_source
from edgekit.target import load_target
from edgekit.verify import Comparison, compare, compare_with_goldens, greedy_match

if TYPE_CHECKING:
    from edgekit.runtimes.engine import LoadedModel

__all__ = ["NOT_VERIFIED", "check_size", "kl_bound", "verify_bundle", "verify_program"]

NOT_VERIFIED: Mapping[str, Any] = {
    "status": "not-executed",
    "executed": None,
    "reason": "converted without verification",
}
# Mean KL against full precision that a scheme may cost, in nats. 4 bits hurt small models more.
BOUND_8_BITS = 0.02
BOUND_4_BITS_SMALL, BOUND_4_BITS = 0.6, 0.2
SMALL_PARAMETERS = 1_000_000_000
REFERENCE_TARGET = "linux-x86-64"  # for a float32 program any target decides the same
_FLOAT_BYTES = {"F64": 8, "F32": 4}  # all else, quantized checkpoints too, came from 16 bits


def kl_bound(plan: Plan, source: Source) -> float:
    """The mean KL that the plan's scheme must not exceed."""
    rounded = [w.format.bits for w in plan.weights.values() if w.form_is_blocks and not w.carried]
    if min(rounded, default=32) > 4:
        return BOUND_8_BITS
    return BOUND_4_BITS_SMALL if source.parameters < SMALL_PARAMETERS else BOUND_4_BITS


def check_size(source: Source, graph: Graph) -> None:
    """Refuse a program that is larger than the full-precision one would be.

    Raises:
        ConversionError: It is; the tensors that grew are named.
    """

    def full_bytes(role: str) -> int:
        return sum(prod(tensor.shape) * _FLOAT_BYTES.get(tensor.dtype, 2) for tensor in source.parts[role])

    whole, stored = sum(map(full_bytes, source.parts)), sum(report.size_bytes for report in graph.weights)
    quantized = any(report.block_size for report in graph.weights)
    if quantized and stored > whole:
        grown = [report.role for report in graph.weights if report.size_bytes > full_bytes(report.role)]
        raise ConversionError(
            f"the quantized program takes {stored:,} bytes, full precision {whole:,}: {', '.join(grown[:3])} grew",
            hint="use a smaller block size or --quant fp32: these rows are shorter than a block",
        )


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
        goldens = make_goldens(model, plan.format, on_progress=on_progress)
    except (BundleError, GenerationError) as error:
        if plan.scheme.activation_bits == 16:
            return {"status": "not-executed", "executed": None, "reason": f"no provider here runs it: {error.message}"}
        raise ConversionError(f"the program does not run: {error.message}", hint=error.hint) from error
    card: dict[str, Any] = {"executed": EXECUTORS[plan.format]}
    with model:
        if not goldens.texts:
            card |= {"status": "not-compared", "reason": "the context is too short for any of the test prompts"}
        elif not plan.scheme.quantized and plan.scheme.activation_bits == 32:
            card |= {"status": "ok", "reason": "this is the full-precision program"}
        else:
            try:
                figures, goldens = _compare_with_source(model, source, plan, unfinished, goldens, on_progress)
                card |= figures
            except ConversionError as error:
                card |= {"status": "not-compared", "reason": error.message}
    if card["status"] == "failed" and not allow_low_quality:
        raise ConversionError(card["reason"], hint="use --quant int8, or --allow-low-quality to keep it all the same")
    text = json.dumps(goldens.to_json(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    (unfinished.directory / GOLDENS).write_text(text + "\n", encoding="utf-8", newline="\n")
    return card


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
    format, bound = program.graph.format, program.quality.get("kl_bound", BOUND_8_BITS)
    row: dict[str, Any] = {"format": format} | dict.fromkeys(
        ("executed", "kl_mean", "top1_agreement", "greedy_match_tokens", "reason")
    )
    try:
        model: LoadedModel = load_attribute(LOADER)(bundle, program, threads=threads)
    except BundleError as error:
        return row | {"status": "not-executed", "reason": error.message}
    with model:
        remembered = (bundle.directory / GOLDENS).is_file()
        if not remembered and source is None:
            return row | {"status": "not-compared", "reason": "converted without verification; give --reference"}
        goldens = read_goldens(bundle, program) if remembered else make_goldens(model, format)
        row["executed"] = EXECUTORS[format]
        row["greedy_match_tokens"], excusable = greedy_match(model, goldens, format)
        if source is not None:
            comparison: Comparison | None = _compare_with(source, bundle, program, model, goldens, on_progress)[0]
        else:
            comparison = compare_with_goldens(model, goldens)
    if not excusable:
        return row | {"status": "failed", "reason": "greedy tokens differ from those the bundle was verified with"}
    if comparison is None:
        return row | {"status": "ok", "reason": program.quality.get("reason")}
    row |= {"kl_mean": comparison.kl_mean, "top1_agreement": comparison.top1_agreement}
    if comparison.kl_mean > bound:
        return row | {"status": "failed", "reason": f"mean KL {comparison.kl_mean:.3g} is over the bound of {bound}"}
    return row | {"status": "ok"}


def _compare_with_source(
    model: LoadedModel, source: Source, plan: Plan, bundle: Bundle, goldens: Goldens, on_progress: ProgressFn | None
) -> tuple[dict[str, Any], Goldens]:
    """The figures of a quality card, and the goldens completed."""
    comparison, goldens = _compare_with(source, bundle, bundle.program(plan.format), model, goldens, on_progress)
    bound = kl_bound(plan, source)
    figures = asdict(comparison) | {"reference": "float32 program of the same source", "kl_bound": bound}
    if comparison.kl_mean <= bound:
        return figures | {"status": "ok", "reason": None}, goldens
    return figures | {"status": "failed", "reason": _blame(comparison, bound, bundle)}, goldens


def _compare_with(
    source: Source,
    bundle: Bundle,
    program: Program,
    model: LoadedModel,
    goldens: Goldens,
    on_progress: ProgressFn | None,
) -> tuple[Comparison, Goldens]:
    """Compare with the source in float32, written beside the bundle and computed from its mapped file."""
    plan = make_plan(
        source, load_target(REFERENCE_TARGET), quant="fp32", context=program.context, format=program.graph.format
    )
    renamed = (lambda step: on_progress(replace(step, stage="reference"))) if on_progress else None
    with tempfile.TemporaryDirectory(prefix=".edgekit-reference-", dir=bundle.directory.parent) as name:
        folder = Path(name)
        graph: Graph = load_attribute(CONVERTERS[plan.format])(source, plan, folder, on_progress=renamed)
        shutil.copy(bundle.directory / TOKENIZER, folder)
        whole = Program(graph, plan.context, NOT_VERIFIED)
        with load_attribute(LOADER)(replace(bundle, directory=folder), whole, mapped=True) as reference:
            return compare(model, reference, goldens, on_progress=on_progress)


def _blame(comparison: Comparison, bound: float, unfinished: Bundle) -> str:
    weights = unfinished.manifest.programs[0].graph.weights
    worst = sorted(weights, key=lambda report: -report.relative_error)[:3]
    named = ", ".join(f"{report.role} ({report.bits} bits, error {report.relative_error:.1%})" for report in worst)
    return f"mean KL {comparison.kl_mean:.3g} is over the bound of {bound}; least exact: {named}"
