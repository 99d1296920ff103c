"""A program of the same source in another precision, for as long as a conversion or a verification needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.bundle import TOKENIZER, Bundle, Program
from edgekit.capability import CAPABILITIES
from edgekit.describe import NOT_VERIFIED, describe
from edgekit.errors import BundleError
from edgekit.graph import Graph
from edgekit.plan import make_plan
from edgekit.progress import ProgressFn
from edgekit.registry import CONVERTERS, LOADER, load_attribute
from edgekit.source import Source
from edgekit.staging import working_directory, writable
from edgekit.target import load_target

if TYPE_CHECKING:
    from edgekit.runtimes.engine import LoadedModel

__all__ = ["FORMAT", "companion"]

# Where it runs: on the build machine, with the program that takes every precision.
TARGET, FORMAT = "linux-x86-64", "onnx"


@contextmanager
def companion(
    source: Source,
    bundle_directory: Path,
    *,
    quant: str,
    context: int,
    stage: str,
    mapped: bool = False,
    threads: int | None = None,
    on_progress: ProgressFn | None = None,
) -> Iterator[LoadedModel]:
    """Write the program beside a bundle, load it, and remove it afterwards.

    Args:
        stage: What its progress is called.
        mapped: Compute from mapped weights: slower, with little memory. Tried in any case where it does not load without.
        threads: For each operator; None leaves it to the runtime.

    Raises:
        SourceError: A weight can't be read or is not a finite number.
        ConversionError: The program can't be written.
        BundleError: It does not load.
        OSError: No folder for it can be made.
    """
    cache = CAPABILITIES[FORMAT].caches[0]  # the best: no shorter one may be chosen for want of memory
    plan = make_plan(source, load_target(TARGET), quant=quant, context=context, format=FORMAT, cache=cache)
    renamed = (lambda step: on_progress(replace(step, stage=stage))) if on_progress else None
    with working_directory(writable(bundle_directory.parent)) as folder:
        graph: Graph = load_attribute(CONVERTERS[FORMAT])(source, plan, folder, on_progress=renamed)
        (folder / TOKENIZER).write_text(source.tokenizer.tokenizer_json, encoding="utf-8", newline="\n")
        bundle = Bundle(folder, describe(source, plan, graph))
        with _load(bundle, Program(graph, plan.context, NOT_VERIFIED), mapped, threads) as model:
            yield model


def _load(bundle: Bundle, program: Program, mapped: bool, threads: int | None) -> LoadedModel:
    load = load_attribute(LOADER)
    try:
        model: LoadedModel = load(bundle, program, mapped=mapped, threads=threads)
    except BundleError:
        if mapped:
            raise
        model = load(bundle, program, mapped=True, threads=threads)  # for want of memory, as a rule
    return model
