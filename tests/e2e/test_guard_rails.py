"""What makes a model useless is refused, with what would work; on the real sample, and on a tiny model without the KL bound."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.bounds import TOP1_BOUND, top1_bound
from edgekit.divergence import Figures

TARGET = "raspberry-pi-5"


def two_bits(folder: Path) -> str:
    recipe = folder / "two.toml"
    # Blocks of 64: ONNX Runtime has no fast kernel for 2 bits in larger ones.
    recipe.write_text("bits = 2\nblock_size = 64\n", encoding="utf-8")
    return str(recipe)


@pytest.mark.parametrize(("confidence", "bound"), [(0.9, TOP1_BOUND), (0.1, 0.1)])
def test_bound_is_lower_where_the_reference_is_never_sure(confidence: float, bound: float) -> None:
    assert top1_bound(Figures(1, 0.0, (0.0, 0.0), 0.0, 0.3, (0.3, 0.3), confidence)) == bound


def test_program_whose_best_tokens_are_others_is_refused(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.gate.kl_bound", lambda *_: math.inf)
    source = tiny_model("llama")
    with pytest.raises(edgekit.ConversionError, match=r"top-1 agreement .* under the bound") as caught:
        edgekit.convert(source, target=TARGET, quant=two_bits(tmp_path), out=tmp_path / "a.edgekit")
    assert str(caught.value.hint).startswith("use --quant int8 (")
    assert not (tmp_path / "a.edgekit").exists()
    options: Any = {"target": TARGET, "out": tmp_path / "b.edgekit", "allow_low_quality": True}
    kept = edgekit.convert(source, quant=two_bits(tmp_path), **options).manifest.programs[0].quality
    assert kept["status"] == "failed"
    assert kept["top1_agreement"] < kept["top1_bound"]


@pytest.mark.parametrize("error", [MemoryError(), edgekit.GenerationError("the session is closed")])
def test_verdict_stands_where_its_cause_can_not_be_found_out(
    error: Exception, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("edgekit.gate.kl_bound", lambda *_: 0.0)
    monkeypatch.setattr("edgekit.gate.diagnose", fails)
    reason = str(error) or "MemoryError"
    with pytest.raises(
        edgekit.ConversionError, match=rf"over the bound .*; why could not be found out: {reason}; least"
    ):
        edgekit.convert(tiny_model("llama"), target=TARGET, quant="int8", out=tmp_path / "a.edgekit")


@pytest.mark.slow
def test_two_bits_of_the_sample_are_refused(sample_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(edgekit.ConversionError, match="over the bound") as caught:
        # A short context: a text past its half is read too.
        edgekit.convert("sample", target=TARGET, quant=two_bits(tmp_path), context=512, out=tmp_path / "a.edgekit")
    assert "use --quant int8 (14" in str(caught.value.hint)  # MB
    assert [path.name for path in tmp_path.iterdir()] == ["two.toml"]
