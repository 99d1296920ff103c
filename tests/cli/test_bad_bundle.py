"""Bundles that were changed, prompts that do not fit, options that are impossible."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WEIGHTS = "onnx/model.onnx.data"


def _edit(bundle: Path, **changes: Any) -> None:
    path = bundle / "edgekit.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | changes), encoding="utf-8")


def _changed(bundle: Path) -> None:
    content = bytearray((bundle / WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / WEIGHTS).write_bytes(content)


BAD_BUNDLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (_changed, f"{WEIGHTS} was changed"),
    "shorter": (lambda bundle: (bundle / "tokenizer.json").write_text("{}"), "tokenizer.json has 2 bytes"),
    "missing": (lambda bundle: (bundle / "goldens.json").unlink(), "goldens.json is missing"),
    "extra": (lambda bundle: (bundle / "extra").touch(), "extra is not part of the bundle"),
    "newer": (lambda bundle: _edit(bundle, schema_version=2), "schema 2, this EdgeKit reads up to 1"),
    "no manifest": (lambda bundle: (bundle / "edgekit.json").unlink(), "has no edgekit.json"),
    "no JSON": (lambda bundle: (bundle / "edgekit.json").write_text("{"), "can't be read as JSON"),
    "no programs": (lambda bundle: _edit(bundle, programs=[]), "lists no program"),
}


@pytest.mark.parametrize(
    "command", [("run", "hi"), ("chat",), ("verify",), ("verify", "--json"), ("inspect",)], ids=str
)
@pytest.mark.parametrize("case", BAD_BUNDLES)
def test_bad_bundle_is_refused(case: str, command: tuple[str, ...], refused: Any, own_bundle: Path) -> None:
    spoil, expected = BAD_BUNDLES[case]
    if command == ("inspect",) and case == "no manifest":
        pytest.skip("then it is inspected as a checkpoint")
    spoil(own_bundle)
    name, *options = command
    assert expected in refused(name, own_bundle, *options)


@pytest.mark.parametrize("name", ["run", "chat", "verify"])
def test_missing_bundle_is_refused(name: str, refused: Any, tmp_path: Path) -> None:
    assert "no such directory" in refused(name, tmp_path / "none", *(["hi"] if name == "run" else []))


def test_prompt_longer_than_the_context_says_how_long_and_how_much_room(refused: Any, tiny_bundle: Path) -> None:
    said = refused("run", tiny_bundle, "x" * 300)
    assert "the prompt is 303 tokens, the context of 256 has room for 255" in said


def test_empty_raw_prompt_is_refused(refused: Any, tiny_bundle: Path) -> None:
    assert "the prompt is empty" in refused("run", tiny_bundle, "", "--raw")


def test_raw_prompt_takes_no_system_message(refused: Any, tiny_bundle: Path) -> None:
    refused("run", tiny_bundle, "hi", "--raw", "--system", "short")


def test_format_that_the_bundle_lacks_is_refused(refused: Any, tiny_bundle: Path) -> None:
    assert "it has: onnx" in refused("run", tiny_bundle, "hi", "--format", "tflite")


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{% for i in range(10**9) %}x{% endfor %}", "{{", "{{ lipsum() }}"]
)
def test_hostile_template_is_refused(template: str, refused: Any, own_bundle: Path) -> None:
    _edit(own_bundle, chat_template=template)
    assert "chat template" in refused("run", own_bundle, "hi")


def test_reference_that_does_not_exist_is_refused(refused: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    refused("verify", tiny_bundle, "--reference", tmp_path / "no" / "such" / "place")


@pytest.mark.parametrize(
    "options",
    [
        ("--temperature", "-1"),
        ("--temperature", "hot"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--top-p", "nan"),
        ("--stop", ""),
        ("--max-tokens", "0"),
        ("--top-p", "0"),
        ("--top-p", "1.5"),
        ("--top-k", "-1"),
        ("--min-p", "2"),
        ("--repetition-penalty", "0"),
        ("--seed", "-1"),
        ("--threads", "0"),
        ("--tempersture", "1"),
    ],
    ids=str,
)
def test_impossible_option_is_code_2(options: tuple[str, str], cli: Any, tiny_bundle: Path) -> None:
    result = cli("run", tiny_bundle, "hi", *options)
    assert (result.code, result.out) == (2, "")
    assert "error: " in result.err.lower()
    assert options[0] in result.err
    assert "Traceback" not in result.err


def test_unknown_command_is_code_2(cli: Any) -> None:
    result = cli("frobnicate")
    assert result.code == 2
    assert "convert, plan, run" in result.err


def test_unknown_target_names_the_nearest(cli: Any) -> None:
    result = cli("targets", "iphone16")
    assert result.code == 1
    assert "hint: did you mean iphone-16" in result.err
