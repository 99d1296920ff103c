"""One conversion, several formats: each program is executed, compared with one reference, and run through the same doors."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit import gate, pipeline, registry
from edgekit.bundle import Bundle
from edgekit.cli import main
from edgekit.companion import companion
from edgekit.errors import ConversionError, GenerationError, MissingExtraError, PlanError, UnsupportedError
from edgekit.goldens import LATE_POSITIONS, SLOW_GREEDY_TOKENS
from edgekit.registry import CONVERTERS, FORMAT_EXTRAS
from edgekit.source import open_source
from edgekit.verify import DECODED, SLOW_DECODED

TARGET, CONTEXT = "iphone-16", 128
FORMATS = [format for format in ("coreml", "coreai", "executorch", "onnx") if format in CONVERTERS]
EXECUTED = {"coreml": "mil-evaluator", "coreai": "coreai-linux", "executorch": "executorch", "onnx": "onnxruntime"}
SLOW = {"coreml", "coreai"}
# Both round the same numbers; what differs is how products are summed and what activations are rounded to.
KL_BETWEEN_FORMATS = 3.0


def _is_installed(format: str) -> bool:
    modules, _ = FORMAT_EXTRAS.get(format, ({}, ""))
    return all(importlib.util.find_spec(module) for module in modules)


needs_extras = pytest.mark.skipif(not all(map(_is_installed, FORMATS)), reason="not all formats' extras are installed")


OPENED: list[str] = []  # while the bundle is made: the source, and programs of other precisions


@pytest.fixture(scope="module")
def bundle(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("formats") / "tiny.edgekit"
    source = tiny_model("llama", num_hidden_layers=2, tie_word_embeddings=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "open_source", _counted_source)
        patch.setattr(gate, "companion", _counted_companion)
        return edgekit.convert(source, target=TARGET, format=FORMATS, quant="int8", context=CONTEXT, out=out)


def _counted_source(source: Any) -> Any:
    OPENED.append("source")
    return open_source(source)


@contextmanager
def _counted_companion(*arguments: Any, **options: Any) -> Iterator[Any]:
    OPENED.append(options["quant"])
    with companion(*arguments, **options) as model:
        yield model


@needs_extras
def test_every_program_is_executed_and_compared(bundle: Bundle) -> None:
    cards = {program.graph.format: program.quality for program in bundle.manifest.programs}
    assert list(cards) == FORMATS
    assert {format: card["status"] for format, card in cards.items()} == dict.fromkeys(FORMATS, "ok")
    assert {format: card["executed"] for format, card in cards.items()} == {name: EXECUTED[name] for name in FORMATS}
    for format, card in cards.items():
        assert card["positions"] >= 256, format
        assert card["decode"]["positions"] == (SLOW_DECODED if format in SLOW else 4 * DECODED)
        assert card["late"]["positions"] == LATE_POSITIONS
        assert card["late"]["first_position"] > CONTEXT // 2
        assert card["reference_match_tokens"] >= 1


@needs_extras
def test_formats_are_about_as_far_from_full_precision(bundle: Bundle) -> None:
    kl = [program.quality["kl_mean"] for program in bundle.manifest.programs]
    assert max(kl) < KL_BETWEEN_FORMATS * min(kl)


@needs_extras
def test_tokenizer_texts_and_manifest_are_shared(bundle: Bundle) -> None:
    assert len(list(bundle.directory.rglob("tokenizer.json"))) == 1
    goldens = json.loads((bundle.directory / "goldens.json").read_text(encoding="utf-8"))
    assert set(goldens["greedy"]) == set(FORMATS)
    for format in SLOW & set(FORMATS):
        assert [len(tokens) for tokens in goldens["greedy"][format]] == [SLOW_GREEDY_TOKENS, 0, 0, 0, 0]
    assert list(bundle.manifest.plan["other_programs"]) == FORMATS[1:]
    assert {program.context for program in bundle.manifest.programs} == {CONTEXT}


@needs_extras
def test_verify_runs_them_all_again(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle.directory), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["ok"]
    assert [(row["format"], row["status"]) for row in values["programs"]] == [(format, "ok") for format in FORMATS]
    assert all(row["late"]["positions"] == LATE_POSITIONS for row in values["programs"])


@needs_extras
@pytest.mark.parametrize("format", FORMATS)
def test_each_program_answers_alike(bundle: Bundle, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    with edgekit.load(bundle.directory, format=format) as model:
        first = model.generate("hello", raw=True, max_tokens=2).tokens
    with edgekit.load(bundle.directory, format="onnx") as model:
        assert model.generate("hello", raw=True, max_tokens=2).tokens[:1] == first[:1]
    assert main(["run", str(bundle.directory), "hello", "--raw", "--format", format, "--max-tokens", "1"]) == 0
    assert (f"note: run on {EXECUTED[format]}: " in capsys.readouterr().err) == (format in SLOW)


@needs_extras
@pytest.mark.parametrize("format", FORMATS)
def test_prompt_over_the_fixed_context_is_refused(bundle: Bundle, format: str) -> None:
    with edgekit.load(bundle.directory, format=format) as model, pytest.raises(GenerationError, match="context"):
        model.generate("x" * (CONTEXT + 1), raw=True, max_tokens=1)


@needs_extras
def test_inspect_shows_programs_side_by_side(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle.directory)]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {format} " in text and EXECUTED[format] in text for format in FORMATS)
    assert "in floats: " in text
    assert "operators: " in text
    graphs = {program.graph.format: program.graph for program in bundle.manifest.programs}
    for graph in graphs.values():
        assert graph.operators, graph.format
        assert all(count > 0 for operators in graph.operators.values() for count in operators.values())
    if "executorch" in graphs:
        delegated = graphs["executorch"].delegated
        assert delegated["xnnpack"] > delegated[""]
        assert "operators (" in text


@needs_extras
@pytest.mark.usefixtures("bundle")
def test_source_and_reference_are_opened_once() -> None:
    assert OPENED == ["source", "fp32"]


# ---- Bad input, before any work ----


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(pipeline, "open_source", refuse)


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("format", FORMAT_EXTRAS)
def test_missing_extra_is_its_pip_line_before_any_work(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.CONVERTERS, format, "")
    monkeypatch.setattr(registry, "_is_installed", lambda module: module == "torch")
    with pytest.raises(MissingExtraError) as caught:
        edgekit.convert("sample", target=TARGET, format=[format, "onnx"])
    assert f'pip install "edgekit-toolkit[{format}]" (made for ' in str(caught.value.hint)


def test_running_a_litert_program_needs_no_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_is_installed", lambda module: module == "ai_edge_litert")
    registry.check_installed("litert", to_run=True)
    with pytest.raises(MissingExtraError, match="torch"):
        registry.check_installed("litert")


@pytest.mark.parametrize("table", [registry.CONVERTERS, registry.BACKENDS], ids=["converter", "backend"])
def test_package_that_a_vendors_package_lacks_is_the_formats_pip_line(
    table: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_install.py").write_text("import no_such_vendor.parts\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(table, "executorch", "broken_install:export")
    with pytest.raises(MissingExtraError, match="the package no_such_vendor, which is not installed") as caught:
        registry.load_attribute("broken_install:export")
    assert 'pip install "edgekit-toolkit[executorch]"' in str(caught.value.hint)


@pytest.mark.parametrize("line", ["import edgekit.no_such_part", "raise ModuleNotFoundError", "from math import none"])
def test_fault_of_our_own_is_no_missing_package(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty.py").write_text(f"{line}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.CONVERTERS, "executorch", "faulty:export")
    with pytest.raises(ImportError):
        registry.load_attribute("faulty:export")


@needs_extras
@pytest.mark.parametrize("format", [format for format in FORMATS if format in FORMAT_EXTRAS])
def test_missing_extra_of_a_bundles_program_is_told_when_it_is_loaded(
    bundle: Bundle, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_is_installed", lambda module: False)
    with pytest.raises(MissingExtraError, match="torch"):
        edgekit.load(bundle.directory, format=format)
    (row,) = gate.verify_bundle(bundle.directory, formats=[format])
    assert row["status"] == "not-executed"
    assert f'pip install "edgekit-toolkit[{format}]"' in row["reason"]


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(
    ("formats", "error", "message"),
    [
        (["onnx", "tflite"], UnsupportedError, "'tflite' is not known"),
        (["onnx", "onnx"], PlanError, "asked for twice: onnx, onnx"),
    ],
)
def test_wrong_formats_are_refused_before_any_work(formats: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        edgekit.convert("sample", target=TARGET, format=formats)


def test_format_that_the_target_does_not_take_leaves_nothing(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="browser does not take executorch programs") as caught:
        edgekit.convert(tiny_model("llama"), target="browser", format=["onnx", "executorch"], out=tmp_path / "a")
    assert "it takes onnx" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


@needs_extras
def test_second_format_that_fails_leaves_nothing(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise ConversionError("lowering failed", hint="none")

    monkeypatch.setitem(registry.CONVERTERS, "executorch", f"{__name__}:unused")
    monkeypatch.setattr(
        pipeline, "load_attribute", lambda path: failing if path.endswith("unused") else registry.load_attribute(path)
    )
    formats = ["onnx", "executorch"]
    with pytest.raises(ConversionError, match="lowering failed"):
        edgekit.convert(tiny_model("llama"), target=TARGET, format=formats, quant="int8", out=tmp_path / "a")
    assert not list(tmp_path.iterdir())
