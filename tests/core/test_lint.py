"""Lint: each rule has a case where it speaks and one, as near to it as can be, where it is silent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit.anatomy import anatomy_of
from edgekit.config import AttentionConfig, LayerConfig, ModelConfig, RopeConfig
from edgekit.lint import RULES, Finding, lint
from edgekit.outline import Outline, UnknownModel, open_outline
from edgekit.plan import make_plan
from edgekit.target import Target, load_target

LINUX, IPHONE, PIXEL = load_target("linux-x86-64"), load_target("iphone-16"), load_target("pixel-9-pro")
SNAPDRAGON = load_target("copilot-snapdragon-x-elite")


def outline(*, rope: RopeConfig | None = None, window: int = 0, **changes: Any) -> Outline:
    """A model of some 130 million weights, whose head is small beside its layers."""
    growth = changes.pop("query_growth", 0.0)
    values: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 8000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "context": 8192,
        "attention": AttentionConfig(12, 4, changes.pop("head_dim", 64), 0.125, query_growth=growth),
        "layers": (LayerConfig(rope or RopeConfig(1e4, 64), window),) * 12,
        "norm_eps": 1e-6,
    }
    config = ModelConfig(**(values | changes))
    return Outline("model", anatomy_of(config), config)


LONG = RopeConfig(
    1e4, 64, "longrope", original_context=4096, short_factors=(1.0,) * 32, long_factors=(2.0,) * 32
)  # fmt: skip


def found(
    model: Outline, target: Target, *, quant: str = "int8", program: str = "onnx", context: int | None = None
) -> dict[str, Finding]:
    plan = replace(make_plan(model, target, quant=quant, context=context, format="onnx"), format=program)
    return {finding.rule: finding for finding in lint(model, target, plan)}


def with_packaging(target: Target, **changes: Any) -> Target:
    return replace(target, packaging=replace(target.packaging, **changes))


def with_npu(target: Target, **changes: Any) -> Target:
    assert target.npu
    return replace(target, npu=replace(target.npu, **changes))


def of_config(directory: Path, **config: Any) -> Outline:
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    opened = open_outline(directory)
    assert not isinstance(opened, UnknownModel)
    return opened


MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
}  # fmt: skip
BIG: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "layers": (LayerConfig(RopeConfig(1e4, 64)),) * 32,
}


def yarn(factor: float) -> RopeConfig:
    return RopeConfig(1e4, 64, "yarn", factor=factor, original_context=4096)


# rule, severity, what the message and the hint say, then a case that has it and its neighbour that has not.
CASES: dict[str, tuple[str, str, str, str, dict[str, Any], dict[str, Any]]] = {
    "scaling lost": (
        "rope-scaling", "error", "stretches 4,096 tokens to 8,192 but names no rope scaling", "--context up to 4096",
        {"model": outline(rope=RopeConfig(1e4, 64, original_context=4096)), "target": LINUX, "context": 4097},
        {"model": outline(rope=RopeConfig(1e4, 64, original_context=8192)), "target": LINUX, "context": 4097},
    ),
    "scaling lost, within the original": (
        "rope-scaling", "warning", "names no rope scaling", "publisher's own checkpoint",
        {"model": outline(rope=RopeConfig(1e4, 64, original_context=4096)), "target": LINUX, "context": 4096},
        {"model": outline(rope=RopeConfig(1e4, 64)), "target": LINUX, "context": 4096},
    ),
    "scaling too short": (
        "rope-scaling", "error", "factor 1.5 over 4,096 tokens reaches 6,144, not 8,192", "--context 6144",
        {"model": outline(rope=yarn(1.5)), "target": LINUX, "context": 8192},
        {"model": outline(rope=yarn(2.0)), "target": LINUX, "context": 8192},
    ),
    "over the trained length, yarn": (
        "trained-length", "warning", "4,097 is over the 4,096 tokens of the first training", "--context 4096",
        {"model": outline(rope=yarn(2.0)), "target": LINUX, "context": 4097},
        {"model": outline(rope=yarn(2.0)), "target": LINUX, "context": 4096},
    ),
    "over the trained length, linear": (
        "trained-length", "warning", "2,049 is over the 2,048 tokens", "--context 2048",
        {"model": outline(rope=RopeConfig(1e4, 64, "linear", factor=4.0)), "target": LINUX, "context": 2049},
        {"model": outline(rope=RopeConfig(1e4, 64)), "target": LINUX, "context": 2049},
    ),
    "no NPU": (
        "npu-missing", "warning", "pixel-9-pro has no NPU that ONNX Runtime reaches", "--format onnx",
        {"model": outline(), "target": PIXEL, "program": "onnx-qdq"},
        {"model": outline(), "target": SNAPDRAGON, "program": "onnx-qdq"},
    ),
    "Neural Engine state, head": (
        "npu-dimensions", "warning", "the Neural Engine needs multiples of 32 in a state: the head size is 80",
        "--format onnx",
        {"model": outline(head_dim=80), "target": IPHONE, "program": "coreml"},
        {"model": outline(head_dim=96), "target": IPHONE, "program": "coreml"},
    ),
    "Neural Engine state, not of Core AI": (
        "npu-dimensions", "warning", "the head size is 80", "--format onnx",
        {"model": outline(head_dim=80), "target": IPHONE, "program": "coreml"},
        {"model": outline(head_dim=80), "target": IPHONE, "program": "coreai"},
    ),
    "Neural Engine state, context": (
        "npu-dimensions", "warning", "the Neural Engine needs multiples of 32 in a state: the context is 1000", "--context 1024",
        {"model": outline(), "target": IPHONE, "program": "coreml", "context": 1000},
        {"model": outline(), "target": IPHONE, "program": "coreml", "context": 1024},
    ),
    "context over what the NPU takes": (
        "npu-context", "warning", "the Hexagon NPU is known to work up to 4,096 tokens, the context is 8,192", "--context 4096",
        {"model": outline(), "target": SNAPDRAGON, "program": "onnx-qdq", "context": 8192},
        {"model": outline(), "target": SNAPDRAGON, "program": "onnx-qdq", "context": 4096},
    ),
    "fixed shapes and a window": (
        "npu-context", "warning", "look back over 512 tokens only, but the Neural Engine keeps all 4,096",
        "a shorter --context",
        {"model": outline(window=512), "target": IPHONE, "program": "coreml"},
        {"model": outline(window=4096), "target": IPHONE, "program": "coreml"},
    ),
    "fixed shapes, not of Core AI": (
        "npu-context", "warning", "look back over 512 tokens only", "a shorter --context",
        {"model": outline(window=512), "target": IPHONE, "program": "coreml"},
        {"model": outline(window=512), "target": IPHONE, "program": "coreai"},
    ),
    "type of weights": (
        "npu-dtypes", "error", "the Hexagon NPU takes int4, int8, int16, fp16, the plan has weights in fp32", "--quant int8",
        {"model": outline(), "target": SNAPDRAGON, "program": "onnx-qdq", "quant": "fp32"},
        {"model": outline(), "target": SNAPDRAGON, "program": "onnx-qdq", "quant": "int4"},
    ),
    "operators: growing queries": (
        "npu-operators", "error", "no operators for this model: its queries grow with the position", "--format onnx",
        {"model": outline(query_growth=0.1), "target": SNAPDRAGON, "program": "onnx-qdq"},
        {"model": outline(query_growth=0.1), "target": PIXEL, "program": "onnx"},
    ),
    "memory of a Hexagon": (
        "npu-memory", "error", "loads up to 3.5 GB as one program, the layers take", "--quant int4",
        {"model": outline(**BIG), "target": SNAPDRAGON, "program": "onnx-qdq", "quant": "int8"},
        {"model": outline(**BIG), "target": SNAPDRAGON, "program": "onnx-qdq", "quant": "int4-symmetric-block128"},
    ),
    "old chip": (
        "minimum-soc", "error", "need a Hexagon of version v73 or later, copilot-snapdragon-x-elite has v69", "--format onnx",
        {"model": outline(), "target": with_npu(SNAPDRAGON, architecture="v69"), "program": "onnx-qdq"},
        {"model": outline(), "target": with_npu(SNAPDRAGON, architecture="v73"), "program": "onnx-qdq"},
    ),
    "old system": (
        "minimum-os", "error", "coreai programs need iOS 27, iphone-16 starts at iOS 26.4", "minimum_os",
        {"model": outline(), "target": with_packaging(IPHONE, minimum_os="iOS 26.4"), "program": "coreai"},
        {"model": outline(), "target": IPHONE, "program": "coreai"},
    ),
    "ExecuTorch's own runners": (
        "stock-runner", "warning", "over 4,096 tokens the rotation depends on a sequence's length", "--context 4096",
        {"model": outline(rope=LONG), "target": PIXEL, "program": "executorch", "context": 8192},
        {"model": outline(rope=LONG), "target": PIXEL, "program": "executorch", "context": 4096},
    ),
    "asset pack": (
        "asset-limit", "warning", "one asset (a pack or a file) holds up to 1.5 GB on pixel-9-pro", "over several",
        {"model": outline(**BIG), "target": PIXEL, "quant": "int4"}, {"model": outline(), "target": PIXEL, "quant": "int4"},
    ),
    "app": (
        "app-limit", "warning", "an app holds up to 4 GB on iphone-16", "download the bundle",
        {"model": outline(**BIG), "target": IPHONE, "quant": "int8"},
        {"model": outline(**BIG), "target": IPHONE, "quant": "int4-symmetric-block128"},
    ),
    "storage": (
        "storage", "error", "the smallest variant holds up to 1 GB on pixel-9-pro", "smaller model",
        {"model": outline(**BIG), "target": with_packaging(PIXEL, storage_bytes=10**9), "quant": "int8"},
        {"model": outline(), "target": with_packaging(PIXEL, storage_bytes=10**9), "quant": "int8"},
    ),
    "one tensor over 2 GB": (
        "protobuf-limit", "warning", "embedding, head: 2.1 GB in one tensor", "fewer bits",
        {"model": outline(hidden_size=4096, vocab_size=131_072), "target": LINUX, "quant": "fp32"},
        {"model": outline(hidden_size=4096, vocab_size=131_072), "target": LINUX, "quant": "int8"},
    ),
    "head": (
        "head-share", "warning", "the head (262,144 tokens, 8 bits) is", "smaller vocabulary",
        {"model": outline(vocab_size=262_144), "target": LINUX}, {"model": outline(vocab_size=32_768), "target": LINUX},
    ),
    "head that is the embedding": (
        "head-share", "warning", "the head (262,144 tokens, 8 bits) is", 'roles = ["embedding"]',
        {"model": outline(vocab_size=262_144, tied_embeddings=True), "target": LINUX},
        {"model": outline(vocab_size=32_768, tied_embeddings=True), "target": LINUX},
    ),
    "padded blocks": (
        "block-padding", "warning", "down: rows of 144 are no whole blocks of 128: 78% more", "divides 144",
        {"model": outline(intermediate_size=144), "target": LINUX, "quant": "int4-symmetric-block128"},
        {"model": outline(intermediate_size=2080), "target": LINUX, "quant": "int4-symmetric-block128"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rule_speaks_where_it_should_and_not_beside_it(name: str) -> None:
    rule, severity, message, hint, speaks, silent = CASES[name]
    finding = found(**speaks)[rule]
    assert finding.severity == severity
    assert message in finding.message
    assert hint in finding.hint
    assert rule not in found(**silent)


def test_experts_and_recurrences_are_not_for_an_npu(tmp_path: Path) -> None:
    experts = of_config(tmp_path, **MIXTRAL)
    assert "picks experts" in found(experts, SNAPDRAGON, program="onnx-qdq")["npu-operators"].message
    assert "npu-operators" not in found(experts, LINUX)
    # The router stays in floats, whatever --quant says.
    assert "npu-dtypes" not in found(experts, SNAPDRAGON, program="onnx-qdq", quant="int8")
    lfm = {
        "model_type": "lfm2",
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    hybrid = of_config(tmp_path, **lfm, **heads, layer_types=["conv", "full_attention"], conv_L_cache=3)
    assert "recurrences" in found(hybrid, IPHONE, program="coreml")["npu-operators"].message


def test_every_rule_has_its_cases() -> None:
    rules = {rule for rule, *_ in CASES.values()} | {"npu-operators"}
    named = {finding.rule for case in CASES.values() for finding in found(**case[4]).values()}
    assert named <= rules
    assert len(RULES) == len(rules) - 2  # one rule serves asset-limit, app-limit and storage


def test_user_who_chose_the_cpu_hears_nothing_of_the_npu() -> None:
    assert not found(outline(head_dim=80, window=512), PIXEL)
    everywhere = (load_target(name) for name in ("galaxy-s25", "copilot-lunar-lake", "raspberry-pi-5", "browser"))
    assert not any(found(outline(), target) for target in everywhere)


def test_errors_come_first() -> None:
    target = with_packaging(with_npu(SNAPDRAGON, architecture="v68"), asset_limit_bytes=10**7)
    plan = replace(make_plan(outline(), target, quant="int8", format="onnx"), format="onnx-qdq")
    severities = [finding.severity for finding in lint(outline(), target, plan)]
    assert severities == ["error", "warning"]


@pytest.mark.parametrize("version", ["", "v", "x73", "73.5"])
def test_hexagon_of_unknown_version_is_not_taken_for_a_new_one(version: str) -> None:
    target = with_npu(SNAPDRAGON, architecture=version)
    assert "minimum-soc" in found(outline(), target, program="onnx-qdq")


def test_model_without_description_is_still_judged_by_its_sizes(tmp_path: Path) -> None:
    experts = of_config(tmp_path, **(MIXTRAL | {"num_hidden_layers": 32}))
    assert experts.config is None
    assert "asset-limit" in found(experts, PIXEL)


def test_finding_is_plain_data() -> None:
    (finding,) = found(outline(vocab_size=262_144), LINUX).values()
    assert set(finding.to_json()) == {"rule", "severity", "message", "hint"}
    assert isinstance(json.dumps(finding.to_json()), str)
