"""Core ML: a package for iOS 18 to 26, with a stateful cache and its weights kept once for three functions of static shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import edgekit
from edgekit.config import ModelConfig
from edgekit.graph import CacheLayout, Graph, TensorReport
from edgekit.plan import Plan
from edgekit.progress import ProgressFn
from edgekit.source import Source

from .disk_space import check_space, writing
from .stored_weights import stored_weights
from .vendor_tools import lowering

if TYPE_CHECKING:
    from .coreml_program import PackagedProgram

__all__ = ["export"]

PACKAGE = "model.mlpackage"
# Tokens that `prefill` and `score` take at a time: enough for the Neural Engine to be bound by arithmetic, little to pad.
CHUNK = 64


def export(
    source: Source,
    plan: Plan,
    directory: Path,
    *,
    texts: Sequence[Sequence[int]] = (),
    on_progress: ProgressFn | None = None,
) -> Graph:
    """Write the package into `directory`/coreml.

    Args:
        texts: Token ids to calibrate on, where the plan needs them.

    Raises:
        SourceError: A weight can't be read or is not a finite number.
        ConversionError: A weight is too large for half precision, Core ML's tools fail, or the files can't be written.
    """
    path, chunk = directory / "coreml" / PACKAGE, min(CHUNK, plan.context)
    check_space(directory, plan.memory.weights_bytes)
    stored = stored_weights(source, plan, directory.parent, texts=texts, on_progress=on_progress)
    halves = plan.weights["final_norm"].format.bits == 16
    with lowering("Core ML", on_progress), writing(path):
        from .coreml_program import PackagedProgram  # coremltools warns of every newer PyTorch

        package = PackagedProgram(path, source.config, plan.context, chunk, halves=halves)
        reports = package.write(stored, _metadata(source, plan, chunk))
    return _graph(source.config, plan, package, reports)


def _graph(config: ModelConfig, plan: Plan, package: PackagedProgram, reports: tuple[TensorReport, ...]) -> Graph:
    from .coreml_program import PACKAGE_FILES

    inputs = {"tokens": "tokens", "past_length": "start", "logits_start": "row"}
    if package.switches:
        inputs["rope_length"] = "rope_length"
    heads, states = config.attention, ("keys", "values")
    return Graph(
        format="coreml",
        files=tuple(f"coreml/{PACKAGE}/{name}" for name in PACKAGE_FILES),
        inputs=inputs,
        outputs={"logits": "logits"},
        cache=CacheLayout(len(config.layers), heads.kv_heads, heads.head_dim, plan.cache.value, *states, *states),
        vocab_size=config.vocab_size,
        rope_switch=config.longrope_switch if package.switches else 0,
        weights=reports,
        chunk=package.chunk,
        operators=package.operators,
    )


def _metadata(source: Source, plan: Plan, chunk: int) -> Mapping[str, str]:
    """What an app's developer needs and Xcode shows; numbers are texts there."""
    config, tokenizer, provenance = source.config, source.tokenizer, source.provenance
    begin = {} if tokenizer.bos_token_id is None else {"bos_token_id": str(tokenizer.bos_token_id)}
    return {
        "description": f"{provenance.name} ({config.model_type}), {plan.quant}, {plan.context:,} tokens of context",
        "author": "",
        "license": provenance.licence or "",
        "version": edgekit.__version__,
        "edgekit_version": edgekit.__version__,
        "model": provenance.name,
        "revision": provenance.revision or "",
        "quant": plan.quant,
        "context": str(plan.context),
        "chunk": str(chunk),
        "vocab_size": str(config.vocab_size),
        "eos_token_ids": ",".join(map(str, tokenizer.eos_token_ids)),
    } | begin
