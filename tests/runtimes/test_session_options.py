"""Runtime options reach ONNX Runtime, from the device's profile through plan and manifest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.bundle import open_bundle
from edgekit.registry import LOADER, load_attribute
from edgekit.runtime_options import RuntimeOptions, usable_cores
from edgekit.runtimes.session_options import session_options

PROFILE = """
extends = "linux-x86-64"
[runtime.onnx]
threads = 3
spinning = false
arena = false
[sources]
runtime = "estimate, 2026-11: a test"
"""


@pytest.fixture(scope="module")
def bundle(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiled")
    (folder / "mine.toml").write_text(PROFILE, encoding="utf-8")
    edgekit.convert(tiny_model("llama"), target=folder / "mine.toml", quant="int8", out=folder / "b", verify=False)
    return folder / "b"


def loaded(bundle: Path, options: RuntimeOptions) -> Any:
    """The bundle's model, loaded with other options than it names."""
    opened = open_bundle(bundle)
    return load_attribute(LOADER)(opened, replace(opened.program(), runtime=options))


def test_profile_reaches_the_manifest(bundle: Path) -> None:
    manifest = json.loads((bundle / "edgekit.json").read_text(encoding="utf-8"))
    expected = RuntimeOptions(threads=3, spinning=False, arena=False)
    assert open_bundle(bundle).program().runtime == expected
    assert manifest["plan"]["runtime"]["threads"] == 3


def test_options_reach_onnx_runtime() -> None:
    default, changed = (
        session_options(options)
        for options in (RuntimeOptions(), RuntimeOptions(5, spinning=False, arena=False, prepacking=False))
    )
    assert (default.intra_op_num_threads, changed.intra_op_num_threads) == (0, 5)
    assert (default.enable_cpu_mem_arena, changed.enable_cpu_mem_arena) == (True, False)
    for entry, values in {"intra_op.allow_spinning": ("1", "0"), "disable_prepacking": ("0", "1")}.items():
        assert tuple(made.get_session_config_entry(f"session.{entry}") for made in (default, changed)) == values


@pytest.mark.parametrize(("planned", "asked", "used"), [(1000, None, usable_cores()), (1, None, 1), (1, 2, 2)])
def test_threads_are_the_targets_and_no_more_than_there_are_cores(
    bundle: Path, planned: int, asked: int | None, used: int
) -> None:
    opened = open_bundle(bundle)
    program = replace(opened.program(), runtime=RuntimeOptions(threads=planned))
    with load_attribute(LOADER)(opened, program, threads=asked) as model:
        assert model.backend.session.get_session_options().intra_op_num_threads == used


@pytest.mark.parametrize(
    "options",
    [
        RuntimeOptions(1, spinning=False),
        RuntimeOptions(1, arena=False),
        RuntimeOptions(1, mapped_weights=False),
        RuntimeOptions(1, prepacking=False),
    ],
    ids=["no spinning", "no arena", "read, not mapped", "not packed"],
)
def test_options_change_no_token(bundle: Path, options: RuntimeOptions) -> None:
    with loaded(bundle, RuntimeOptions(1)) as plain, loaded(bundle, options) as model:
        expected = plain.generate("hello", max_tokens=24, speculate=False).tokens
        assert model.generate("hello", max_tokens=24, speculate=False).tokens == expected


def test_inspect_shows_the_options(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgekit.cli import main

    assert main(["inspect", str(bundle)]) == 0
    assert "3 threads, no spinning, no arena, packed weights, mapped file" in capsys.readouterr().out
