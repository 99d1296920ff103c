"""edgekit inspect."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import click

from edgekit.bundle import MANIFEST, Bundle, open_bundle
from edgekit.cli.options import json_option, print_json, size_text
from edgekit.graph import TensorReport
from edgekit.source import Source, open_source

__all__ = ["command"]


@click.command("inspect")
@click.argument("path", metavar="BUNDLE|SOURCE")
@json_option
def command(path: str, as_json: bool) -> None:
    """Show what a bundle or a checkpoint holds."""
    if (Path(path) / MANIFEST).is_file():
        bundle = open_bundle(path)
        if as_json:
            print_json({"kind": "bundle", **bundle.manifest.to_json()})
        else:
            click.echo(_bundle_text(bundle))
        return
    source = open_source(path)
    if as_json:
        print_json({"kind": "source", **_source_values(source)})
    else:
        click.echo(_source_text(source))


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
    for program in manifest.programs:
        quality = program.quality
        lines += [
            f"  program     {program.graph.format}, context {program.context:,}, {quality.get('status')}"
            + (f", mean KL {quality['kl_mean']:.3g}" if "kl_mean" in quality else ""),
            f"              {quality.get('reason')}" if quality.get("reason") else "",
            *_weights_by_class(program.graph.weights),
        ]
    lines += [f"  note        {note}" for note in manifest.plan.get("notes", [])]
    lines += [f"  {size_text(entry['size_bytes']):>9}   {name}" for name, entry in manifest.files.items()]
    return "\n".join(line for line in lines if line)


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
