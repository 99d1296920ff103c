"""The gate inside convert(): no program passes that was not run, is worse than its scheme's bound, or larger than its parent."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.bounds import failure, is_suspicious, kl_bound, rounding_bound, top1_bound
from edgekit.bundle import GOLDENS, Bundle, Program, open_bundle
from edgekit.companion import FORMAT, companion
from edgekit.diagnosis import diagnose, kl_alone
from edgekit.errors import (
    BundleError,
    ConversionError,
    EdgeKitError,
    GenerationError,
    MissingExtraError,
    SourceError,
    first_line,
)
from edgekit.goldens import Goldens, read_goldens, with_greedy, write_texts
from edgekit.graph import Graph
from edgekit.own_text import read_windows
from edgekit.plan import Plan
from edgekit.progress import ProgressFn
from edgekit.quant import RECIPES, CacheFormat
from edgekit.registry import LOADER, load_attribute
from edgekit.source import Source, open_source
from edgekit.verify import Comparison, compare, compare_on_text, compare_with_goldens, greedy_match, reference_match

if TYPE_CHECKING:
    from edgekit.runtimes.engine import LoadedModel

__all__ = ["Reference", "oversize", "verify_bundle", "verify_programs"]

_ROW_KEYS = (
    "executed",
    "positions",
    "kl_mean",
    "kl_mean_interval",
    "kl_p99",
    "top1_agreement",
    "top1_interval",
    "reference_confidence",
    "decode",
    "late",
    "greedy_match_tokens",
    "reference_match_tokens",
    "text",
    "reason",
)
_RIGHT_SOURCE = "give the checkpoint that the bundle was converted from"
_FLOAT_BYTES = {"F64": 8, "F32": 4}  # all else, quantized checkpoints too, came from 16 bits


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


class Reference:
    """The source in float32, for all programs of a bundle: written and loaded when it is first asked for, gone at the end.

    Args:
        beside: The bundle's directory.
        context: The longest that any of the programs has.
    """

    def __init__(self, source: Source, beside: Path, *, context: int, on_progress: ProgressFn | None) -> None:
        self.source, self.context = source, context
        self._beside, self._on_progress = beside, on_progress
        self._kept = ExitStack()
        self._model: LoadedModel | None = None

    def model(self) -> LoadedModel:
        """The loaded reference, computed from its mapped file.

        Raises:
            BundleError, ConversionError, OSError: There is no room for it, as a rule.
        """
        if self._model is None:
            opened = companion(
                self.source, self._beside, quant="fp32", context=self.context, stage="reference",
                mapped=True, on_progress=self._on_progress,
            )  # fmt: skip
            self._model = self._kept.enter_context(opened)
        return self._model

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *error: object) -> None:
        self._kept.close()


def verify_programs(
    unfinished: Bundle,
    plans: Sequence[Plan],
    reference: Reference,
    *,
    allow_low_quality: bool,
    on_progress: ProgressFn | None,
) -> list[dict[str, Any]]:
    """Run every program, compare each with the full-precision reference, write the goldens; their quality cards.

    Raises:
        ConversionError: A program does not run, or fails its bound and `allow_low_quality` is not set.
    """
    goldens, cards = Goldens((), {}, {}, (), ()), []
    for plan in plans:
        gate = _Gate(unfinished, plan, reference, on_progress)
        card, goldens = gate.verify(goldens)
        if card["status"] == "failed" and not allow_low_quality:
            named = f"{plan.format}: " * (len(plans) > 1)
            raise ConversionError(f"{named}{card['reason']}", hint=_what_would_work(plan))
        cards.append(card)
    if goldens.greedy:
        text = json.dumps(goldens.to_json(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        (unfinished.directory / GOLDENS).write_text(text + "\n", encoding="utf-8", newline="\n")
    return cards


@dataclass(frozen=True, slots=True)
class _Gate:
    """The verification of one program of an unfinished bundle."""

    unfinished: Bundle
    plan: Plan
    reference: Reference
    on_progress: ProgressFn | None

    @property
    def program(self) -> Program:
        return self.unfinished.program(self.plan.format)

    def verify(self, goldens: Goldens) -> tuple[dict[str, Any], Goldens]:
        """The program's card, and the goldens with what it adds."""
        try:
            model: LoadedModel = load_attribute(LOADER)(self.unfinished, self.program, verifying=True)
        except BundleError as error:
            if (
                self.plan.scheme.activation_bits == 16 and self.plan.format == FORMAT
            ):  # no processor's kernels take halves
                reason = f"no provider here runs it: {error.message}"
                return {"status": "not-executed", "executed": None, "reason": reason}, goldens
            raise ConversionError(
                f"the {self.plan.format} program does not load: {error.message}", hint=error.hint
            ) from error
        with model:
            try:
                card, goldens = self._compared(model, goldens)
            except GenerationError as error:
                raise ConversionError(
                    f"the {self.plan.format} program does not run: {error.message}", hint=error.hint
                ) from error
            return {
                "executed": model.provider.executed,
                "provider": model.provider.note or model.provider.reason,
            } | card, goldens

    def _compared(self, model: LoadedModel, goldens: Goldens) -> tuple[dict[str, Any], Goldens]:
        plan, format = self.plan, self.plan.format
        try:
            if not goldens.texts:
                writer = self.reference.model() if model.provider.is_slow else model
                goldens = replace(goldens, texts=write_texts(writer, on_progress=self.on_progress))
            if not goldens.texts:
                return _not_compared("the context is too short for any test prompt"), goldens
            goldens = with_greedy(goldens, model, format)
            if _is_reference(plan):
                return {"status": "ok", "reason": "this is the full-precision program"}, goldens
            reference = self.reference.model()
            comparison, goldens = compare(model, reference, goldens, on_progress=self.on_progress)
            matched = reference_match(reference, goldens, format)
        except (BundleError, ConversionError, OSError) as error:  # no room for the reference, as a rule
            return _not_compared(f"the reference could not be run: {error}"), goldens
        bound = kl_bound(self.program.graph, self.reference.source.parameters)
        bound = _narrowed(bound, comparison, model, self.reference, goldens)
        card = self._judged(comparison, bound, lambda: _symptoms(model, self.reference, goldens, bound))
        return card | {"reference_match_tokens": matched}, goldens

    def _judged(self, comparison: Comparison, bound: float, symptoms: Callable[[], str]) -> dict[str, Any]:
        graph, figures = self.program.graph, comparison.figures
        card = comparison.to_json() | {"reference": "float32 program of the same source", "kl_bound": bound}
        card |= {"top1_bound": top1_bound(figures)}
        failed = failure(comparison, bound)
        if failed is None:
            return card | {"status": "ok", "reason": None}
        reasons = (failed, symptoms(), f"least exact: {_least_exact(graph)}")
        return card | {"status": "failed", "reason": "; ".join(filter(None, reasons))}


def _narrowed(
    bound: float, comparison: Comparison, model: LoadedModel, reference: Reference, goldens: Goldens
) -> float:
    """The bound that a program must keep, where one that is wide may hide more than rounding."""
    if not is_suspicious(comparison.figures.kl_mean, bound):
        return bound
    return rounding_bound(bound, kl_alone(model, reference.model(), _longest(goldens)))


def _longest(goldens: Goldens) -> tuple[int, ...]:
    return max((text.tokens for text in goldens.texts), key=len)


def _symptoms(model: LoadedModel, reference: Reference, goldens: Goldens, bound: float) -> str:
    """What a program that failed is likely to have wrong; that it failed is said even where this can't be found out."""
    windows = {layer.window for layer in reference.source.config.layers}
    try:
        return diagnose(model, reference.model(), _longest(goldens), bound=bound, windows=windows)
    except (EdgeKitError, MemoryError, OSError) as error:
        return f"why could not be found out: {first_line(error)}"


def _not_compared(reason: str) -> dict[str, Any]:
    return {"status": "not-compared", "reason": reason}


def _is_reference(plan: Plan) -> bool:
    """True of a program like the one that others are compared with."""
    whole = not plan.scheme.quantized and plan.scheme.activation_bits == 32
    return whole and plan.cache is CacheFormat.FLOAT32 and plan.format == FORMAT


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
    for program in programs if source else ():
        _check_same_model(source, bundle, program)
    load = {"provider": provider, "threads": threads, "verifying": True}
    with ExitStack() as stack:
        measured = _Measured(bundle, None, Path(text) if text is not None else None, on_progress)
        if source:
            context = max(program.context for program in programs)
            opened = Reference(source, bundle.directory, context=context, on_progress=on_progress)
            measured = replace(measured, reference=stack.enter_context(opened))
        return [_verify_row(measured, program, load) for program in programs]


@dataclass(frozen=True, slots=True)
class _Measured:
    """What every program of a bundle is compared with."""

    bundle: Bundle
    reference: Reference | None
    text: Path | None
    on_progress: ProgressFn | None


def _verify_row(measured: _Measured, program: Program, load: dict[str, Any]) -> dict[str, Any]:
    graph = program.graph
    row: dict[str, Any] = {"format": graph.format, "weights_bytes": graph.weights_bytes} | dict.fromkeys(_ROW_KEYS)
    try:
        model: LoadedModel = load_attribute(LOADER)(measured.bundle, program, **load)
    except BundleError as error:
        return row | {"status": "not-executed", "reason": error.message}
    except MissingExtraError as error:
        return row | {"status": "not-executed", "reason": f"{error.message}: {error.hint}"}
    with model:
        try:
            row |= _verified(measured, program, model)
            return row | {"reason": row["reason"] or "; ".join(model.provider.passed_over) or None}
        except GenerationError as error:
            return row | {"status": "failed", "reason": error.message}


def _verified(measured: _Measured, program: Program, model: LoadedModel) -> dict[str, Any]:
    format, bundle = program.graph.format, measured.bundle
    remembered = (bundle.directory / GOLDENS).is_file()
    if not remembered and measured.reference is None:
        return {"status": "not-compared", "reason": "converted without verification; give --reference"}
    goldens = read_goldens(bundle, program) if remembered else _new_goldens(measured, model, format)
    matched, excusable = greedy_match(model, goldens, format)
    found: dict[str, Any] = {"executed": model.provider.executed, "greedy_match_tokens": matched}
    comparison, others = _compared(measured, model, goldens, format)
    if comparison is not None:
        found |= comparison.to_json() | others
    if not excusable:
        return found | {"status": "failed", "reason": "greedy tokens differ from those the bundle was verified with"}
    if comparison is None:
        return found | {"status": "ok", "reason": program.quality.get("reason")}
    bound = kl_bound(program.graph, bundle.manifest.model.get("parameters") or 0)
    if measured.reference:
        bound = _narrowed(bound, comparison, model, measured.reference, goldens)
    failed = failure(comparison, bound)
    if failed is None:
        return found | {"status": "ok", "reason": None}
    symptoms = _symptoms(model, measured.reference, goldens, bound) if measured.reference else ""
    return found | {"status": "failed", "reason": "; ".join(filter(None, (failed, symptoms)))}


def _new_goldens(measured: _Measured, model: LoadedModel, format: str) -> Goldens:
    writer = measured.reference.model() if measured.reference and model.provider.is_slow else model
    return with_greedy(Goldens(write_texts(writer, on_progress=measured.on_progress), {}, {}, (), ()), model, format)


def _compared(
    measured: _Measured, model: LoadedModel, goldens: Goldens, format: str
) -> tuple[Comparison | None, dict[str, Any]]:
    """The figures on the goldens' texts; and what only the reference itself can tell: its tokens, and the user's text."""
    if measured.reference is None:
        return compare_with_goldens(model, goldens), {}
    reference = measured.reference.model()
    windows = read_windows(model, measured.text) if measured.text else ()
    comparison, _ = compare(model, reference, goldens, on_progress=measured.on_progress)
    others: dict[str, Any] = {"reference_match_tokens": reference_match(reference, goldens, format), "text": None}
    if windows:
        divergence = compare_on_text(model, reference, windows, on_progress=measured.on_progress)
        others["text"] = divergence.figures().rounded().to_json() | asdict(divergence.perplexity())
    return comparison, others


def _check_same_model(source: Source | None, bundle: Bundle, program: Program) -> None:
    """Refuse a source that is another model than the bundle's.

    Raises:
        SourceError: It is.
    """
    if source is None:
        return
    config = source.config
    theirs = bundle.manifest.model.get("model_type"), program.graph.vocab_size
    if (config.model_type, config.vocab_size) != theirs:
        raise SourceError(
            f"the reference is a {config.model_type} with {config.vocab_size:,} tokens, the bundle a {theirs[0]} with "
            f"{theirs[1]:,}",
            hint=_RIGHT_SOURCE,
        )
    ends, own = (sorted(tokens) for tokens in (source.tokenizer.eos_token_ids, bundle.manifest.eos_token_ids))
    if ends != own:
        raise SourceError(f"the reference has the end tokens {ends}, the bundle {own}", hint=_RIGHT_SOURCE)


def _least_exact(graph: Graph) -> str:
    worst = sorted(graph.weights, key=lambda report: -report.relative_error)[:3]
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
