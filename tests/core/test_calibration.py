"""The texts that calibration learns from, and what keeps them from being written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgekit.calibration import FEW_TOKENS, THREADS, calibration_texts, text_tokens
from edgekit.errors import BundleError, ConversionError, GenerationError
from edgekit.plan import Plan, make_plan
from edgekit.quant import CacheFormat
from edgekit.runtimes import engine
from edgekit.source import Source, open_source
from edgekit.target import load_target


@pytest.fixture
def source(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setattr("edgekit.calibration.NEW_TOKENS", 2)
    return open_source(tiny_model("llama"))


@pytest.fixture
def plan(source: Source) -> Plan:
    return make_plan(source, load_target("linux-x86-64"), quant="int4-mixed")


def fail(*_: Any, **__: Any) -> Any:
    raise GenerationError("no")


def test_template_that_refuses_leaves_the_plain_texts(
    source: Source, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibration_texts(source, plan, tmp_path / "a")
    monkeypatch.setattr("edgekit.calibration.render_prompts", fail)
    assert [text[:-2] for text in calibration_texts(source, plan, tmp_path / "a")] == [text[:-2] for text in whole[-8:]]
    assert len(whole) == 20


def test_program_that_does_not_run_is_an_error_with_a_hint(
    source: Source, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.calibration.sampled_tokens", fail)
    with pytest.raises(ConversionError, match="8-bit program that calibration writes with does not run: no") as caught:
        calibration_texts(source, plan, tmp_path / "a")
    assert caught.value.hint == "use --quant int8 or int4"
    assert not list(tmp_path.iterdir())


def test_program_that_does_not_load_is_mapped(
    source: Source, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, tried = engine.load_model, list[bool]()

    def short_of_memory(*arguments: Any, mapped: bool, **options: Any) -> Any:
        tried.append(mapped)
        assert options["threads"] == THREADS
        if not mapped:
            raise BundleError("no memory")
        return load(*arguments, mapped=mapped, **options)

    monkeypatch.setattr(engine, "load_model", short_of_memory)
    assert calibration_texts(source, plan, tmp_path / "a")
    assert tried == [False, True]


def test_texts_are_short_only_where_nothing_but_a_cache_learns_from_them(source: Source) -> None:
    devices = load_target("linux-x86-64"), load_target("copilot-snapdragon-x-elite")
    ranges = make_plan(source, devices[0], quant="int8", cache=CacheFormat.INT8)
    npu = make_plan(source, devices[1], quant="int8", format="onnx-qdq")
    rounded = make_plan(source, devices[0], quant="int4-mixed", cache=CacheFormat.INT8)
    assert [text_tokens(plan) for plan in (ranges, npu, rounded)] == [FEW_TOKENS, 2, 2]  # 2: the fixture's
