"""convert() from source to verified bundle: same bytes each time, every recipe, and what the gate refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.progress import Progress
from edgekit.quant import RECIPES

TARGET = "raspberry-pi-5"


def _files(bundle: Path) -> dict[str, bytes]:
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def _quality(bundle: edgekit.Bundle) -> dict[str, Any]:
    return dict(bundle.manifest.programs[0].quality)


@pytest.mark.parametrize("quant", ["int8", "int4-mixed"])
def test_same_source_gives_the_same_bytes(
    quant: str, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model("llama")
    first = edgekit.convert(source, target=TARGET, quant=quant, out=tmp_path / "here" / "a.edgekit")
    monkeypatch.chdir(source.parent)
    second = edgekit.convert(source.name, target=TARGET, quant=quant, out=tmp_path / "there" / "b.edgekit")
    assert _files(first.directory) == _files(second.directory)
    assert set(_files(first.directory)) == {
        "edgekit.json",
        "goldens.json",
        "tokenizer.json",
        "onnx/model.onnx",
        "onnx/model.onnx.data",
    }


@pytest.mark.parametrize("quant", [name for name in RECIPES if name != "fp16"])
def test_recipe_converts_verifies_and_generates(quant: str, tiny_model: Any, tmp_path: Path) -> None:
    bundle = edgekit.convert(tiny_model("llama"), target=TARGET, quant=quant, out=tmp_path / "a.edgekit")
    quality = _quality(bundle)
    assert (quality["status"], quality["executed"]) == ("ok", "onnxruntime")
    if quant != "fp32":
        assert 0 < quality["kl_mean"] <= quality["kl_bound"]
        assert quality["positions"] == 256
    with edgekit.load(bundle.directory) as model:
        reply = model.generate("hello", max_tokens=8)
    assert len(reply.tokens) == 8


def test_fp16_is_labelled_for_what_it_is(tiny_model: Any, tmp_path: Path) -> None:
    bundle = edgekit.convert(tiny_model("llama"), target=TARGET, quant="fp16", out=tmp_path / "a.edgekit")
    quality = _quality(bundle)
    assert bundle.manifest.programs[0].graph.cache.dtype == "float16"
    if quality["executed"] is None:
        assert quality["status"] == "not-executed"
        assert quality["reason"].startswith("no provider here runs it")
    else:
        assert (quality["executed"], quality["status"]) == ("onnxruntime", "ok")
        assert 0 < quality["kl_mean"] < 1e-4


def test_calibrated_rounding_costs_less_quality(tiny_model: Any, tmp_path: Path) -> None:
    """The same blocks, rounded to nearest and by what the weights see."""
    recipe = tmp_path / "plain.toml"
    blocks = "bits = 4\nblock_size = 64\nsymmetric = false\n"
    recipe.write_text(f'{blocks}[[overrides]]\nroles = ["qkv"]\nblock_size = 32\n', encoding="utf-8")
    calibrated, plain = (
        edgekit.convert(tiny_model("llama"), target=TARGET, quant=quant, out=tmp_path / f"{number}.edgekit")
        for number, quant in enumerate(("int4-mixed", str(recipe)))
    )
    assert _size(calibrated) == _size(plain)
    assert _quality(calibrated)["kl_mean"] < _quality(plain)["kl_mean"]


def _size(bundle: edgekit.Bundle) -> int:
    return sum(weight.size_bytes for weight in bundle.manifest.programs[0].graph.weights)


def test_quantized_weights_are_smaller(converted: Any) -> None:
    sizes = [
        sum(weight.size_bytes for weight in edgekit.open_bundle(path).program().graph.weights)
        for path in (converted("llama", quant=quant) for quant in ("fp32", "int8", "int4", "int4-mixed"))
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 3 * sizes[1] > 5 * sizes[3]


def test_skipped_verification_is_recorded(tiny_model: Any, tmp_path: Path) -> None:
    bundle = edgekit.convert(tiny_model("llama"), target=TARGET, out=tmp_path / "a.edgekit", verify=False)
    assert _quality(bundle) == {
        "status": "not-executed",
        "executed": None,
        "reason": "converted without verification",
    }
    assert not (bundle.directory / "goldens.json").exists()
    with edgekit.load(bundle.directory) as model:
        assert model.generate("hello", max_tokens=2).text is not None


def test_program_over_its_bound_is_refused(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.bounds.BOUND_8_BITS", 0.0)
    with pytest.raises(
        edgekit.ConversionError, match=r"over the bound of 0.0; .*; least exact: .*layers\.\d\.\w+ \(8 bits"
    ) as error:
        edgekit.convert(tiny_model("llama"), target=TARGET, quant="int8", out=tmp_path / "a.edgekit")
    assert error.value.hint == "use --quant fp32 (0.5 MB of weights), or --allow-low-quality to keep it all the same"
    assert not list(tmp_path.iterdir())


def test_program_over_its_bound_passes_only_labelled(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.bounds.BOUND_8_BITS", 0.0)
    out = tmp_path / "a.edgekit"
    bundle = edgekit.convert(tiny_model("llama"), target=TARGET, quant="int8", out=out, allow_low_quality=True)
    quality = _quality(edgekit.open_bundle(out))
    assert quality == _quality(bundle)
    assert quality["status"] == "failed"
    assert "over the bound" in quality["reason"]
    assert json.loads((out / "goldens.json").read_text(encoding="utf-8"))["top_tokens"]


def test_program_larger_than_full_precision_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    import torch

    narrow = {"hidden_size": 8, "head_dim": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    source = tiny_model("llama", **narrow, dtype=torch.bfloat16)
    with pytest.raises(edgekit.ConversionError, match=r"takes [\d,]+ bytes, full precision [\d,]+: .*grew") as error:
        edgekit.convert(source, target=TARGET, quant="int8", out=tmp_path / "a.edgekit")
    assert "embedding" in error.value.message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        ("int8", ["quantize", "generate", "reference", "compare"]),
        ("int4-mixed", ["prepare", "calibrate", "scale", "quantize", "generate", "reference", "compare"]),
    ],
)
def test_progress_only_grows_and_ends_complete(
    quant: str, expected: list[str], tiny_model: Any, tmp_path: Path
) -> None:
    steps: list[Progress] = []
    edgekit.convert(
        tiny_model("llama"), target=TARGET, quant=quant, out=tmp_path / "a.edgekit", on_progress=steps.append
    )
    stages = dict.fromkeys(step.stage for step in steps)
    assert list(stages) == expected
    for stage in stages:
        done = [step.done for step in steps if step.stage == stage]
        assert done == sorted(done)
        assert {(step.total, step.unit) for step in steps if step.stage == stage} == {(done[-1], steps_unit(stage))}


def steps_unit(stage: str) -> str:
    if stage == "scale":
        return "layers"
    return "bytes" if stage in {"prepare", "quantize", "reference"} else "texts"


def test_error_in_the_callers_progress_leaves_nothing(tiny_model: Any, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edgekit.convert(tiny_model("llama"), target=TARGET, out=tmp_path / "a.edgekit", on_progress=stop)
    assert not list(tmp_path.iterdir())


def test_source_is_read_only(tiny_model: Any, tmp_path: Path) -> None:
    source = tiny_model("llama")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in source.iterdir()}
    edgekit.convert(source, target=TARGET, out=tmp_path / "a.edgekit")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in source.iterdir()} == before
