"""`edgekit verify --text`: a user's own text, against transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.cli import main
from edgekit.errors import SourceError
from edgekit.gate import verify_bundle

# Two float32 implementations, over some thousand positions.
FLOAT32_PERPLEXITY = 1e-4
CONTEXT = 128
TEXT = "It was raining when the train arrived; nobody waited. " * 60
Refused = Callable[..., str]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    file = tmp_path / "own.txt"
    file.write_text(TEXT + "".join(chr(97 + letter) for letter in random.integers(26, size=3000)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def int4_bundle(converted: Any) -> Path:
    found: Path = converted("llama", quant="int4", context=CONTEXT)
    return found


def _transformers_perplexity(directory: Path, text: str) -> float:
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    first = tokenizer.encode("").ids
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    length, losses = CONTEXT - len(first), []
    for start in range(0, len(tokens) - length + 1, length):
        window = torch.tensor([[*first, *tokens[start : start + length]]])
        skipped = max(len(first), 1)
        with torch.inference_mode():
            logits = model(window).logits[0, skipped - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, skipped:], reduction="none"))
    return math.exp(float(torch.cat(losses).double().mean()))


def test_perplexity_is_that_of_transformers(int4_bundle: Path, tiny_model: Any, text_file: Path) -> None:
    source = tiny_model("llama")
    content = text_file.read_text(encoding="utf-8")[: CONTEXT * 30]
    text_file.write_text(content, encoding="utf-8")
    (row,) = verify_bundle(int4_bundle, reference=source, text=text_file)
    own = row["text"]
    assert own["reference_perplexity"] == pytest.approx(
        _transformers_perplexity(source, content), rel=FLOAT32_PERPLEXITY
    )
    assert own["perplexity_ratio"] == pytest.approx(own["perplexity"] / own["reference_perplexity"])
    assert own["kl_mean"] > 0
    assert own["perplexity_ratio_interval"][0] <= own["perplexity_ratio"] <= own["perplexity_ratio_interval"][1]


def test_text_is_reported_beside_the_bundles_own_texts(
    int4_bundle: Path, tiny_model: Any, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(int4_bundle), "--reference", str(tiny_model("llama")), "--text", str(text_file)]
    assert main([*arguments, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["programs"]
    assert row["text"]["positions"] > row["positions"] > 0
    assert main(arguments) == 0
    assert "\n  your text: mean KL " in capsys.readouterr().out


def test_text_without_its_reference_is_a_wrong_usage(
    int4_bundle: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(int4_bundle), "--text", str(text_file)]) == 2
    assert "--reference" in capsys.readouterr().err
    with pytest.raises(SourceError):
        verify_bundle(int4_bundle, text=text_file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"short", "needs at least"),
        (b"", "needs at least"),
    ],
)
def test_unusable_text_is_named(
    int4_bundle: Path, tiny_model: Any, tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SourceError, match=said) as caught:
        verify_bundle(int4_bundle, reference=tiny_model("llama"), text=file)
    assert "bad.txt" in caught.value.message
