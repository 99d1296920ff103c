"""The gate inside convert(): no program passes that was not run, is worse than its scheme's bound, or larger than its parent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.bundle import GOLDENS, Bundle, Program, open_bundle
from edgekit.capability import CAPABILITIES
from edgekit.companion import companion
from edgekit.divergence import Figures
from edgekit.errors import BundleError, ConversionError, GenerationError, SourceError
from edgekit.goldens import Goldens, make_goldens, read_goldens, written_goldens
from edgekit.graph import Graph
from edgekit.own_text import read_windows
from edgekit.plan import Plan
from edgekit.progress import ProgressFn
from edgekit.quant import RECIPES, CacheFormat
from edgekit.registry import LOADER, load_attribute
from edgekit.source import Source, open_source
from edgekit.verify import compare, compare_on_text, compare_with_goldens, greedy_match

if TYPE_CHECKING:
    from edgekit.runtimes.engine import LoadedModel

__all__ = ["kl_bound", "oversize", "top1_bound", "verify_bundle", "verify_program"]

# Mean KL against full precision that a scheme may cost, in nats. 4 bits hurt small models more.
BOUND_8_BITS = 0.02
BOUND_8_BIT_NPU = 0.1  # its activations are whole numbers too, keys and values of 8 bits
BOUND_4_BITS_SMALL, BOUND_4_BITS = 0.6, 0.2
SMALL_PARAMETERS = 1_000_000_000
# A model whose best token is another one at every second position writes other texts. A reference that is never sure has many
# near ties: there the bound is how often its own samples agree with it.
TOP1_BOUND = 0.5
_ROW_KEYS = (
    "executed",
    "positions",
    "kl_mean",
    "kl_mean_interval",
    "kl_p99",
    "top1_agreement",
    "top1_interval",
    "reference_confidence",
    "greedy_match_tokens",
    "text",
    "reason",
)
_FLOAT_BYTES = {"F64": 8, "F32": 4}  # all else, quantized checkpoints too, came from 16 bits


def kl_bound(graph: Graph, parameters: int) -> float:
    """The mean KL that a program must not exceed: by the fewest bits that any of its weights was rounded to."""
    rounded = [report.bits for report in graph.weights if report.block_size and report.relative_error]
    if min(rounded, default=32) > 4:
        return BOUND_8_BIT_NPU if CAPABILITIES[graph.format].quantized_activations else BOUND_8_BITS
    return BOUND_4_BITS_SMALL if parameters < SMALL_PARAMETERS else BOUND_4_BITS


def top1_bound(figures: Figures) -> float:
    """The top-1 agreement under which a program is useless."""
    return min(TOP1_BOUND, figures.reference_confidence)


def oversize(source: Source, plan: Plan) -> str | None:
    """What is wrong with a quantized program that would be larger than the full-precision one; None where it is not."""

    def full_bytes(role: str) -> int:
        tensors = source.parts.get(role, source.parts["embedding"])  # a tied head that is stored a second time
        return sum(prod(tensor.shape) * _FLOAT_BYTES.get(tensor.dtype, 2) for tensor in tensors)

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
        model: LoadedModel = load_attribute(LOADER)(unfinished, program, verifying=True)
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
        raise ConversionError(card["reason"], hint=_what_would_work(plan))
    text = json.dumps(goldens.to_json(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    (unfinished.directory / GOLDENS).write_text(text + "\n", encoding="utf-8", newline="\n")
    return card


def _quality_card(
    model: LoadedModel, source: Source, plan: Plan, unfinished: Bundle, on_progress: ProgressFn | None
) -> tuple[dict[str, Any], Goldens]:
    known = written_goldens(unfinished.directory)  # of the bundle's other programs
    goldens = make_goldens(model, plan.format, known=known, on_progress=on_progress)
    card: dict[str, Any] = {"executed": model.provider.executed, "provider": model.provider.reason}
    if not goldens.texts:
        return card | {"status": "not-compared", "reason": "the context is too short for any test prompt"}, goldens
    whole = not plan.scheme.quantized and plan.scheme.activation_bits == 32
    if whole and plan.cache is CacheFormat.FLOAT32:
        return card | {"status": "ok", "reason": "this is the full-precision program"}, goldens
    try:
        with _reference(source, unfinished, unfinished.program(), on_progress) as reference:
            figures, goldens = compare(model, reference, goldens, on_progress=on_progress)
    except (BundleError, ConversionError, OSError) as error:  # no room for the reference, as a rule
        return card | {"status": "not-compared", "reason": f"the reference could not be run: {error}"}, goldens
    bound = kl_bound(unfinished.program().graph, source.parameters)
    card |= figures.to_json() | {"reference": "float32 program of the same source", "kl_bound": bound}
    card |= {"top1_bound": top1_bound(figures)}
    failure = _failure(figures, bound)
    if failure is None:
        return card | {"status": "ok", "reason": None}, goldens
    return card | {"status": "failed", "reason": f"{failure}; least exact: {_least_exact(unfinished)}"}, goldens


def verify_bundle(
    directory: str | Path,
    *,
    formats: Sequence[str] = (),
    reference: str | Path | None = None,
    text: str | Path | None = None,
    provider: str | None = None,
    threads: int | None = None,
    on_progress: ProgressFn | None = None,
) -> list[dict[str, Any]]:
    """Run a bundle's programs again and compare them with the reference: its source, or what the bundle remembers of it.

    Args:
        text: A text file to compare on as well, which needs the source: the bundle remembers its own texts only.
        provider: What must run the programs; None takes what each was made for, where its library is installed.

    Returns:
        A row for each program, as `edgekit verify --json` has it.

    Raises:
        BundleError, SourceError: The bundle, the source or the text can't be opened.
    """
    if text is not None and reference is None:
        raise SourceError("a text of your own is compared with the source itself", hint="add --reference SOURCE")
    bundle = open_bundle(directory)
    programs = [bundle.program(name) for name in formats] or list(bundle.manifest.programs)
    source = open_source(reference) if reference is not None else None
    measured = _Measured(bundle, source, Path(text) if text is not None else None, on_progress)
    load = {"provider": provider, "threads": threads, "verifying": True}
    return [_verify_row(measured, program, load) for program in programs]


@dataclass(frozen=True, slots=True)
class _Measured:
    """What every program of a bundle is compared with."""

    bundle: Bundle
    source: Source | None
    text: Path | None
    on_progress: ProgressFn | None


def _verify_row(measured: _Measured, program: Program, load: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"format": program.graph.format} | dict.fromkeys(_ROW_KEYS)
    try:
        model: LoadedModel = load_attribute(LOADER)(measured.bundle, program, **load)
    except BundleError as error:
        return row | {"status": "not-executed", "reason": error.message}
    with model:
        try:
            row |= _verified(measured, program, model)
            return row | {"reason": row["reason"] or "; ".join(model.provider.passed_over) or None}
        except GenerationError as error:
            return row | {"status": "failed", "reason": error.message}


def _verified(measured: _Measured, program: Program, model: LoadedModel) -> dict[str, Any]:
    format, bundle = program.graph.format, measured.bundle
    remembered = (bundle.directory / GOLDENS).is_file()
    if not remembered and measured.source is None:
        return {"status": "not-compared", "reason": "converted without verification; give --reference"}
    goldens = read_goldens(bundle, program) if remembered else make_goldens(model, format)
    matched, excusable = greedy_match(model, goldens, format)
    found: dict[str, Any] = {"executed": model.provider.executed, "greedy_match_tokens": matched}
    figures, own_text = _figures(measured, program, model, goldens)
    if not excusable:
        return found | {"status": "failed", "reason": "greedy tokens differ from those the bundle was verified with"}
    if figures is None:
        return found | {"status": "ok", "reason": program.quality.get("reason")}
    found |= figures.to_json() | {"text": own_text}
    failure = _failure(figures, kl_bound(program.graph, bundle.manifest.model.get("parameters") or 0))
    return found | {"status": "failed" if failure else "ok", "reason": failure}


def _figures(
    measured: _Measured, program: Program, model: LoadedModel, goldens: Goldens
) -> tuple[Figures | None, dict[str, Any] | None]:
    """The figures on the goldens' texts, and those on the user's text where there is one."""
    if measured.source is None:
        return compare_with_goldens(model, goldens), None
    windows = read_windows(model, measured.text) if measured.text else ()
    with _reference(measured.source, measured.bundle, program, measured.on_progress) as reference:
        figures, _ = compare(model, reference, goldens, on_progress=measured.on_progress)
        if not windows:
            return figures, None
        divergence = compare_on_text(model, reference, windows, on_progress=measured.on_progress)
    return figures, divergence.figures().rounded().to_json() | asdict(divergence.perplexity())


def _reference(
    source: Source, bundle: Bundle, program: Program, on_progress: ProgressFn | None
) -> AbstractContextManager[LoadedModel]:
    """The source in float32, computed from its mapped file.

    Raises:
        SourceError: It is another model than the bundle's.
    """
    config = source.config
    theirs = bundle.manifest.model.get("model_type"), program.graph.vocab_size
    if (config.model_type, config.vocab_size) != theirs:
        raise SourceError(
            f"the reference is a {config.model_type} with {config.vocab_size:,} tokens, the bundle a {theirs[0]} with "
            f"{theirs[1]:,}",
            hint="give the checkpoint that the bundle was converted from",
        )
    return companion(
        source, bundle.directory, quant="fp32", context=program.context, stage="reference",
        mapped=True, on_progress=on_progress,
    )  # fmt: skip


def _failure(figures: Figures, bound: float) -> str | None:
    """Which bound a program is over; None where it keeps both."""
    if not figures.kl_mean <= bound:
        return f"mean KL {figures.kl_mean:.3g} is over the bound of {bound}"
    if not figures.top1_agreement >= top1_bound(figures):
        return f"top-1 agreement {figures.top1_agreement:.1%} is under the bound of {top1_bound(figures):.1%}"
    return None


def _least_exact(unfinished: Bundle) -> str:
    weights = unfinished.manifest.programs[0].graph.weights
    worst = sorted(weights, key=lambda report: -report.relative_error)[:3]
    return ", ".join(f"{report.role} ({report.bits} bits, error {report.relative_error:.1%})" for report in worst)


def _what_would_work(plan: Plan) -> str:
    """The next finer recipe, and what its weights take."""
    finer = "int8" if any(weight.format.bits < 8 for weight in plan.weights.values()) else "fp32"
    form = RECIPES[finer].format
    finest = [replace(weight, format=form) if weight.form_is_blocks else weight for weight in plan.weights.values()]
    size_bytes = sum(weight.size_bytes for weight in finest)
    return (
        f"use --quant {finer} ({size_bytes / 1e6:,.1f} MB of weights), or --allow-low-quality to keep it all the same"
    )
