"""Lint inside `edgekit convert`: errors refuse before anything is written, warnings are notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PHONE = """
extends = "pixel-9-pro"
name = "A phone whose shop takes little"
packaging.asset_limit_bytes = 1_000_000
packaging.minimum_os = "Android {version}"
[sources]
packaging = "estimate, 2026: for this test"
"""


def profile(directory: Path, version: int) -> Path:
    path = directory / "phone.toml"
    path.write_text(PHONE.format(version=version), encoding="utf-8")
    return path


def test_convert_refuses_what_lint_calls_an_error(refused: Any, tiny_model: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.edgekit"
    said = refused("convert", tiny_model("llama"), "--target", profile(tmp_path, 5), "--out", out)
    assert "error: onnx programs need Android 7, phone starts at Android 5" in said
    assert "hint: raise packaging.minimum_os" in said
    assert not out.exists()


def test_convert_refuses_a_context_past_a_scaling_that_got_lost(refused: Any, tiny_model: Any, tmp_path: Path) -> None:
    source = tiny_model("llama", original_max_position_embeddings=128)
    said = refused("convert", source, "--target", "raspberry-pi-5", "--context", 200, "--out", tmp_path / "out.edgekit")
    assert "error: the config stretches 128 tokens to 256 but names no rope scaling" in said


def test_warning_is_a_note_on_stderr_and_in_the_bundle(cli: Any, tiny_model: Any, tmp_path: Path) -> None:
    source = tiny_model("llama", intermediate_size=1536)
    arguments = ("--target", profile(tmp_path, 14), "--quant", "fp32", "--out", tmp_path / "out.edgekit")
    result = cli("convert", source, *arguments, "--json")
    assert result.code == 0
    (note,) = [line for line in result.err.splitlines() if "one asset (a pack or a file) holds up to" in line]
    assert note.startswith("note: ")
    assert note.endswith("on phone; split the weights over several")
    assert note.removeprefix("note: ") in json.loads(result.out)["plan"]["notes"]
