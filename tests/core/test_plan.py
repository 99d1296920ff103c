"""The plan: what it decides, what it notes, and that its sums are those of the files that are written."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.alternatives import what_would_fit
from edgekit.config import AttentionConfig, LayerConfig, ModelConfig, RopeConfig
from edgekit.converters.onnx_decoder import emit_decoder
from edgekit.errors import PlanError, UnsupportedError
from edgekit.outline import outline_of
from edgekit.plan import Plan, make_plan
from edgekit.plan_frame import DEFAULT_CONTEXT
from edgekit.quant import RECIPES, CacheFormat, WeightFormat
from edgekit.registry import CONVERTERS
from edgekit.scheme_choice import AUTO_MEMORY_PART, AUTO_TOKENS_PER_S
from edgekit.source import Provenance, Source, StoredBlocks, TokenizerFiles, part_shapes
from edgekit.target import Target, load_target

LINUX = load_target("linux-x86-64")


@dataclass(frozen=True)
class Stored:
    """A tensor that has a shape and nothing to read: a plan looks no further."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"
    size_bytes: int = 0
    exact_format: WeightFormat | None = None

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        raise AssertionError("a plan reads no weights")

    def read_blocks(self, start: int, stop: int) -> StoredBlocks:
        raise AssertionError("a plan reads no weights")


def model(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **changes: Any) -> ModelConfig:
    attention = AttentionConfig(heads, kv_heads, hidden // heads, 0.1, qkv_bias=changes.pop("bias", False))
    values: dict[str, Any] = {"vocab_size": 32_000, "context": 8192, "norm_eps": 1e-6} | changes
    return ModelConfig(
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        attention=attention,
        layers=(LayerConfig(RopeConfig(1e4, hidden // heads)),) * layers,
        **values,
    )


def source_of(config: ModelConfig, kinds: dict[str, tuple[str, WeightFormat | None]] | None = None) -> Source:
    """A checkpoint of that shape; `kinds` gives some roles a GGUF type."""
    parts = {
        role: (Stored(role, shape, *(("BF16", 0, None) if role not in (kinds or {}) else stored(kinds, role))),)
        for role, shape in part_shapes(config).items()
    }
    provenance = Provenance("gguf" if kinds else "safetensors", "x", None, None)
    return Source(config, TokenizerFiles("{}", None, (), None), parts, provenance, ())


def stored(kinds: Any, role: str) -> tuple[str, int, WeightFormat | None]:
    return kinds[role][0], 0, kinds[role][1]


SMOLLM2_135M = model(30, 576, 1536, 9, 3, vocab_size=49_152, tied_embeddings=True)
LLAMA_1B = model(16, 2048, 8192, 32, 8, vocab_size=128_256, context=131_072, tied_embeddings=True)
LLAMA_8B = model(32, 4096, 14_336, 32, 8, vocab_size=128_256, context=131_072)


# ---- The known devices and three known shapes: a change here is meant, or it is a mistake ----


@pytest.mark.parametrize(
    ("target", "config", "quant", "fits"),
    [
        ("iphone-16", SMOLLM2_135M, "int8", "yes"),
        ("iphone-16", LLAMA_1B, "int4-mixed", "yes"),
        ("iphone-16", LLAMA_8B, "int4-mixed", "no"),
        ("linux-x86-64", SMOLLM2_135M, "int8", "yes"),
        ("linux-x86-64", LLAMA_1B, "int4-mixed", "yes"),
        ("linux-x86-64", LLAMA_8B, "int4-mixed", "yes"),
        ("pixel-9-pro", SMOLLM2_135M, "int8", "yes"),
        ("pixel-9-pro", LLAMA_1B, "int8", "yes"),
        ("pixel-9-pro", LLAMA_8B, "int4-mixed", "yes"),
        ("raspberry-pi-5", SMOLLM2_135M, "int8", "yes"),
        ("raspberry-pi-5", LLAMA_1B, "int4-mixed", "yes"),
        ("raspberry-pi-5", LLAMA_8B, "int4-mixed", "yes"),
    ],
)
def test_plan_of_known_models(target: str, config: ModelConfig, quant: str, fits: str) -> None:
    plan = make_plan(source_of(config), load_target(target))
    assert (plan.quant, plan.fits, plan.format) == (quant, fits, "onnx")


# ---- auto ----


def device(*, int8: bool = True, formats: tuple[Any, ...] = LINUX.formats, **memory: int) -> Target:
    cpu = LINUX.cpu if int8 else replace(LINUX.cpu, instruction_sets=("neon",))
    return replace(LINUX, memory=replace(LINUX.memory, **memory), cpu=cpu, formats=formats)


def weights_of(quant: str) -> int:
    return make_plan(source_of(SMOLLM2_135M), LINUX, quant=quant).memory.weights_bytes


def test_auto_takes_8_bits_up_to_its_part_of_the_memory() -> None:
    enough = round(weights_of("int8") / AUTO_MEMORY_PART) + 1
    assert make_plan(source_of(SMOLLM2_135M), device(app_bytes=enough)).quant == "int8"
    smaller = make_plan(source_of(SMOLLM2_135M), device(app_bytes=enough - 100))
    assert smaller.quant == "int4-mixed"
    assert smaller.notes[0].startswith("auto: int4-mixed, since 8 bits would take")


def test_auto_takes_4_bits_where_8_would_decode_too_slowly() -> None:
    speed = make_plan(source_of(SMOLLM2_135M), LINUX, quant="int8").speed.decode_tokens_per_s
    for factor, quant in ((1.1, "int8"), (0.4, "int4-mixed")):
        bandwidth = round(LINUX.memory.bandwidth_bytes_per_s * AUTO_TOKENS_PER_S / speed * factor)
        assert make_plan(source_of(SMOLLM2_135M), device(bandwidth_bytes_per_s=bandwidth)).quant == quant


# ---- Context ----


@pytest.mark.parametrize(("longest", "expected"), [(8192, DEFAULT_CONTEXT), (1024, 1024), (3, 3)])
def test_context_is_the_models_own_up_to_the_default(longest: int, expected: int) -> None:
    plan = make_plan(source_of(replace(SMOLLM2_135M, context=longest)), LINUX)
    assert plan.context == expected
    assert plan.notes == ()


@pytest.mark.parametrize("context", [0, -1, 8193])
def test_impossible_context_is_refused_with_the_range(context: int) -> None:
    with pytest.raises(PlanError, match=f"a context of {context} is not possible: the model has 1 to 8192") as caught:
        make_plan(source_of(SMOLLM2_135M), LINUX, context=context)
    assert "--context 4096" in str(caught.value.hint)


def test_asked_context_is_kept_even_where_it_does_not_fit() -> None:
    plan = make_plan(source_of(LLAMA_8B), LINUX, context=131_072)
    assert (plan.context, plan.fits) == (131_072, "no")
    assert "an app on linux-x86-64 may use 6,000 MB" in plan.notes[-1]


def test_context_is_reduced_with_a_note_until_it_fits() -> None:
    roomy = make_plan(source_of(SMOLLM2_135M), LINUX, quant="int8")
    tight = device(app_bytes=roomy.memory.total_bytes - 1)
    plan = make_plan(source_of(SMOLLM2_135M), tight, quant="int8", cache=CacheFormat.FLOAT32)
    assert (plan.context, plan.fits) == (DEFAULT_CONTEXT // 2, "yes")
    assert plan.notes == (f"context 2048 instead of {DEFAULT_CONTEXT}, so that the cache fits beside the weights",)


def test_cache_is_narrowed_with_a_note_before_the_context_is_shortened() -> None:
    source = source_of(SMOLLM2_135M)
    roomy = make_plan(source, LINUX, quant="int8")
    assert roomy.cache is CacheFormat.FLOAT32
    for lacking, cache in ((1, CacheFormat.FLOAT16), (roomy.memory.kv_bytes // 2 + 1, CacheFormat.INT8)):
        plan = make_plan(source, device(app_bytes=roomy.memory.total_bytes - lacking), quant="int8")
        assert (plan.cache, plan.context, plan.fits) == (cache, DEFAULT_CONTEXT, "yes")
        assert plan.notes == (f"keys and values as {cache} instead of float32, so that they fit beside the weights",)
        assert plan.needs_texts == (cache is CacheFormat.INT8)


def test_half_precision_programs_keep_nothing_wider() -> None:
    source = source_of(SMOLLM2_135M)
    assert make_plan(source, LINUX, quant="fp16").cache is CacheFormat.FLOAT16
    with pytest.raises(UnsupportedError):
        make_plan(source, LINUX, quant="fp16", cache=CacheFormat.FLOAT32)


def test_weights_that_never_fit_are_planned_with_the_numbers() -> None:
    plan = make_plan(source_of(LLAMA_8B), device(app_bytes=1_000_000_000), quant="int8")
    assert (plan.fits, plan.context) == ("no", DEFAULT_CONTEXT)  # a shorter one would not help
    assert f"needs {plan.memory.total_bytes / 1e6:,.0f} MB" in plan.notes[-1]
    assert plan.to_json()["fits"] == "no"


# ---- Formats and blocks ----


def test_unknown_format_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="format 'tflite' is not known") as caught:
        make_plan(source_of(SMOLLM2_135M), LINUX, format="tflite")
    assert "onnx" in str(caught.value.hint)


def test_recipe_file_with_the_name_of_a_recipe_is_not_taken_for_it(tmp_path: Path) -> None:
    """NPU programs are written with the recipe, and would leave out what the file asks for."""
    path = tmp_path / "int8.toml"
    path.write_text('bits = 8\nblock_size = 64\nscaling = "awq"\n', encoding="utf-8")
    with pytest.raises(UnsupportedError, match="not written with the recipe file int8 but int8, int4"):
        make_plan(
            source_of(SMOLLM2_135M), load_target("copilot-snapdragon-x-elite"), format="onnx-qdq", quant=str(path)
        )


def test_scheme_of_an_npus_plan_is_planned_again() -> None:
    """As where the longest context that fits is looked for."""
    npu = load_target("copilot-snapdragon-x-elite")
    plan = make_plan(source_of(SMOLLM2_135M), npu, format="onnx-qdq", quant="int8")
    again = make_plan(source_of(SMOLLM2_135M), npu, format="onnx-qdq", quant=plan.scheme)
    assert (again.weights, again.memory) == (plan.weights, plan.memory)
    small = make_plan(
        source_of(SMOLLM2_135M), npu, format="onnx-qdq", quant="int8", context=4096, budget_bytes=400_000_000
    )
    assert small.fits == "no"
    assert "--context" in what_would_fit(outline_of(source_of(SMOLLM2_135M)), npu, small).hint()


def test_target_without_a_format_that_is_converted_to_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CONVERTERS, "litert")
    with pytest.raises(UnsupportedError, match="takes litert"):
        make_plan(source_of(SMOLLM2_135M), device(formats=("litert",)))


def test_second_choice_of_format_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CONVERTERS, "litert")
    plan = make_plan(source_of(SMOLLM2_135M), device(formats=("litert", "onnx")), quant="int8")
    assert plan.notes == ("linux-x86-64 prefers litert, which is not converted to yet: onnx instead",)


@pytest.mark.parametrize(
    ("hidden", "embedding", "other"),
    [(64, WeightFormat(4, 64), WeightFormat(4, 64)), (80, WeightFormat(4, 16), WeightFormat(4, 64)),
     (72, WeightFormat(32), WeightFormat(4, 64)), (8, WeightFormat(32), WeightFormat(4, 16))],
)  # fmt: skip
def test_block_size_falls_back_with_a_note(hidden: int, embedding: WeightFormat, other: WeightFormat) -> None:
    plan = make_plan(source_of(model(1, hidden, hidden, 2, 1)), LINUX, quant="int4-symmetric-block128")
    assert plan.weights["embedding"].format == embedding
    assert plan.weights["layers.0.qkv"].format == other
    named = f"in blocks of {embedding.block_size}" if embedding.block_size else "32 bits"
    assert any("embedding" in note and f": rows of {hidden} take" in note and named in note for note in plan.notes)


def test_no_note_where_nothing_departs() -> None:
    assert make_plan(source_of(SMOLLM2_135M), LINUX, quant="int4").notes == ()


@pytest.mark.parametrize(("level", "int8", "quant"), [(4, True, "int8"), (0, False, "int8"), (0, True, "fp32")])
def test_int8_multiplication_is_for_blocks_on_targets_that_have_it(level: int, int8: bool, quant: str) -> None:
    plan = make_plan(source_of(SMOLLM2_135M), device(int8=int8), quant=quant)
    assert plan.accuracy_level == level


# ---- GGUF ----

Q4_0, Q4_1 = ("Q4_0", WeightFormat(4, 32)), ("Q4_1", WeightFormat(4, 32, offset=True))
Q6_K, Q8_0, IQ2_XS = ("Q6_K", WeightFormat(8, 16)), ("Q8_0", WeightFormat(8, 32)), ("IQ2_XS", None)


def test_keep_carries_exact_formats_and_requantizes_the_rest() -> None:
    kinds = {"layers.0.qkv": Q4_0, "layers.1.qkv": Q4_1, "layers.0.down": Q8_0, "head": IQ2_XS}
    plan = make_plan(source_of(model(2, 64, 128, 2, 1), kinds), LINUX)
    assert plan.quant == "keep"
    carried = {role: weight.format for role, weight in plan.weights.items() if weight.carried}
    assert carried == {role: kind[1] for role, kind in kinds.items() if kind[1]}
    assert plan.weights["head"].format == RECIPES["int8"].format
    assert plan.notes == (
        "keep: Q4_0, Q8_0, Q4_1 blocks are carried over without loss; BF16, IQ2_XS tensors are rounded to 8 bits",
    )


def test_other_schemes_carry_blocks_of_their_own_width_only() -> None:
    source = source_of(model(1, 64, 128, 2, 1), {"layers.0.qkv": Q4_0, "layers.0.gate_up": Q4_1, "layers.0.down": Q8_0})
    carried = {
        quant: {role for role, weight in make_plan(source, LINUX, quant=quant).weights.items() if weight.carried}
        for quant in ("int4", "int8", "fp32")
    }
    assert carried == {"int4": {"layers.0.qkv"}, "int8": {"layers.0.down"}, "fp32": set()}


def packed_of(*parts: tuple[int, tuple[str, WeightFormat | None]]) -> Source:
    """A model whose query, key and value together have 128 rows of 64, stored as these parts: rows and type."""
    source = source_of(model(1, 64, 128, 2, 1), {"layers.0.qkv": Q4_0})
    tensors = tuple(Stored(str(index), (rows, 64), kind[0], 0, kind[1]) for index, (rows, kind) in enumerate(parts))
    return replace(source, parts={**source.parts, "layers.0.qkv": tensors})


def test_parts_of_different_types_are_kept_in_a_matrix_each() -> None:
    weight = make_plan(packed_of((64, Q4_1), (32, Q4_1), (32, Q6_K)), LINUX, quant="keep").weights["layers.0.qkv"]
    assert weight.carried
    assert [(piece.shape, piece.format) for piece in weight.matrices] == [((96, 64), Q4_1[1]), ((32, 64), Q6_K[1])]
    assert weight.size_bytes == 96 * 2 * (16 + 8) + 32 * 4 * (16 + 4)
    assert make_plan(packed_of((128, Q6_K)), LINUX).weights["layers.0.qkv"].pieces == ()


def test_part_that_no_format_carries_is_requantized_beside_those_that_are_carried() -> None:
    weight = make_plan(packed_of((64, Q4_0), (32, IQ2_XS), (32, Q4_0)), LINUX, quant="keep").weights["layers.0.qkv"]
    assert not weight.carried
    assert [(piece.carried, piece.format.bits) for piece in weight.matrices] == [(True, 4), (False, 8), (True, 4)]


def test_parts_of_different_types_are_not_carried_by_a_scheme_that_names_bits() -> None:
    weight = make_plan(packed_of((64, Q4_0), (64, Q8_0)), LINUX, quant="int8").weights["layers.0.qkv"]
    assert (weight.carried, weight.matrices) == (False, (weight,))


# ---- Calibration ----


def gptq(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(f'rounding = "gptq"\n{text}', encoding="utf-8")
    return str(path)


def test_roles_that_are_rounded_are_calibrated_with_a_note_on_the_time() -> None:
    untied, tied = (
        make_plan(source_of(model(2, 64, 128, 2, 1, tied_embeddings=tied)), LINUX, quant="int4-mixed")
        for tied in (False, True)
    )
    layers = {f"layers.{index}.{role}" for index in (0, 1) for role in ("qkv", "output", "gate_up", "down")}
    assert untied.calibrated == layers | {"head"}
    assert tied.calibrated == layers | {"embedding"}
    said = r"int4-mixed rounds by texts that the model first writes: about \d+ s"
    pattern = said + r" \([\d.e-]+ s a layer\) and 0\.\d GB here \(modelled\); int4 takes .*"
    assert any(re.fullmatch(pattern, note) for note in untied.notes)
    scaled = make_plan(source_of(SMOLLM2_135M), LINUX, quant="int8-scaled")
    assert not scaled.calibrated
    assert scaled.needs_texts
    assert len(scaled.scaled) == 4 * 30
    assert any(note.startswith("int8-scaled scales by texts that the model first writes: ") for note in scaled.notes)
    assert not make_plan(source_of(SMOLLM2_135M), LINUX, quant="int4").calibrated


def test_carried_blocks_and_floats_are_not_calibrated(tmp_path: Path) -> None:
    source = source_of(model(1, 64, 128, 2, 1), {"layers.0.qkv": Q4_0})
    recipe = gptq(tmp_path, '[[overrides]]\nroles = ["head"]\nbits = 32')
    calibrated = make_plan(source, LINUX, quant=recipe).calibrated
    assert calibrated == {"layers.0.output", "layers.0.gate_up", "layers.0.down"}


def test_rounding_of_nothing_is_noted(tmp_path: Path) -> None:
    source = source_of(model(1, 64, 128, 2, 1), {"layers.0.qkv": Q4_0})
    recipe = gptq(tmp_path, 'bits = 32\n[[overrides]]\nroles = ["qkv"]\nbits = 4\nblock_size = 32')
    plan = make_plan(source, LINUX, quant=recipe)
    assert not plan.calibrated
    assert plan.notes == ("mine asks for gptq rounding, but no weight is left to round by it",)


# ---- Sums ----


def written_bytes(source: Source, plan: Plan) -> int:
    emitted = emit_decoder(
        source.config,
        plan.weights,
        context=plan.context,
        activation_bits=plan.scheme.activation_bits,
        accuracy_level=plan.accuracy_level,
        data_file="x",
    )
    return sum(regions.size_bytes for matrices in emitted.weights.values() for regions in matrices)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 200), st.sampled_from([(1, 1), (4, 2)])),
    quant=st.sampled_from(sorted(RECIPES)),
    flags=st.fixed_dictionaries(
        {"tied_embeddings": st.booleans(), "bias": st.booleans(), "norm": st.sampled_from(["pre", "sandwich"])}
    ),
)
def test_planned_weight_bytes_are_those_of_the_written_regions(sizes: Any, quant: str, flags: Any) -> None:
    layers, width, intermediate, heads = sizes
    config = model(layers, width * 8, intermediate, *heads, vocab_size=100, context=64, **flags)
    source = source_of(config)
    plan = make_plan(source, LINUX, quant=quant)
    assert plan.memory.weights_bytes == written_bytes(source, plan)
    lines = plan.memory
    weights_bytes = lines.weights_bytes + lines.packed_bytes
    rest_bytes = lines.kv_bytes + lines.activations_bytes + lines.runtime_bytes + lines.loading_bytes
    assert lines.total_bytes == weights_bytes + rest_bytes - lines.unread_bytes
    assert lines.weights_bytes == sum(lines.weights_by_kind.values())
    assert lines.kv_bytes == sum(lines.kv_by_kind.values())


def test_cache_bytes_grow_with_the_context() -> None:
    one, two = (make_plan(source_of(SMOLLM2_135M), LINUX, context=context).memory.kv_bytes for context in (1, 2))
    assert two == 2 * one == 2 * (2 * 3 * 64 * 4 * 30)


@pytest.mark.parametrize(("format", "copies"), [("onnx", 0), ("executorch", 2)])
def test_scores_of_the_whole_context_are_counted_where_they_are_kept(format: str, copies: int) -> None:
    source, chunk = source_of(SMOLLM2_135M), 128
    one, two = (make_plan(source, LINUX, format=format, context=context).memory for context in (1024, 2048))
    assert two.activations_bytes - one.activations_bytes == copies * 9 * chunk * 1024 * 4


def test_decode_is_faster_with_fewer_bytes_and_more_bandwidth() -> None:
    source = source_of(LLAMA_1B)
    slow, fast = (make_plan(source, LINUX, quant=quant).speed for quant in ("int8", "int4"))
    assert fast.decode_tokens_per_s > slow.decode_tokens_per_s
    twice = make_plan(source, device(bandwidth_bytes_per_s=2 * LINUX.memory.bandwidth_bytes_per_s), quant="int8").speed
    # attention's arithmetic and the small operators of a layer take their time whatever the bandwidth
    assert 1.5 * slow.decode_tokens_per_s < twice.decode_tokens_per_s < 2 * slow.decode_tokens_per_s


def test_untied_embedding_costs_no_decode_time() -> None:
    tied = make_plan(source_of(LLAMA_1B), LINUX, quant="int8")
    untied = make_plan(source_of(replace(LLAMA_1B, tied_embeddings=False)), LINUX, quant="int8")
    assert untied.memory.weights_bytes > tied.memory.weights_bytes
    assert untied.speed.decode_tokens_per_s == tied.speed.decode_tokens_per_s
    assert untied.speed.prefill_tokens_per_s == tied.speed.prefill_tokens_per_s
