"""What holds for every plan: of real and of made-up models, on every device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.alternatives import Limits, Request, plans_within, rank, what_would_fit
from edgekit.anatomy import Anatomy, LayerCache, Weight
from edgekit.capability import CAPABILITIES
from edgekit.efficiency import EFFICIENCY
from edgekit.errors import PlanError, UnsupportedError
from edgekit.memory_plan import cache_bytes
from edgekit.outline import Outline
from edgekit.plan import LEAST_CONTEXT, Plan, make_plan
from edgekit.quant import RECIPES, CacheFormat
from edgekit.target import Target, list_targets, load_target

DEVICES = list_targets()
LINUX = load_target("linux-x86-64")
ONNX = EFFICIENCY["onnx"]
SCHEMES = tuple(name for name, scheme in RECIPES.items() if not scheme.keep)
FEWER_BITS = [("fp32", "int8"), ("fp32", "fp16"), ("fp16", "int8"), ("int8", "int4"), ("int4", "int4-block64")]
checked = settings(max_examples=30, deadline=None, derandomize=True)


@st.composite
def outlines(draw: st.DrawFn) -> Outline:
    """Any decoder: dense or with experts, with any mix of layers."""
    hidden, layers = 64 * draw(st.integers(1, 80)), draw(st.integers(1, 12))
    vocabulary, tied = draw(st.integers(1000, 200_000)), draw(st.booleans())
    weights = {"embedding": Weight("embedding", "embedding", (vocabulary, hidden), 1.0 if tied else 1 / vocabulary)}
    if not tied:
        weights["head"] = Weight("head", "head", (vocabulary, hidden))
    caches = []
    for layer in range(layers):
        experts, picked = draw(st.sampled_from([(1, 1), (8, 2), (64, 6)]))
        width, name = 64 * draw(st.integers(1, 100)), f"layers.{layer}"
        kind: Any = "experts" if experts > 1 else "feed_forward"
        weights |= {
            f"{name}.norms": Weight("other", "", (2 * hidden,)),
            f"{name}.qkv": Weight("attention", "qkv", (2 * hidden, hidden)),
            f"{name}.gate_up": Weight(kind, "gate_up", (experts * 2 * width, hidden), picked / experts),
            f"{name}.down": Weight(kind, "down", (experts * hidden, width), picked / experts),
        }
        caches.append(draw(layer_caches()))
    context = draw(st.sampled_from([512, 4096, 131_072]))
    anatomy = Anatomy("made-up", vocabulary, hidden, context, 4 * hidden, weights, tuple(caches))
    return Outline("made-up", anatomy, None)


def layer_caches() -> st.SearchStrategy[LayerCache]:
    elements = st.integers(1, 40).map(lambda count: 64 * count)
    return st.one_of(
        st.builds(LayerCache, st.just("full"), elements),
        st.builds(LayerCache, st.just("sliding"), elements, st.sampled_from([128, 1024])),
        st.builds(LayerCache, st.just("latent"), elements),
        st.builds(LayerCache, st.just("linear"), state=elements),
        st.just(LayerCache("shared")),
    )


devices = st.sampled_from(DEVICES)
schemes = st.sampled_from(SCHEMES)


@checked
@given(outlines(), devices, schemes)
def test_totals_are_the_sums_of_their_lines_and_fits_is_the_budgets_verdict(
    outline: Outline, target: Target, scheme: str
) -> None:
    plan = make_plan(outline, target, quant=scheme)
    memory = plan.memory
    lines = (memory.weights_bytes, memory.packed_bytes, memory.kv_bytes, memory.activations_bytes, memory.runtime_bytes)
    assert memory.total_bytes == sum(lines) + memory.loading_bytes - memory.unread_bytes
    assert memory.weights_bytes == sum(memory.weights_by_kind.values())
    assert memory.weights_bytes == sum(weight.size_bytes for weight in plan.weights.values())
    assert memory.kv_bytes == sum(memory.kv_by_kind.values())
    assert memory.budget_bytes == target.memory.app_bytes
    assert (plan.fits == "yes") == (memory.total_bytes <= memory.budget_bytes)


@checked
@given(outlines(), devices, schemes, st.integers(1, 512), st.integers(1, 512))
def test_more_context_never_takes_less_memory_nor_decodes_faster(
    outline: Outline, target: Target, scheme: str, one: int, other: int
) -> None:
    short, long = (
        make_plan(outline, target, quant=scheme, context=context, cache=cache_of(scheme), format="onnx")
        for context in sorted((one, other))
    )
    assert short.memory.total_bytes <= long.memory.total_bytes
    assert short.speed.decode_tokens_per_s >= long.speed.decode_tokens_per_s


def cache_of(scheme: str) -> CacheFormat:
    return CacheFormat.FLOAT16 if scheme == "fp16" else CacheFormat.FLOAT32


@checked
@given(outlines(), devices, st.sampled_from(FEWER_BITS))
def test_a_smaller_scheme_never_takes_more_memory(outline: Outline, target: Target, pair: tuple[str, str]) -> None:
    large, small = (make_plan(outline, target, quant=scheme, context=512, format="onnx") for scheme in pair)
    assert small.memory.total_bytes <= large.memory.total_bytes


@checked
@given(outlines(), schemes)
def test_ranking_puts_what_fits_first_and_then_what_is_faster(outline: Outline, scheme: str) -> None:
    plans = [make_plan(outline, target, quant=scheme) for target in DEVICES]
    ranked = rank(plans)
    assert sorted(plan.target for plan in ranked) == sorted(target.id for target in DEVICES)
    assert ranked == rank(reversed(plans))
    keys = [(plan.fits == "yes", plan.speed.decode_tokens_per_s) for plan in ranked]
    assert keys == sorted(keys, reverse=True)


@checked
@given(outlines(), devices)
def test_the_chosen_context_is_the_longest_that_halving_finds(outline: Outline, target: Target) -> None:
    plan = make_plan(outline, target, quant="int4")
    default = min(outline.anatomy.context, 4096)
    if plan.context < default:
        assert f"context {plan.context} instead of {default}, so that the cache fits beside the weights" in plan.notes
        longer = make_plan(outline, target, quant="int4", context=2 * plan.context)
        assert longer.fits == "no"
    elif plan.fits == "no" and default > LEAST_CONTEXT:
        assert make_plan(outline, target, quant="int4", context=LEAST_CONTEXT).fits == "no"


@checked
@given(outlines(), devices, st.sampled_from(SCHEMES))
def test_what_would_fit_fits(outline: Outline, target: Target, scheme: str) -> None:
    plan = make_plan(outline, target, quant=scheme)
    if plan.fits == "yes":
        return
    found = what_would_fit(outline, target, plan)
    if found.scheme:
        assert make_plan(outline, target, quant=found.scheme.quant, context=plan.context).fits == "yes"
    if found.context:
        assert make_plan(outline, target, quant=scheme, context=found.context).fits == "yes"
        if found.context < plan.context:
            assert make_plan(outline, target, quant=scheme, context=found.context + 1).fits == "no"
    if found.target:
        assert make_plan(outline, load_target(found.target), quant=scheme, context=plan.context).fits == "yes"
    assert found.smallest.memory.total_bytes <= plan.memory.total_bytes
    assert found.hint()


@checked
@given(outlines(), devices, st.integers(100, 20_000), st.floats(0.1, 100))
def test_plans_within_limits_keep_to_them(outline: Outline, target: Target, megabytes: int, speed: float) -> None:
    limits = Limits(megabytes * 10**6, speed)
    for plan in plans_within(outline, target, Request(), limits):
        assert plan.memory.total_bytes <= min(megabytes * 10**6, target.memory.app_bytes)
        assert plan.speed.decode_tokens_per_s >= speed


def test_looser_limits_leave_no_less() -> None:
    outline = small_outline()
    tight = plans_within(outline, LINUX, Request(), Limits(400_000_000, 30))
    loose = plans_within(outline, LINUX, Request(), Limits(800_000_000, 15))
    assert {plan.quant for plan in tight} < {plan.quant for plan in loose}
    contexts = {plan.quant: plan.context for plan in loose}
    assert all(plan.context <= contexts[plan.quant] for plan in tight)


def small_outline() -> Outline:
    weights = {
        "embedding": Weight("embedding", "embedding", (32_000, 1024)),
        **{f"layers.{index}.gate_up": Weight("feed_forward", "gate_up", (8192, 1024)) for index in range(16)},
    }
    return Outline(
        "small", Anatomy("made-up", 32_000, 1024, 8192, 8192, weights, (LayerCache("full", 1024),) * 16), None
    )


# ---- The cache, by kind ----


@pytest.mark.parametrize("cache", list(CacheFormat))
def test_cache_bytes_of_each_kind(cache: CacheFormat) -> None:
    size, context = cache.element_bytes, 1000
    scales = cache.scale_bytes(64)
    assert cache_bytes(LayerCache("full", 64), context, cache, whole_windows=False) == 64 * context * size + scales
    sliding = LayerCache("sliding", 64, window=100)
    assert cache_bytes(sliding, context, cache, whole_windows=False) == 64 * 100 * size + scales
    assert cache_bytes(sliding, context, cache, whole_windows=True) == 64 * context * size + scales
    assert cache_bytes(LayerCache("latent", 64), context, cache, whole_windows=False) == 64 * context * size + scales
    assert cache_bytes(LayerCache("linear", state=500), context, cache, whole_windows=True) == 4 * 500
    assert cache_bytes(LayerCache("shared"), context, cache, whole_windows=True) == 0


@pytest.fixture
def int8_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that can keep keys and values in 8 bits."""
    changed = replace(CAPABILITIES["onnx"], caches=(CacheFormat.FLOAT32, CacheFormat.INT8))
    monkeypatch.setattr("edgekit.plan_frame.CAPABILITIES", {"onnx": changed})


def planned(budget_bytes: int, **asked: Any) -> Plan:
    return make_plan(small_outline(), LINUX, quant="int4", budget_bytes=budget_bytes, **asked)


@pytest.mark.usefixtures("int8_cache")
def test_a_smaller_cache_is_taken_before_a_shorter_context() -> None:
    roomy = planned(10**10)
    assert (roomy.cache, roomy.context) == (CacheFormat.FLOAT32, 4096)
    tight = planned(roomy.memory.total_bytes - 1)
    assert (tight.cache, tight.context, tight.fits) == (CacheFormat.INT8, 4096, "yes")
    assert "keys and values as int8 instead of float32, so that they fit beside the weights" in tight.notes
    tighter = planned(tight.memory.total_bytes - 1)
    assert (tighter.cache, tighter.context, tighter.fits) == (CacheFormat.INT8, 2048, "yes")
    assert "context 2048 instead of 4096, so that the cache fits beside the weights" in tighter.notes


@pytest.mark.usefixtures("int8_cache")
def test_an_asked_cache_is_kept() -> None:
    assert planned(10**10, cache=CacheFormat.INT8).cache is CacheFormat.INT8
    assert planned(10**8, cache=CacheFormat.FLOAT32).cache is CacheFormat.FLOAT32
    with pytest.raises(UnsupportedError, match="can't keep keys and values as float16") as caught:
        planned(10**10, cache=CacheFormat.FLOAT16)
    assert "float32, int8" in str(caught.value.hint)


# ---- Contexts in steps ----


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format whose programs have contexts in steps of 384."""
    changed = {"onnx": replace(CAPABILITIES["onnx"], context_multiple=384)}
    monkeypatch.setattr("edgekit.plan_frame.CAPABILITIES", changed)
    monkeypatch.setattr("edgekit.alternatives.CAPABILITIES", changed)


@pytest.mark.usefixtures("steps")
def test_contexts_keep_to_the_formats_steps() -> None:
    roomy = planned(10**10)
    assert roomy.context == 10 * 384
    assert planned(roomy.memory.total_bytes - 1, cache=CacheFormat.FLOAT32).context == 5 * 384
    assert all(plan.context % 384 == 0 for plan in plans_within(small_outline(), LINUX, Request(), Limits(10**9)))
    with pytest.raises(PlanError, match="onnx programs take multiples of 384") as caught:
        planned(10**10, context=1000)
    assert caught.value.hint == "use --context 768"


# ---- Experts ----


def test_all_experts_count_for_memory_and_the_active_ones_for_speed() -> None:
    def mixture(picked: int) -> Plan:
        weights = {
            "embedding": Weight("embedding", "embedding", (1000, 512)),
            "layers.0.gate_up": Weight("experts", "gate_up", (64 * 4096, 512), picked / 64),
        }
        return make_plan(Outline("m", Anatomy("m", 1000, 512, 512, 512, weights, ()), None), LINUX, quant="int8")

    few, many = mixture(2), mixture(64)
    assert few.memory == many.memory
    dense = few.weights["embedding"].size_bytes
    experts = few.weights["layers.0.gate_up"].size_bytes
    assert few.speed.bytes_per_token == pytest.approx(dense + experts / 32, abs=1)
    assert many.speed.bytes_per_token == dense + experts
    assert few.speed.decode_tokens_per_s > many.speed.decode_tokens_per_s


# ---- Requests ----


def test_a_context_beyond_the_model_is_refused_whatever_the_device() -> None:
    for target in DEVICES:
        with pytest.raises(PlanError, match="the model has 1 to 8192"):
            make_plan(small_outline(), target, context=8193)


def test_an_obstacle_is_the_first_note() -> None:
    outline = Outline("x", small_outline().anatomy, None, obstacle="EdgeKit does not convert x yet", notes=("other",))
    assert make_plan(outline, LINUX).notes[:2] == ("EdgeKit does not convert x yet", "other")


def test_a_profiles_default_recipe_is_what_auto_takes() -> None:
    assert make_plan(small_outline(), replace(LINUX, quant="int4-block64")).quant == "int4-block64"
    assert make_plan(small_outline(), replace(LINUX, quant="int4-block64"), quant="int8").quant == "int8"


def test_an_npus_programs_are_planned_with_its_rate_and_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.plan_frame.EFFICIENCY", {"onnx": replace(ONNX, unit="npu")})
    device = load_target("copilot-snapdragon-x-elite")
    assert device.npu
    rates = {}
    for rate in (0, device.cpu.int8_ops_per_s, 4 * device.cpu.int8_ops_per_s):
        plan = make_plan(small_outline(), replace(device, npu=replace(device.npu, int8_ops_per_s=rate)), format="onnx")
        assert plan.provider == "qnn"
        rates[rate] = plan.speed.prefill_tokens_per_s
        assert ("is not known" in plan.speed.basis) == (rate == 0)
    unknown, equal, faster = rates.values()
    assert unknown == equal < faster
    assert make_plan(small_outline(), LINUX).provider == ""
