"""What formats can store, and what a plan makes of a scheme for each."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit import registry
from edgekit.anatomy import anatomy_of
from edgekit.capability import CAPABILITIES, WeightForms
from edgekit.config import AttentionConfig, LayerConfig, ModelConfig, RopeConfig
from edgekit.efficiency import EFFICIENCY
from edgekit.errors import UnsupportedError
from edgekit.lint import lint
from edgekit.outline import Outline
from edgekit.plan import Plan, make_plan
from edgekit.quant import BLOCK_SIZES, PALETTES, RECIPES, CacheFormat, WeightFormat
from edgekit.target import load_target

FORMS = [form for capability in CAPABILITIES.values() for form in (capability.matrices, capability.embedding)]


@pytest.fixture(autouse=True)
def every_format_is_converted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan needs no converter, only that there is one."""
    for format in CAPABILITIES:
        monkeypatch.setitem(registry.CONVERTERS, format, registry.CONVERTERS.get(format, ""))


def outline(hidden: int = 576, intermediate: int = 1536, **changes: Any) -> Outline:
    attention = AttentionConfig(heads=9, kv_heads=3, head_dim=64, scale=0.125)
    values: dict[str, Any] = {"vocab_size": 49_152, "context": 8192, "tied_embeddings": True} | changes
    config = ModelConfig(
        model_type="llama", hidden_size=hidden, intermediate_size=intermediate, attention=attention,
        layers=(LayerConfig(RopeConfig(1e4, 64)),) * 4, norm_eps=1e-5, **values,
    )  # fmt: skip
    return Outline("tiny", anatomy_of(config), config)


def plan_for(format: str, target: str = "iphone-16", **asked: Any) -> Plan:
    return make_plan(outline(**asked.pop("model", {})), load_target(target), format=format, **asked)


formats = st.builds(WeightFormat, st.sampled_from([2, 4, 8]), st.sampled_from(BLOCK_SIZES), st.booleans())


@given(st.sampled_from(FORMS), formats, st.integers(1, 4096))
def test_nearest_form_can_be_stored_and_is_no_coarser(forms: WeightForms, form: WeightFormat, columns: int) -> None:
    found = forms.nearest(form, columns)
    assert found.bits >= form.bits
    assert found.is_float or found.row_scaled or forms.takes(found, columns)
    if forms.takes(form, columns):
        assert found == form


@given(st.sampled_from(FORMS), formats, st.integers(1, 4096))
def test_blocks_divide_rows_where_they_must(forms: WeightForms, form: WeightFormat, columns: int) -> None:
    found = forms.nearest(form, columns)
    if forms.whole_blocks and found.block_size:
        assert columns % found.block_size == 0


def test_every_format_has_a_capability_and_an_efficiency() -> None:
    assert set(CAPABILITIES) == set(EFFICIENCY)
    assert set(registry.CONVERTERS) <= set(CAPABILITIES)


@pytest.mark.parametrize("format", ["executorch", "coreml", "coreai"])
@pytest.mark.parametrize("quant", ["int8", "int4", "int4-mixed", "fp32"])
def test_schemes_keep_their_bits_in_every_format(format: str, quant: str) -> None:
    weights = plan_for(format, quant=quant).weights
    same = make_plan(outline(), load_target("linux-x86-64"), quant=quant).weights
    for role, weight in same.items():
        if weight.form_is_blocks and role != "embedding":
            assert weights[role].format.bits == weight.format.bits, role


def test_executorch_blocks_are_symmetric_and_divide_rows_with_a_note() -> None:
    plan = plan_for("executorch", quant="int4-block128", target="galaxy-s24")
    assert plan.weights["layers.0.qkv"].format == WeightFormat(4, 64, bfloat16_scales=True)
    assert plan.weights["layers.0.down"].format == WeightFormat(4, 128, bfloat16_scales=True)
    assert any("4 bits in blocks of 64 without zero points instead of" in note for note in plan.notes)


def test_executorch_keeps_a_tied_head_a_second_time() -> None:
    plan = plan_for("executorch", quant="int4", target="galaxy-s24")
    embedding, head = plan.weights["embedding"], plan.weights["head"]
    assert embedding.shape == head.shape
    assert embedding.format == WeightFormat(8, row_scaled=True)
    assert head.format == WeightFormat(4, 32, bfloat16_scales=True)
    assert plan.memory.weights_by_kind["head"] == head.size_bytes
    assert plan.memory.weights_bytes == sum(weight.size_bytes for weight in plan.weights.values())
    assert plan.memory.unread_bytes > 0, "of the embedding only some rows are read"
    assert lint(outline(), load_target("galaxy-s24"), plan) is not None, "rules know the second head"
    assert "head" not in plan_for("coreai", quant="int4").weights


def test_programs_in_half_precision_keep_halves() -> None:
    for format in ("coreml", "coreai"):
        plan = plan_for(format, quant="int4")
        assert plan.cache is CacheFormat.FLOAT16
        assert plan.weights["layers.0.attention_norm"].format.bits == 16
        assert plan.accuracy_level == 0
    assert plan_for("coreai", quant="fp32").cache is CacheFormat.FLOAT32
    with pytest.raises(UnsupportedError, match="can't keep keys and values as float32"):
        plan_for("coreai", quant="int4", cache=CacheFormat.FLOAT32)


@pytest.mark.parametrize(
    ("format", "quant", "reason"),
    [("executorch", "keep", "can't carry a checkpoint's blocks over"), ("executorch", "fp16", "half precision")],
)  # fmt: skip
def test_scheme_that_a_format_cant_express_is_refused_with_what_can(format: str, quant: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        plan_for(format, quant=quant)
    assert "--quant fp32, int8, " in str(caught.value.hint)
    assert f"{quant}," not in str(caught.value.hint)


def test_bits_that_a_format_lacks_are_refused(tmp_path: Any) -> None:
    recipe = tmp_path / "two.toml"
    recipe.write_text("bits = 4\nblock_size = 32\n[[overrides]]\nroles = ['down']\nbits = 2\n", encoding="utf-8")
    with pytest.raises(UnsupportedError, match="stores no weights of 2 bits, but of 4, 8"):
        plan_for("executorch", quant=str(recipe))
    assert plan_for("coreml", quant=str(recipe)).weights["layers.0.down"].format.bits == 2


@pytest.mark.parametrize("target", ["raspberry-pi-5", "browser", "galaxy-s24"])
def test_format_that_the_target_does_not_take_is_refused_with_those_it_takes(target: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{target} does not take coreml programs") as caught:
        plan_for("coreml", target=target)
    assert f"it takes {', '.join(load_target(target).formats)}" in str(caught.value.hint)


def test_contexts_keep_to_the_steps_of_core_ml() -> None:
    assert plan_for("coreml", model={"context": 1000}).context == 992
    with pytest.raises(Exception, match="coreml programs take multiples of 32"):
        plan_for("coreml", context=1000)


@pytest.mark.parametrize("format", ["executorch", "coreml", "coreai"])
@pytest.mark.parametrize("quant", [name for name in RECIPES if name not in ("keep", "fp16")])
def test_plan_is_plain_data_for_every_scheme(format: str, quant: str) -> None:
    values = plan_for(format, quant=quant).to_json()
    assert (values["format"], values["fits"]) == (format, "yes")
    assert values["speed"]["decode_tokens_per_s"] > 0
    shapes = anatomy_of(outline().config).weights.values()  # type: ignore[arg-type]
    assert values["memory"]["weights_bytes"] >= sum(prod(weight.shape) for weight in shapes) * 4 // 8


@pytest.mark.parametrize("format", ["onnx", "executorch"])
def test_palettes_are_for_formats_with_tables(format: str) -> None:
    assert CAPABILITIES[format].obstacle(PALETTES["palette6"]) == "stores no palettes"
    assert not CAPABILITIES["coreml"].obstacle(PALETTES["palette6"])


def test_weights_over_a_flatbuffer_are_refused_before_any_work() -> None:
    """Two thousand million weights of 8 bits; what litert-torch writes itself may be longer."""
    large, device = outline(hidden=4096, intermediate=118_000), load_target("linux-x86-64")
    with pytest.raises(
        UnsupportedError, match=r"litert programs hold up to 2,080 MB of int8 weights, this model has 6,"
    ):
        make_plan(large, device, format="litert", quant="int8")
    assert make_plan(large, device, format="litert", quant="fp32").memory.weights_bytes > 2**31
    assert make_plan(large, device, format="executorch", quant="int8").memory.weights_bytes > 2**31
