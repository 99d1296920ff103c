"""edgekit inspect."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import click

from edgekit.bundle import MANIFEST, Bundle, Program, open_bundle
from edgekit.cli.options import json_option, print_json, size_text
from edgekit.cli.quality_text import phase_lines, quality_rows, quality_table
from edgekit.errors import BundleError, EdgeKitError
from edgekit.graph import Graph, TensorReport
from edgekit.plot import Point, scatter
from edgekit.source import Source, open_source

__all__ = ["command"]

SHOWN_OPERATORS = 8
# Formats whose operators are given to compute units where they run.
DEVICE_DECIDES = {
    "coreml": "Core ML gives operators to the Neural Engine, GPU or CPU on the device: Xcode's performance report shows which",
    "coreai": "Core AI gives operators to the Neural Engine, GPU or CPU on the device, when it is specialized there",
}


@click.command("inspect")
@click.argument("paths", metavar="BUNDLE|SOURCE...", nargs=-1, required=True)
@click.option("--tensors", is_flag=True, help="Each tensor: bits, blocks, bytes and error.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.svg",
    help="Draw the size of each bundle's weights against its mean KL.",
)
@json_option
def command(paths: tuple[str, ...], tensors: bool, plot: Path | None, as_json: bool) -> None:
    """Show what bundles or checkpoints hold."""
    opened = [open_bundle(path) if (Path(path) / MANIFEST).is_file() else open_source(path) for path in paths]
    if plot:
        _write_plot(plot, [(path, one) for path, one in zip(paths, opened, strict=True)])
    if as_json:
        found = [_values(one) for one in opened]
        print_json(found[0] if len(found) == 1 else {"kind": "several", "items": found})
    else:
        click.echo("\n\n".join(_text(one, tensors) for one in opened))


def _values(opened: Bundle | Source) -> dict[str, Any]:
    if isinstance(opened, Bundle):
        return {"kind": "bundle", **opened.manifest.to_json()}
    return {"kind": "source", **_source_values(opened)}


def _text(opened: Bundle | Source, tensors: bool) -> str:
    if isinstance(opened, Bundle):
        return _bundle_text(opened) + ("\n\n" + _weights_table(opened) if tensors else "")
    return _source_text(opened) + ("\n\n" + _tensors_table(opened) if tensors else "")


def _write_plot(path: Path, opened: list[tuple[str, Bundle | Source]]) -> None:
    """Draw every program that was compared; the groups are the models.

    Raises:
        BundleError: One of them is no bundle or was not compared with its reference.
        EdgeKitError: The file can't be written.
    """
    groups: dict[str, dict[str, Point]] = defaultdict(dict)
    for name, one in opened:
        if not isinstance(one, Bundle):
            raise BundleError(
                f"{name} is not a bundle, so it has no KL to draw", hint="make one with `edgekit convert`"
            )
        for program in one.manifest.programs:
            label = f"{Path(name).stem} {program.graph.format}" if len(one.manifest.programs) > 1 else Path(name).stem
            groups[str(one.manifest.model.get("name"))][label] = _point(
                name, program.graph.weights_bytes, program.quality
            )
    text = scatter("Size against KL", "weights, MB", "mean KL against full precision, nats", groups)
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise EdgeKitError(
            f"{path} can't be written: {error.strerror or error}", hint="choose another --plot"
        ) from error


def _point(name: str, size_bytes: int, quality: Mapping[str, Any]) -> Point:
    if "kl_mean" not in quality:
        raise BundleError(
            f"{name} was not compared with full precision: {quality.get('reason') or quality.get('status')}",
            hint="leave it out, or convert it without --no-verify",
        )
    low, high = quality.get("kl_mean_interval") or (None, None)
    if not math.isfinite(quality["kl_mean"]):
        raise BundleError(f"{name} has a mean KL that is not a finite number", hint="leave it out")
    return Point(size_bytes / 1e6, quality["kl_mean"], low, high)


def _bundle_text(bundle: Bundle) -> str:
    manifest = bundle.manifest
    model, provenance = manifest.model, manifest.provenance
    lines = [
        f"{bundle.directory}: {model.get('name')} for {manifest.target}",
        f"  model       {model.get('model_type')}, {model.get('parameters') or 0:,} parameters, {model.get('layers')} layers",
        f"  source      {provenance.get('kind')} {provenance.get('revision') or ''}".rstrip(),
        f"  licence     {manifest.licence or 'not stated'}",
        f"  end tokens  {', '.join(map(str, manifest.eos_token_ids)) or 'none'}",
        f"  template    {'yes' if manifest.chat_template else 'none (base model)'}",
    ]
    if len(manifest.programs) > 1:
        lines += [f"  {line}" for line in quality_table(quality_rows(manifest.programs))]
    for program in manifest.programs:
        quality = program.quality
        lines += [
            f"  program     {program.graph.format}, context {program.context:,}, {quality.get('status')}"
            + (f", mean KL {quality['kl_mean']:.3g}" if "kl_mean" in quality else ""),
            f"              {quality.get('reason')}" if quality.get("reason") else "",
            f"              run on {quality.get('executed')}: {quality['provider']}" if quality.get("provider") else "",
            f"              {_runtime_text(program)}",
            *(f"              {line}" for line in phase_lines(quality)),
            *_operator_lines(program.graph),
            *_weights_by_class(program.graph.weights),
            *_float_lines(program.graph.kept_in_floats),
        ]
    lines += [f"  note        {note}" for note in manifest.plan.get("notes", [])]
    lines += [f"  {size_text(entry['size_bytes']):>9}   {name}" for name, entry in manifest.files.items()]
    return "\n".join(line for line in lines if line)


def _operator_lines(graph: Graph) -> list[str]:
    """What each of a program's functions consists of, and who takes it."""
    lines = []
    for name, operators in graph.operators.items():
        common = sorted(operators.items(), key=lambda item: -item[1])[:SHOWN_OPERATORS]
        more = f", {len(operators) - len(common)} more kinds" * (len(operators) > len(common))
        counted = ", ".join(f"{kind} {count:,}" for kind, count in common)
        lines.append(f"    {name}: {sum(operators.values()):,} operators: {counted}{more}")
    total = sum(graph.delegated.values())
    for name, count in sorted(graph.delegated.items(), key=lambda item: -item[1]):
        share = f"{count:,} of {total:,} operators ({count / max(total, 1):.1%})"
        lines.append(f"    {share} " + (f"delegated to {name}" if name else "in no delegate"))
    if graph.format in DEVICE_DECIDES:
        lines.append(f"    {DEVICE_DECIDES[graph.format]}")
    return lines


def _float_lines(kept: Mapping[str, str]) -> list[str]:
    """What stays in high precision, by the reason for it."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in kept.items():
        names[reason].append(name)
    return [f"    in floats: {', '.join(some)} ({reason})" for reason, some in names.items()]


def _runtime_text(program: Program) -> str:
    """How the program is loaded."""
    options = program.runtime
    switches = {
        "spinning": options.spinning,
        "arena": options.arena,
        "packed weights": options.prepacking,
        "mapped file": options.mapped_weights,
    }
    threads = f"{options.threads} threads" if options.threads else "threads as the runtime likes"
    if not program.graph.format.startswith("onnx"):  # the others are ONNX Runtime's
        return threads
    return ", ".join((threads, *(name if on else f"no {name}" for name, on in switches.items())))


def _weights_by_class(weights: Iterable[TensorReport]) -> list[str]:
    """Weights of one class and storage in one line: size and the worst error."""
    groups: dict[tuple[str, str, int, int], list[TensorReport]] = defaultdict(list)
    for report in weights:
        groups[report.role.rpartition(".")[2], report.stored, report.bits, report.block_size].append(report)
    lines = []
    for (name, stored, bits, block), reports in groups.items():
        size = sum(report.size_bytes for report in reports)
        error = max(report.relative_error for report in reports)
        form = f"{bits} bits" + (f", blocks of {block}" if block else "")
        lines.append(
            f"    {name:<20} {len(reports):>3} x {stored:<8} -> {form:<22} {size_text(size):>8}"
            + (f"  error {error:.2%}" if error else "  exact")
        )
    return lines


def _weights_table(bundle: Bundle) -> str:
    """Every weight of every program: bits, blocks, bytes, error, and how far its largest value stands out."""
    lines = []
    for program in bundle.manifest.programs:
        reports = program.graph.weights
        width = max((len(report.role) for report in reports), default=0)
        lines.append(f"{program.graph.format:<{width}}  {'stored':<9} bits  block       bytes   error  largest/rms")
        for report in reports:
            lines.append(
                f"{report.role:<{width}}  {report.stored:<9} {report.bits:>4}  {report.block_size or '-':>5}  "
                f"{report.size_bytes:>10,}  {_error_text(report):>6}  {f'{report.peak:.1f}' if report.peak else '-':>11}"
            )
    return "\n".join(lines)


def _error_text(report: TensorReport) -> str:
    return f"{report.relative_error:.2%}" if report.relative_error else "exact"


def _tensors_table(source: Source) -> str:
    tensors = [tensor for parts in source.parts.values() for tensor in parts]
    width = max(len(tensor.name) for tensor in tensors)
    return "\n".join(
        f"{tensor.name:<{width}}  {tensor.dtype:<9} {' x '.join(map(str, tensor.shape)):>15}  {tensor.size_bytes:>12,}"
        for tensor in tensors
    )


def _source_values(source: Source) -> dict[str, Any]:
    config = source.config
    tensors = [tensor for parts in source.parts.values() for tensor in parts]
    return {
        "name": source.provenance.name,
        "format": source.provenance.kind,
        "revision": source.provenance.revision,
        "licence": source.provenance.licence,
        "model_type": config.model_type,
        "parameters": source.parameters,
        "layers": len(config.layers),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "context": config.context,
        "size_bytes": sum(tensor.size_bytes for tensor in tensors),
        "dtypes": sorted({tensor.dtype for tensor in tensors}),
        "chat_template": source.tokenizer.chat_template is not None,
        "eos_token_ids": list(source.tokenizer.eos_token_ids),
        "notes": list(source.notes),
        "tensors": [{"name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in tensors],
    }


def _source_text(source: Source) -> str:
    values = _source_values(source)
    values.pop("tensors")
    notes = values.pop("notes")
    lines = [f"{key:<14} {', '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in values.items()]
    sizes: dict[str, list[int]] = defaultdict(list)
    for parts in source.parts.values():
        for tensor in parts:
            sizes[tensor.dtype].append(prod(tensor.shape))
    lines += [f"  {dtype}: {len(counts)} tensors, {sum(counts):,} weights" for dtype, counts in sizes.items()]
    lines += [f"{'note':<14} {note}" for note in notes]
    return "\n".join(lines)
