"""convert(): open, plan, export, verify, write."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import Any

from edgekit.alternatives import too_large_error
from edgekit.bundle import MANIFEST, RECIPE, TOKENIZER, Bundle, Manifest, hash_file, list_files
from edgekit.calibration import calibration_texts, text_tokens
from edgekit.capability import CAPABILITIES
from edgekit.child import ChildError
from edgekit.describe import NOT_VERIFIED, describe
from edgekit.errors import ConversionError, MissingExtraError, PlanError, SourceError
from edgekit.format_choice import check_format
from edgekit.gate import Reference, oversize, verify_programs
from edgekit.graph import Graph
from edgekit.lint import linted
from edgekit.outline import Outline, outline_of
from edgekit.plan import Plan, make_plan
from edgekit.progress import ProgressFn
from edgekit.quant import CacheFormat, scheme_toml
from edgekit.registry import COMPILERS, CONVERTERS, check_installed, load_attribute
from edgekit.search import SEARCHED, Budget, SchemeSearch
from edgekit.source import Source, open_source
from edgekit.staging import written_aside
from edgekit.target import Npu, Target, load_target

__all__ = ["convert"]


def convert(
    source: str | Path,
    *,
    target: str | Path,
    out: str | Path | None = None,
    quant: str = "auto",
    context: int | None = None,
    format: str | Sequence[str] | None = None,
    cache: CacheFormat | None = None,
    force: bool = False,
    verify: bool = True,
    allow_low_quality: bool = False,
    allow_too_large: bool = False,
    max_size_bytes: int | None = None,
    max_kl: float | None = None,
    on_progress: ProgressFn | None = None,
) -> Bundle:
    """Convert a checkpoint to a verified bundle for one device.

    Args:
        source: A directory with safetensors, a .gguf file, a hub id `org/name[@revision]`, or `sample`.
        target: A device's id (`edgekit targets`), or a profile file.
        out: The bundle's directory; `<model>-<target>.edgekit` by default.
        quant: `auto`, a recipe's name, or a recipe file.
        context: Tokens; by default the smaller of the model's own and 4,096, or what fits.
        format: By default the first that the target prefers and EdgeKit converts to. Of several, the bundle gets a program
            each; the first is what runs unless another is asked for.
        cache: How keys and values are kept; by default the best that fits.
        force: Overwrite `out`.
        verify: Run the program and compare it with the full-precision reference.
        allow_low_quality: Let a program pass that fails its quality bound; the manifest says so.
        allow_too_large: Convert even where the plan says that the model does not fit the device.
        max_size_bytes, max_kl: Search for the scheme of the best quality whose program's files take no more bytes, or for the
            smallest whose mean KL divergence is no larger; only with `quant` auto.
        on_progress: Called with each step of long work.

    Raises:
        EdgeKitError: See `edgekit.errors`; then nothing is written.
    """
    asked = _asked_formats(format)
    opened, device = open_source(source), load_target(target)
    outline, budget = outline_of(opened), _budget(max_size_bytes, max_kl, quant, asked)
    plans = _make_plans(outline, device, asked, quant=SEARCHED if budget else quant, context=context, cache=cache)
    directory = Path(out) if out else Path(f"{_short_name(opened)}-{plans[0].target}.edgekit")
    work = _Work(opened, outline, device, verify, allow_low_quality, allow_too_large, on_progress)
    plans = [work.checked(plan) for plan in plans]
    with written_aside(directory, force=force) as unfinished, _hashing(opened.weight_files) as hashes:
        work = replace(work, directory=unfinished)
        with Reference(opened, unfinished, context=plans[0].context, on_progress=on_progress) as reference:
            manifest = _write_searched(work, plans[0], budget, reference) if budget else _write(work, plans, reference)
        return Bundle(directory, _finished(work, manifest, hashes.result()))


def _asked_formats(format: str | Sequence[str] | None) -> list[str | None]:
    """What was asked for, None for the target's own choice. What lacks for it is said before any work.

    Raises:
        UnsupportedError, PlanError, MissingExtraError: One is not known, named twice, or its extra is not installed.
    """
    names = [] if format is None else [format] if isinstance(format, str) else [*format]
    if len(set(names)) < len(names):
        raise PlanError(f"a format is asked for twice: {', '.join(names)}", hint="name each once")
    for name in names:
        check_format(name)
        check_installed(name)
    return [*names] or [None]


def _short_name(source: Source) -> str:
    return source.provenance.name.rpartition("/")[2].removesuffix(".gguf")


def _budget(
    max_size_bytes: int | None, max_kl: float | None, quant: str, formats: Sequence[str | None]
) -> Budget | None:
    if max_size_bytes is None and max_kl is None:
        return None
    if quant != "auto":
        raise PlanError(
            f"--quant {quant} leaves no scheme to search for", hint="leave out --quant, or size and quality"
        )
    if len(formats) > 1:
        raise PlanError(
            "a scheme is searched for one format at a time", hint="name one --format, and use its recipe for others"
        )
    return Budget(max_size_bytes, max_kl)


def _make_plans(
    outline: Outline, device: Target, formats: Sequence[str | None], *, context: int | None, **asked: Any
) -> list[Plan]:
    """A plan for each format, all with one context: a sequence that one program begins must fit the others."""
    plans = [make_plan(outline, device, format=name, context=context, **asked) for name in formats]
    for plan in plans:
        check_installed(plan.format)
    step = lcm(*(CAPABILITIES[plan.format].context_multiple for plan in plans))
    shortest = min(plan.context for plan in plans)
    shortest = shortest // step * step or shortest
    return [
        plan if plan.context == shortest else make_plan(outline, device, format=plan.format, context=shortest, **asked)
        for plan in plans
    ]


@dataclass(frozen=True, slots=True)
class _Work:
    """What the programs of a bundle are made from and how; `directory` is the unfinished bundle, `texts` to calibrate on."""

    source: Source
    outline: Outline
    device: Target
    verify: bool
    allow_low_quality: bool
    allow_too_large: bool
    on_progress: ProgressFn | None
    directory: Path = Path()
    texts: Sequence[Sequence[int]] = ()

    def checked(self, plan: Plan) -> Plan:
        """The plan, with what the target's rules say of it.

        Raises:
            PlanError, ConversionError: It does not fit, grows what it should shrink, or breaks a rule.
        """
        if plan.fits == "no" and not self.allow_too_large:
            raise too_large_error(self.outline, self.device, plan)
        too_large = oversize(self.source, plan)
        if too_large and not self.allow_low_quality:
            raise ConversionError(too_large, hint="use a smaller block size, --quant fp32, or --allow-low-quality")
        return linted(self.outline, self.device, plan)


def _write(work: _Work, plans: Sequence[Plan], reference: Reference) -> Manifest:
    """Write every program, then verify them with one reference: the manifest of the bundle."""
    learning = max((plan for plan in plans if plan.needs_texts), key=text_tokens, default=None)
    if learning and not work.texts:
        texts = calibration_texts(work.source, learning, work.directory, on_progress=work.on_progress)
        work = replace(work, texts=texts)
    written = [_write_program(work, plan) for plan in plans]
    manifest = _merged([describe(work.source, plan, graph) for plan, graph in written])
    return _verified(work, manifest, [plan for plan, _ in written], reference)


def _write_searched(work: _Work, start: Plan, budget: Budget, reference: Reference) -> Manifest:
    """Try schemes until one keeps the budget; its recipe goes into the bundle."""
    search = SchemeSearch(work.source, work.device, start, budget, work.directory, on_progress=work.on_progress)
    work = replace(work, texts=search.texts)
    for plan in search.tries():
        shutil.rmtree(work.directory / plan.format, ignore_errors=True)
        manifest = _write(work, [work.checked(plan)], reference)
        if search.keeps(manifest.programs[0].quality.get("kl_mean")):
            break
    (work.directory / RECIPE).write_text(scheme_toml(plan.scheme), encoding="utf-8", newline="\n")
    return manifest


def _write_program(work: _Work, plan: Plan) -> tuple[Plan, Graph]:
    """Write the program of a plan into the unfinished bundle; the plan with what was found out."""
    export = load_attribute(CONVERTERS[plan.format])
    graph: Graph = export(work.source, plan, work.directory, texts=work.texts, on_progress=work.on_progress)
    if CAPABILITIES[plan.format].quantized_activations and work.device.npu:
        graph, missing = _compiled(work.directory, graph, work.device.npu)
        plan = replace(plan, notes=(*plan.notes, *missing))
    return plan, graph


def _verified(work: _Work, manifest: Manifest, plans: Sequence[Plan], reference: Reference) -> Manifest:
    """The manifest with the quality cards of its programs, which stand in the order of the plans."""
    (work.directory / TOKENIZER).write_text(work.source.tokenizer.tokenizer_json, encoding="utf-8", newline="\n")
    cards: Sequence[Mapping[str, Any]] = [NOT_VERIFIED] * len(plans)
    if work.verify:
        cards = verify_programs(
            Bundle(work.directory, manifest), plans, reference,
            allow_low_quality=work.allow_low_quality, on_progress=work.on_progress,
        )  # fmt: skip
    programs = []
    for program, plan, card in zip(manifest.programs, plans, cards, strict=True):
        too_large = oversize(work.source, plan)
        failed = {"status": "failed", "reason": too_large} if too_large else {}
        programs.append(replace(program, quality={**card, **failed}))
    return replace(manifest, programs=tuple(programs))


def _finished(work: _Work, manifest: Manifest, weight_files: Mapping[str, str]) -> Manifest:
    """The manifest with all files, written."""
    provenance = {**manifest.provenance, "weight_files": weight_files}
    manifest = replace(manifest, provenance=provenance, files=list_files(work.directory))
    _write_json(work.directory / MANIFEST, manifest.to_json())
    return manifest


def _compiled(directory: Path, graph: Graph, npu: Npu) -> tuple[Graph, tuple[str, ...]]:
    """The program with its chip, and compiled for it where the vendor's compiler is installed; else a note of what lacks."""
    if npu.provider not in COMPILERS or not npu.soc_model:
        return graph, ()
    graph = replace(graph, npu={"htp_arch": npu.architecture.removeprefix("v"), "soc_model": str(npu.soc_model)})
    try:
        return replace(graph, contexts=load_attribute(COMPILERS[npu.provider])(directory, graph)), ()
    except (MissingExtraError, ChildError) as error:
        why = "; ".join(filter(None, (error.message, error.hint)))
        return graph, (f"not compiled for the NPU, which does so when it loads the program: {why}",)


def _merged(manifests: Sequence[Manifest]) -> Manifest:
    """One manifest of several programs: the first one's, with the plans of the others under their formats."""
    first, *others = manifests
    if not others:
        return first
    plans = {str(manifest.plan["format"]): manifest.plan for manifest in others}
    notes = [f"{format}: {note}" for format, plan in plans.items() for note in plan["notes"]]
    tools = {name: version for one in manifests for name, version in one.provenance["tools"].items()}
    return replace(
        first,
        provenance={**first.provenance, "tools": tools},
        plan={**first.plan, "notes": [*first.plan["notes"], *notes], "other_programs": plans},
        programs=tuple(program for manifest in manifests for program in manifest.programs),
    )


@contextmanager
def _hashing(files: tuple[Path, ...]) -> Iterator[Future[dict[str, str]]]:
    """SHA-256 of each weight file, computed beside the conversion, and given up when that ends early."""
    ended = threading.Event()

    def hash_all() -> dict[str, str]:
        try:
            return {path.name: hash_file(path, given_up=ended.is_set) for path in files}
        except OSError as error:
            raise SourceError(f"{error.filename} cannot be read: {error.strerror}", hint="fetch it again") from error

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(hash_all)
        finally:
            ended.set()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, ensure_ascii=False, indent=1, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
