"""The options of `run` and `chat` that say how to generate: that they reach the model, and how wrong ones are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 2, 3]}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}


def _json(cli: Any, *arguments: object) -> dict[str, Any]:
    result = cli("run", *arguments, "--json")
    assert (result.code, result.err) == (0, ""), result
    values: dict[str, Any] = json.loads(result.out)
    return values


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "given.txt"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_help_has_a_section_for_each_group(cli: Any) -> None:
    text = cli("run", "--help").out
    places = [text.index(f"\n{group}:") for group in ("Length", "Sampling", "Structure", "Options")]
    assert places == sorted(places)
    assert "  BUNDLE" not in text
    assert all(name in text for name in ("--typical-p", "--presence-penalty", "--json-schema", "--no-speculate"))


def test_structures_hold_a_random_model(cli: Any, tiny_bundle: Path, file: Any) -> None:
    schema = _json(cli, tiny_bundle, "hi", "--json-schema", file(json.dumps(SCHEMA)), "--max-tokens", 100)
    jsonschema.validate(json.loads(schema["text"]), SCHEMA)
    assert re.fullmatch("[ab]{3}c", _json(cli, tiny_bundle, "hi", "--regex", "[ab]{3}c")["text"])
    assert _json(cli, tiny_bundle, "hi", "--choice", "yes", "--choice", "no")["text"] in {"yes", "no"}
    assert _json(cli, tiny_bundle, "hi", "--grammar", file('start: "x" | "yz"'))["text"] in {"x", "yz"}


def test_logprobs_come_with_the_json(cli: Any, tiny_bundle: Path) -> None:
    values = _json(cli, tiny_bundle, "hi", "--max-tokens", 4, "--logprobs", 2)
    assert [entry["token"] for entry in values["logprobs"]] == values["tokens"]
    assert all(len(entry["alternatives"]) == 2 for entry in values["logprobs"])


def test_penalties_and_filters_reach_the_sampler(cli: Any, tiny_bundle: Path) -> None:
    plain = _json(cli, tiny_bundle, "hi", "--max-tokens", 40, "--temperature", 1, "--seed", 1)["tokens"]
    options = (("--typical-p", 0.2), ("--presence-penalty", 2), ("--frequency-penalty", 2))
    for option in options:
        arguments = ("--max-tokens", 40, "--temperature", 1, "--seed", 1, *option)
        assert _json(cli, tiny_bundle, "hi", *arguments)["tokens"] != plain


def test_no_speculate_computes_a_token_at_a_time(cli: Any, tiny_bundle: Path) -> None:
    stats = _json(cli, tiny_bundle, "ab" * 20, "--max-tokens", 40, "--no-speculate")["stats"]
    assert (stats["decode_passes"], stats["drafted_tokens"]) == (stats["new_tokens"] - 1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--typical-p", "0"), "0.0 is not in the range"),
        (("--presence-penalty", "nan"), "not a finite number"),
        (("--min-tokens", "-1"), "not in the range"),
        (("--context-policy", "forget"), "is not one of"),
        (("--logprobs", "3"), "--logprobs needs --json"),
        (("--json-schema", "missing.json"), "does not exist"),
        (("--choice", ""), "at least one character"),
        (("--choice", "a", "--regex", "a"), "give only one of"),
    ],
)
def test_impossible_values_are_wrong_usage(
    arguments: tuple[str, ...], message: str, cli: Any, tiny_bundle: Path
) -> None:
    result = cli("run", tiny_bundle, "hi", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_file_that_is_no_schema_is_wrong_usage(text: str, cli: Any, tiny_bundle: Path, file: Any) -> None:
    result = cli("run", tiny_bundle, "hi", "--json-schema", file(text))
    assert result.code == 2
    assert "--json-schema" in result.err


def test_policy_that_the_model_was_not_trained_for_is_an_error(refused: Any, tiny_bundle: Path) -> None:
    assert "drop-oldest-turns" in refused("run", tiny_bundle, "hi", "--context-policy", "sliding")


def test_chat_goes_on_past_the_context_and_says_so(cli: Any, tiny_bundle: Path) -> None:
    lines = "\n".join("x" * 60 for _ in range(6))
    result = cli("chat", tiny_bundle, "--max-tokens", 20, "--context-policy", "drop-oldest-turns", stdin=lines)
    assert result.code == 0
    assert "error" not in result.err
    assert "oldest messages no longer fit" in result.err
