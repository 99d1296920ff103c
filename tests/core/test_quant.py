"""Quantization schemes: the recipes, and recipe files with every mistake named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import EdgeKitError, PlanError, UnsupportedError
from edgekit.quant import (
    BLOCK_SIZES,
    PALETTES,
    RECIPES,
    ROLES,
    ROUNDINGS,
    SCALINGS,
    CacheFormat,
    Override,
    QuantScheme,
    WeightFormat,
    load_scheme,
    scheme_toml,
)


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load_by_name(name: str) -> None:
    scheme = load_scheme(name)
    assert scheme.name == name
    assert scheme.quantized == (name not in {"fp32", "fp16"})


def test_only_fp16_computes_in_half_precision() -> None:
    assert {name for name, scheme in RECIPES.items() if scheme.activation_bits == 16} == {"fp16"}


@pytest.mark.parametrize("name", ["int5", "INT4", "mine.yaml", ""])
def test_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        load_scheme(name)
    assert repr(name) in caught.value.message
    assert "int4-mixed" in str(caught.value.hint)


def test_empty_file_is_the_default(tmp_path: Path) -> None:
    assert load_scheme(recipe(tmp_path, "")) == QuantScheme("mine", WeightFormat(4, 32, symmetric=False))


def test_file_with_overrides(tmp_path: Path) -> None:
    text = """
    rounding = "gptq"
    bits = 4
    block_size = 128
    symmetric = true
    [[overrides]]
    roles = ["down", "output"]
    layers = "edges"
    bits = 8
    [[overrides]]
    roles = ["head"]
    bits = 32
    """
    scheme = load_scheme(recipe(tmp_path, text))
    assert scheme.format == WeightFormat(4, 128)
    assert scheme.rounding == "gptq"
    assert scheme.overrides == (
        Override(("down", "output"), WeightFormat(8, 128), "edges"),
        Override(("head",), WeightFormat(32)),
    )


def test_override_of_a_float_scheme_gets_blocks(tmp_path: Path) -> None:
    scheme = load_scheme(recipe(tmp_path, 'bits = 32\n[[overrides]]\nroles = ["qkv"]\nbits = 4\n'))
    assert scheme.format == WeightFormat(32)
    assert scheme.overrides[0].format == WeightFormat(4, 32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bits = ", "not valid TOML"),
        ("bit = 4", "the key 'bit' is not known"),
        ("bits = 5", "5 bits are not handled"),
        ('bits = "4"', "bits is '4', expected int"),
        ("bits = true", "bits is True, expected int"),
        ("block_size = 48", "block size 48 is not handled"),
        ("block_size = 0", "block size 0 is not handled"),
        ("symmetric = 1", "symmetric is 1, expected bool"),
        ('rounding = "up"', "rounding is 'up'"),
        ('scaling = "up"', "scaling is 'up'"),
        ("rounding = [1]", "rounding is [1]"),
        ('rounding = "gptq"\nbits = 32', "all weights are floats, which gptq does nothing for"),
        ('scaling = "awq"\nbits = 32', "all weights are floats, which awq does nothing for"),
        ("bits = 32\nblock_size = 64", "mine.toml: 32 bits are floats and have no block size"),
        ("bits = 3", "mine.toml: 3 bits are not handled"),
        ("overrides = 3", "overrides must be a list of tables"),
        ("overrides = [3]", "overrides must be a list of tables"),
        ("[[overrides]]\nbits = 8", "roles is []"),
        ('[[overrides]]\nroles = "qkv"\nbits = 8', "roles is 'qkv'"),
        ('[[overrides]]\nroles = ["qvk"]\nbits = 8', "roles is ['qvk']"),
        ("[[overrides]]\nroles = [[1]]\nbits = 8", "roles is [[1]]"),
        ('[[overrides]]\nroles = ["qkv"]\nlayers = "odd"', "layers is 'odd'"),
        ('[[overrides]]\nroles = ["qkv"]\nlayers = ["all"]', "layers is ['all']"),
        ('[[overrides]]\nroles = ["qkv"]\nlayers = [1]', "layers is [1], layer_count 0"),
        ('layer_count = 4\n[[overrides]]\nroles = ["qkv"]\nlayers = [3, 4]', "layers is [3, 4], layer_count 4"),
        ('layer_count = 4\n[[overrides]]\nroles = ["qkv"]\nlayers = [true]', "layers is [True]"),
        ("layer_count = 4.0", "layer_count is 4.0"),
        ('[[overrides]]\nroles = ["qkv"]\nscale = 1', "the key 'scale' is not known"),
    ],
)
def test_mistake_in_a_file_is_named(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(EdgeKitError) as caught:
        load_scheme(recipe(tmp_path, text))
    assert words in caught.value.message


@st.composite
def schemes(draw: st.DrawFn) -> QuantScheme:
    form = st.builds(WeightFormat, st.sampled_from([2, 4, 8]), st.sampled_from(BLOCK_SIZES), st.booleans())
    layers = st.sampled_from(["all", "edges", "ends"]) | st.lists(st.integers(0, 29), unique=True).map(tuple)
    roles = st.lists(st.sampled_from(ROLES), min_size=1, unique=True).map(tuple)
    overrides = st.lists(st.builds(Override, roles, form | st.just(WeightFormat(32)), layers), max_size=4).map(tuple)
    return QuantScheme(
        "mine",
        draw(form),
        draw(overrides),
        rounding=draw(st.sampled_from(ROUNDINGS)),
        scaling=draw(st.sampled_from(SCALINGS)),
        layer_count=30,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scheme=schemes())
def test_written_recipe_is_read_back(scheme: QuantScheme, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("recipe") / "mine.toml"
    path.write_text(scheme_toml(scheme), encoding="utf-8")
    assert load_scheme(str(path)) == scheme


@pytest.mark.parametrize("scheme", [*RECIPES.values(), *PALETTES.values()], ids=[*RECIPES, *PALETTES])
def test_named_recipes_can_be_written_too(scheme: QuantScheme, tmp_path: Path) -> None:
    found = load_scheme(recipe(tmp_path, scheme_toml(scheme)))
    assert replace(found, name=scheme.name, keep=scheme.keep) == scheme


def test_numbered_layers_stand_for_the_same_depth_in_other_models() -> None:
    plain, wide = WeightFormat(4, 32), WeightFormat(8, 32)
    scheme = QuantScheme("x", plain, (Override(("down",), wide, (0, 1, 9)),), layer_count=10)

    def chosen(layers: int) -> set[int]:
        return {layer for layer in range(layers) if scheme.format_of("down", layer, layers) == wide}

    assert chosen(10) == {0, 1, 9}
    assert chosen(19) == {0, 1, 2, 18}
    assert chosen(1) == {0}
    assert scheme.format_of("embedding", None, 10) == plain


def test_missing_file_is_a_plan_error() -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        load_scheme("/no/such/recipe.toml")


@pytest.mark.parametrize(("bits", "block_size"), [(3, 32), (4, 0), (4, 24), (8, 512), (16, 32), (32, 16)])
def test_impossible_format_is_refused(bits: int, block_size: int) -> None:
    with pytest.raises(PlanError):
        WeightFormat(bits, block_size)


@pytest.mark.parametrize(
    ("form", "rows", "columns", "size_bytes"),
    [
        (WeightFormat(32), 3, 5, 60),
        (WeightFormat(16), 3, 5, 30),
        (WeightFormat(8, 32), 2, 64, 2 * 2 * (32 + 4)),
        (WeightFormat(8, 32, symmetric=False), 2, 64, 2 * (2 * (32 + 4) + 2)),
        (WeightFormat(4, 32), 2, 33, 2 * 2 * (16 + 4)),  # the second block is padded
        (WeightFormat(4, 32, symmetric=False), 2, 96, 2 * (3 * (16 + 4) + 2)),  # three zero points in two bytes
    ],
)
def test_sizes_count_scales_zero_points_and_padding(
    form: WeightFormat, rows: int, columns: int, size_bytes: int
) -> None:
    assert form.size_bytes(rows, columns) == size_bytes


@pytest.mark.parametrize(("layers", "ends"), [(1, {0}), (3, {0, 2}), (30, {0, 29})])
def test_ends_are_the_first_and_last_layer(layers: int, ends: set[int]) -> None:
    plain, wide = WeightFormat(4, 32), WeightFormat(8, 32)
    scheme = QuantScheme("x", plain, (Override(("down",), wide, "ends"),))
    assert {layer for layer in range(layers) if scheme.format_of("down", layer, layers) == wide} == ends
    assert scheme.format_of("embedding", None, layers) == plain


@pytest.mark.parametrize(
    ("layers", "edges"), [(3, {0, 2}), (8, {0, 7}), (16, {0, 1, 14, 15}), (1, {0}), (30, {0, 1, 2, 27, 28, 29})]
)
def test_edges_are_the_first_and_last_eighth(layers: int, edges: set[int]) -> None:
    plain, wide = WeightFormat(4, 32), WeightFormat(8, 32)
    scheme = QuantScheme("x", plain, (Override(("down",), wide, "edges"),))
    assert {layer for layer in range(layers) if scheme.format_of("down", layer, layers) == wide} == edges
    assert scheme.format_of("down", None, layers) == plain


def test_later_overrides_win() -> None:
    first, second = WeightFormat(8, 32), WeightFormat(8, 64)
    scheme = QuantScheme("x", WeightFormat(4, 32), (Override(ROLES, first), Override(("head",), second)))
    assert scheme.format_of("head", None, 4) == second
    assert scheme.format_of("qkv", 1, 4) == first


def test_block_sizes_are_those_the_operators_take() -> None:
    assert BLOCK_SIZES == (16, 32, 64, 128, 256)


@pytest.mark.parametrize(
    ("name", "element_bytes", "scale_bytes"), [("float32", 4, 0), ("float16", 2, 0), ("int8", 1, 400)]
)
def test_cache_formats_are_named_and_sized(name: str, element_bytes: int, scale_bytes: int) -> None:
    form = CacheFormat(name)
    assert (str(form), form.element_bytes, form.scale_bytes(100)) == (name, element_bytes, scale_bytes)


def test_palettes_are_found_by_k_means_alone(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="palettes don't go with gptq"):
        load_scheme(recipe(tmp_path, 'rounding = "gptq"\nbits = 4\nblock_size = 16\npalette = true\n'))
    with pytest.raises(PlanError, match="8 bits are not handled"):
        load_scheme(recipe(tmp_path, "bits = 8\nblock_size = 16\npalette = true\n"))
    assert WeightFormat(6, 16, palette=True).size_bytes(32, 100) == 32 * (100 * 6 // 8 + 2) + 2 * 64 * 2
