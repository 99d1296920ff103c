"""Lint: what a device, its shop or its NPU will refuse, said before a weight is read. Pure rules over headers, target and plan.

Each rule is a function that yields findings; `RULES` lists them. A warning is for the user to judge, an error refuses the
conversion. Where a rule comes from stands beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

from edgekit.errors import PlanError
from edgekit.lint_subject import NPU_FORMATS, Finding, Severity, Subject
from edgekit.outline import Outline
from edgekit.plan import Plan
from edgekit.target import Target
from edgekit.weight_plan import with_own_head

__all__ = ["RULES", "Finding", "lint", "linted"]

# A protobuf message, and so a tensor inside an ONNX file, ends at 2 GiB (protobuf.dev, size limits).
PROTOBUF_BYTES = 2**31 - 1
# One process domain of a Hexagon: larger contexts don't load (onnxruntime pull request 20930).
HEXAGON_BYTES = 3_500_000_000
# 16-bit activations on both sides of a product, as attention has them, need this version of Hexagon; AI Hub, too, refuses
# language models before it (ai-hub-models issue 158).
LEAST_HEXAGON = 73
# The oldest systems that programs of a format run on.
LEAST_SYSTEMS: Mapping[tuple[str, str], tuple[int, ...]] = {
    ("coreai", "iOS"): (27,),
    ("coreai", "iPadOS"): (27,),
    ("coreml", "iOS"): (18,),  # states, and 4-bit weights in blocks
    ("coreml", "iPadOS"): (18,),
    ("executorch", "iOS"): (17,),
    ("executorch", "iPadOS"): (17,),
    ("onnx", "Android"): (7,),  # API level 24
    ("onnx", "iOS"): (15, 1),
    ("onnx", "iPadOS"): (15, 1),
    ("onnx", "Windows"): (10,),
    ("onnx-qdq", "Android"): (7,),
    ("onnx-qdq", "Windows"): (11,),  # what Copilot+ PCs start with
}
# From here on the head, not the layers, is what decode waits for, and what a coarser format of the layers can't help.
HEAD_SHARE = 0.4
# The part of a row that may be padding before it is worth a word.
PADDED_SHARE = 1 / 8


Rule: TypeAlias = Callable[[Subject], Iterator[Finding]]


def lint(outline: Outline, target: Target, plan: Plan) -> tuple[Finding, ...]:
    """Every finding of every rule, errors first."""
    subject = Subject(with_own_head(outline, plan.format), target, plan)
    found = [finding for rule in RULES for finding in rule(subject)]
    return tuple(sorted(found, key=lambda finding: finding.severity))  # "error" < "warning"


def linted(outline: Outline, target: Target, plan: Plan) -> Plan:
    """The plan, with each warning among its notes.

    Raises:
        PlanError: A rule found an error.
    """
    found = lint(outline, target, plan)
    for finding in found:
        if finding.severity == "error":
            raise PlanError(finding.message, hint=finding.hint)
    return replace(plan, notes=(*plan.notes, *(f"{finding.message}; {finding.hint}" for finding in found)))


def _rope_scaling(subject: Subject) -> Iterator[Finding]:
    """A context that was stretched needs the scaling it was stretched with, far enough (ai-hub-models issue 337)."""
    rope, context = subject.rope, subject.plan.context
    if rope is None:
        return
    original, trained = rope.original_context, subject.outline.anatomy.context
    if rope.kind == "default" and 0 < original < trained:
        yield Finding(
            "rope-scaling",
            "error" if context > original else "warning",
            f"the config stretches {original:,} tokens to {trained:,} but names no rope scaling: it got lost on the way",
            f"use the publisher's own checkpoint, or --context up to {original}",
        )
    reach = round(original * rope.factor)
    if rope.kind == "yarn" and context > reach:
        yield Finding(
            "rope-scaling",
            "error",
            f"yarn with factor {rope.factor:g} over {original:,} tokens reaches {reach:,}, not {context:,}",
            f"use --context {reach}, or mend the config's rope scaling",
        )


def _trained_length(subject: Subject) -> Iterator[Finding]:
    """Linear and yarn scaling are usually put on after training."""
    rope, context = subject.rope, subject.plan.context
    if rope is None or rope.kind not in {"linear", "yarn"}:
        return
    first = rope.original_context or round(subject.outline.anatomy.context / rope.factor)
    if first < context:
        yield Finding(
            "trained-length",
            "warning",
            f"a context of {context:,} is over the {first:,} tokens of the first training; {rope.kind} scaling stretches it",
            f"check answers on long texts, or use --context {first}",
        )


def _npu_missing(subject: Subject) -> Iterator[Finding]:
    if subject.plan.format == "onnx-qdq" and subject.npu is None:
        yield Finding(
            "npu-missing",
            "warning",
            f"{subject.target.id} has no NPU that ONNX Runtime reaches: its CPU will run what is made for one",
            "--format onnx is faster on a CPU, and loses less",
        )


def _npu_dimensions(subject: Subject) -> Iterator[Finding]:
    """Sizes in a state that the NPU does not tile (coremltools issue 2631)."""
    npu, config = subject.npu, subject.outline.config
    if npu is None or config is None or not subject.has_fixed_shapes:
        return
    sizes = {"head size": config.attention.head_dim, "context": subject.plan.context}
    for name, size in sizes.items():
        if size % npu.dimension_multiple:
            yield Finding(
                "npu-dimensions",
                subject.npu_severity,
                f"{subject.npu_name} needs multiples of {npu.dimension_multiple} in a state: the {name} is {size}",
                f"use --context {-(-size // npu.dimension_multiple) * npu.dimension_multiple}"
                if name == "context"
                else "run it on the CPU or the graphics processor (--format onnx)",
            )


def _npu_context(subject: Subject) -> Iterator[Finding]:
    """Graphs of fixed shape: how long, and what a window is worth there."""
    npu, context = subject.npu, subject.plan.context
    if npu is None:
        return
    if 0 < npu.max_context < context:
        yield Finding(
            "npu-context",
            "warning",
            f"{subject.npu_name} is known to work up to {npu.max_context:,} tokens, the context is {context:,}",
            f"use --context {npu.max_context}",
        )
    sliding = [
        cache.window for cache in subject.outline.anatomy.caches if cache.kind == "sliding" and cache.window < context
    ]
    if npu.static_shapes and subject.has_fixed_shapes and sliding:
        yield Finding(
            "npu-context",
            "warning",
            f"{len(sliding)} layers look back over {max(sliding):,} tokens only, but {subject.npu_name} keeps all "
            f"{context:,} of them: its shapes are fixed",
            "a shorter --context saves the memory",
        )


def _npu_dtypes(subject: Subject) -> Iterator[Finding]:
    """Weights in a type that the NPU does not take."""
    npu = subject.npu
    if npu is None or subject.plan.format not in NPU_FORMATS:
        return
    kinds = {2: "int2", 4: "int4", 6: "int8", 8: "int8", 16: "fp16", 32: "fp32"}
    matrices = {
        name for name, weight in subject.outline.anatomy.weights.items() if weight.role
    }  # others stay in floats
    layers = (
        weight for name, weight in subject.plan.weights.items() if name.startswith("layers.") and name in matrices
    )
    used = {kinds[weight.format.bits] for weight in layers}
    missing = sorted(used - set(npu.dtypes))
    if missing:
        yield Finding(
            "npu-dtypes",
            subject.npu_severity,
            f"{subject.npu_name} takes {', '.join(npu.dtypes)}, the plan has weights in {', '.join(missing)}",
            "use --quant int8",
        )


def _npu_operators(subject: Subject) -> Iterator[Finding]:
    """What a graph of fixed shape can't hold: choices by data, and recurrences."""
    npu, anatomy, config = subject.npu, subject.outline.anatomy, subject.outline.config
    if npu is None:
        return
    reasons = {
        "its router picks experts by what it reads": any(
            weight.kind == "experts" for weight in anatomy.weights.values()
        ),
        "some of its layers are recurrences": any(cache.kind == "linear" for cache in anatomy.caches),
        "its queries grow with the position": config is not None and config.attention.query_growth > 0,
    }
    for reason, found in reasons.items():
        if found:
            yield Finding(
                "npu-operators",
                subject.npu_severity,
                f"{subject.npu_name} has no operators for this model: {reason}",
                "run it on the CPU (--format onnx), or take a dense model with plain attention",
            )


def _npu_memory(subject: Subject) -> Iterator[Finding]:
    """A Hexagon addresses less than a phone has. Embedding and head are on the CPU."""
    layers = (weight for name, weight in subject.plan.weights.items() if name.startswith("layers."))
    npu, weights = subject.npu, sum(weight.size_bytes for weight in layers)
    if npu is not None and npu.kind == "hexagon" and weights > HEXAGON_BYTES:
        yield Finding(
            "npu-memory",
            subject.npu_severity,
            f"{subject.npu_name} loads up to {HEXAGON_BYTES / 1e9:g} GB as one program, the layers take {weights / 1e9:.2f} GB",
            "use --quant int4, or a smaller model" if _widest_bits(subject) > 4 else "take a smaller model",
        )


def _widest_bits(subject: Subject) -> int:
    weights = (
        weight for name, weight in subject.plan.weights.items() if name.startswith("layers.") and weight.form_is_blocks
    )
    return max((weight.format.bits for weight in weights), default=32)


def _minimum_soc(subject: Subject) -> Iterator[Finding]:
    npu = subject.npu
    if npu is None or npu.kind != "hexagon":
        return
    version = re.fullmatch("v([0-9]{1,4})", npu.architecture)
    if version is None or int(version[1]) < LEAST_HEXAGON:
        yield Finding(
            "minimum-soc",
            subject.npu_severity,
            f"language models need a Hexagon of version v{LEAST_HEXAGON} or later, {subject.target.id} has {npu.architecture}",
            "run it on the CPU (--format onnx)",
        )


def _minimum_os(subject: Subject) -> Iterator[Finding]:
    system, _, version = subject.target.packaging.minimum_os.rpartition(" ")
    least = LEAST_SYSTEMS.get((subject.plan.format, system))
    if least and tuple(map(int, version.split("."))) < least:
        needed = ".".join(map(str, least))
        yield Finding(
            "minimum-os",
            "error",
            f"{subject.plan.format} programs need {system} {needed}, {subject.target.id} starts at {system} {version}",
            "raise packaging.minimum_os in the profile, or choose another --format",
        )


def _package_size(subject: Subject) -> Iterator[Finding]:
    """Shops limit what they carry; weights hardly compress."""
    packaging, size_bytes = subject.target.packaging, subject.plan.memory.weights_bytes
    limits: tuple[tuple[str, str, int, Severity, str], ...] = (
        (
            "asset-limit",
            "one asset (a pack or a file)",
            packaging.asset_limit_bytes,
            "warning",
            "split the weights over several",
        ),
        ("app-limit", "an app", packaging.app_limit_bytes, "warning", "download the bundle after the installation"),
        ("storage", "the smallest variant", packaging.storage_bytes, "error", "take a smaller model or fewer bits"),
    )
    for rule, holder, limit, severity, hint in limits:
        if 0 < limit < size_bytes:
            yield Finding(
                rule,
                severity,
                f"the weights take {size_bytes / 1e9:.1f} GB, {holder} holds up to {limit / 1e9:g} GB on {subject.target.id}",
                hint,
            )


def _protobuf_limit(subject: Subject) -> Iterator[Finding]:
    """EdgeKit keeps weights beside the graph, but tools and providers that read a tensor into it fail past the limit."""
    weights = subject.plan.weights
    large = [name for name, weight in weights.items() if weight.size_bytes > PROTOBUF_BYTES]
    if large and subject.plan.format.startswith("onnx"):
        yield Finding(
            "protobuf-limit",
            "warning",
            f"{', '.join(large[:3])}: {max(weights[name].size_bytes for name in large) / 1e9:.1f} GB in one tensor, but tools "
            "that read tensors into the graph end at 2 GB",
            "use fewer bits for it, or keep the weight file beside the graph",
        )


def _stock_runner(subject: Subject) -> Iterator[Finding]:
    """ExecuTorch's own runners give a program tokens and their place, nothing else."""
    config = subject.outline.config
    switch = config.longrope_switch if config else 0
    if subject.plan.format == "executorch" and 0 < switch < subject.plan.context:
        yield Finding(
            "stock-runner",
            "warning",
            f"over {switch:,} tokens the rotation depends on a sequence's length, which ExecuTorch's own runners do not tell",
            f"use --context {switch} for them; EdgeKit's runtime tells it",
        )


def _head_share(subject: Subject) -> Iterator[Finding]:
    """A small model with a large vocabulary spends its time on the head."""
    weights = subject.plan.weights
    name = "head" if "head" in weights else "embedding"
    read = sum(weight.size_bytes * subject.outline.anatomy.weights[role].active for role, weight in weights.items())
    share = weights[name].size_bytes / read
    if share > HEAD_SHARE:
        bits = weights[name].format.bits
        yield Finding(
            "head-share",
            "warning",
            f"the head ({subject.outline.anatomy.vocab_size:,} tokens, {bits} bits) is {share:.0%} of what each token reads",
            f'a recipe with roles = ["{name}"] and 4 bits, or a model with a smaller vocabulary'
            if bits > 4
            else "a model with a smaller vocabulary is faster at the same size",
        )


def _block_padding(subject: Subject) -> Iterator[Finding]:
    """Blocks that do not divide a row pad its end."""
    found = {}
    for name, weight in subject.plan.weights.items():
        block, columns = weight.format.block_size, weight.shape[-1]
        if block and -columns % block > PADDED_SHARE * columns:
            found[subject.outline.anatomy.weights[name].role, columns, block] = -columns % block / columns
    for (role, columns, block), padding in found.items():
        yield Finding(
            "block-padding",
            "warning",
            f"{role}: rows of {columns} are no whole blocks of {block}: {padding:.0%} more than the weight are stored and read",
            f"use a recipe with a block size that divides {columns}",
        )


RULES: tuple[Rule, ...] = (
    _rope_scaling,
    _trained_length,
    _npu_missing,
    _npu_dimensions,
    _npu_context,
    _npu_dtypes,
    _npu_operators,
    _npu_memory,
    _minimum_soc,
    _minimum_os,
    _package_size,
    _protobuf_limit,
    _stock_runner,
    _head_share,
    _block_padding,
)
