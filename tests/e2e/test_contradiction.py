"""A manifest that is well formed but says something else than the program does: an error before anything is computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.cli import main

CONTRADICTIONS: dict[str, tuple[tuple[str, ...], object]] = {
    "no such format": (("format",), "magic"),
    "input by another name": (("inputs", "length"), "other"),
    "output by another name": (("outputs", "logits"), "other"),
    "fewer layers": (("cache", "layers"), 1),
    "more layers": (("cache", "layers"), 2**31),
    "other heads": (("cache", "kv_heads"), 64),
    "other head size": (("cache", "head_dim"), 0),
    "more memory than there is": (("cache", "kv_heads"), 2**62),
    "other cache type": (("cache", "dtype"), "float16"),
    "cache by another name": (("cache", "present_value"), "other.{}"),
    "names that reach into Python": (("cache", "past_key"), "past_key.{0.__class__}"),
    "names with two numbers": (("cache", "past_key"), "past_key.{}{}"),
    "other vocabulary": (("vocab_size",), 3200),
}


def _edited(bundle: Path, path: tuple[str | int, ...], value: object) -> None:
    manifest = json.loads((bundle / "edgekit.json").read_text(encoding="utf-8"))
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (bundle / "edgekit.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture
def own(converted: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted("llama", quant="int8"), tmp_path / "own.edgekit"))


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_program_that_is_not_the_described_one_is_refused(case: str, own: Path) -> None:
    path, value = CONTRADICTIONS[case]
    _edited(own, ("programs", 0, *path), value)
    with pytest.raises(edgekit.BundleError):
        edgekit.load(own)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "parameters"), "many"),
        (("plan", "notes"), 3),
        (("programs", 0, "quality", "kl_mean"), "small"),
        (("programs", 0, "quality", "kl_bound"), None),
        (("chat_template",), "\ud800"),
    ],
    ids=str,
)
def test_value_of_another_kind_is_refused(path: tuple[str | int, ...], value: object, own: Path) -> None:
    _edited(own, path, value)
    for command in ("inspect", "verify"):
        assert main([command, str(own)]) == 1


@pytest.mark.parametrize("raw", [False, True])
def test_prompt_that_is_no_text_is_refused(raw: bool, llama: Any) -> None:
    with pytest.raises(edgekit.GenerationError, match="Unicode"):
        llama.generate("a\udcffb", raw=raw, max_tokens=1)  # as Python reads a byte that is not UTF-8


def test_command_line_refuses_a_prompt_that_is_no_text(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(own), "a\udcffb"]) == 1
    assert "error: the prompt is not valid Unicode" in capsys.readouterr().err
