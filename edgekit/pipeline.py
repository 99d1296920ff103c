"""convert(): open, plan, export, verify, write."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit.alternatives import too_large_error
from edgekit.bundle import MANIFEST, TOKENIZER, Bundle, Program, hash_file, list_files
from edgekit.calibration import calibration_texts
from edgekit.describe import NOT_VERIFIED, describe
from edgekit.errors import ConversionError, SourceError
from edgekit.gate import oversize, verify_program
from edgekit.graph import Graph
from edgekit.lint import linted
from edgekit.outline import outline_of
from edgekit.plan import make_plan
from edgekit.progress import ProgressFn
from edgekit.quant import CacheFormat
from edgekit.registry import CONVERTERS, load_attribute
from edgekit.source import open_source
from edgekit.staging import written_aside
from edgekit.target import load_target

__all__ = ["convert"]


def convert(
    source: str | Path,
    *,
    target: str | Path,
    out: str | Path | None = None,
    quant: str = "auto",
    context: int | None = None,
    format: str | None = None,
    cache: CacheFormat | None = None,
    force: bool = False,
    verify: bool = True,
    allow_low_quality: bool = False,
    allow_too_large: bool = False,
    on_progress: ProgressFn | None = None,
) -> Bundle:
    """Convert a checkpoint to a verified bundle for one device.

    Args:
        source: A directory with safetensors, a .gguf file, a hub id `org/name[@revision]`, or `sample`.
        target: A device's id (`edgekit targets`), or a profile file.
        out: The bundle's directory; `<model>-<target>.edgekit` by default.
        quant: `auto`, a recipe's name, or a recipe file.
        context: Tokens; by default the smaller of the model's own and 4,096, or what fits.
        format: By default the first that the target prefers and EdgeKit converts to.
        cache: How keys and values are kept; by default the best that fits.
        force: Overwrite `out`.
        verify: Run the program and compare it with the full-precision reference.
        allow_low_quality: Let a program pass that fails its quality bound; the manifest says so.
        allow_too_large: Convert even where the plan says that the model does not fit the device.
        on_progress: Called with each step of long work.

    Raises:
        EdgeKitError: See `edgekit.errors`; then nothing is written.
    """
    opened, device = open_source(source), load_target(target)
    outline = outline_of(opened)
    plan = make_plan(outline, device, quant=quant, context=context, format=format, cache=cache)
    if plan.fits == "no" and not allow_too_large:
        raise too_large_error(outline, device, plan)
    plan = linted(outline, device, plan)
    too_large = oversize(opened, plan)
    if too_large and not allow_low_quality:
        raise ConversionError(too_large, hint="use a smaller block size, --quant fp32, or --allow-low-quality")
    name = opened.provenance.name.rpartition("/")[2].removesuffix(".gguf")
    directory = Path(out) if out else Path(f"{name}-{plan.target}.edgekit")
    with written_aside(directory, force=force) as unfinished, _hashing(opened.weight_files) as hashes:
        texts = calibration_texts(opened, plan, unfinished, on_progress=on_progress) if plan.calibrated else ()
        export = load_attribute(CONVERTERS[plan.format])
        graph: Graph = export(opened, plan, unfinished, texts=texts, on_progress=on_progress)
        (unfinished / TOKENIZER).write_text(opened.tokenizer.tokenizer_json, encoding="utf-8", newline="\n")
        manifest = describe(opened, plan, graph)
        quality: Mapping[str, Any] = NOT_VERIFIED
        if verify:
            program = Bundle(unfinished, manifest)
            quality = verify_program(
                program, opened, plan, allow_low_quality=allow_low_quality, on_progress=on_progress
            )
        if too_large:
            quality = dict(quality) | {"status": "failed", "reason": too_large}
        manifest = replace(
            manifest,
            programs=(Program(graph, plan.context, quality, plan.runtime),),
            provenance=dict(manifest.provenance) | {"weight_files": hashes.result()},
            files=list_files(unfinished),
        )
        _write_json(unfinished / MANIFEST, manifest.to_json())
    return Bundle(directory, manifest)


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
