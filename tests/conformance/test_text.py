from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgekit.runtimes.text import TextStream

SUITE = "text"
TOKENIZERS = Path(__file__).resolve().parents[2] / "runtimes" / "conformance" / "tokenizers"


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZERS / f"{name}.json"))


def test_case(case: dict[str, Any]) -> None:
    stream = TextStream(tokenizer(case["tokenizer"]), case["stop"], case.get("prompt", ()))
    pieces = [stream.push(token) for token in case["tokens"]]
    rest = stream.finish()
    got = {"text": "".join(pieces) + rest, "pieces": pieces, "rest": rest, "stopped": stream.stopped}
    assert {key: got[key] for key in case["expect"]} == case["expect"]


def test_bytes_of_tokens_are_those_of_the_tokenizer(suite: dict[str, Any]) -> None:
    """For a runtime that takes bytes: they say the same as the tokens."""
    for case in suite["cases"]:
        if "bytes" in case:
            text = tokenizer(case["tokenizer"]).decode(case["tokens"], skip_special_tokens=True)
            assert bytes.fromhex("".join(case["bytes"])).decode(errors="replace") == text


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
def test_ids_of_a_tokenizer_are_those_stated(name: str) -> None:
    added = tokenizer(name).get_added_tokens_decoder()
    assert all(tokenizer(name).id_to_token(token) == info.content for token, info in added.items())
    assert sorted(tokenizer(name).get_vocab().values()) == list(range(tokenizer(name).get_vocab_size()))
