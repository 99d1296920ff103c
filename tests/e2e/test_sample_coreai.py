"""The real model that the sample package ships as a Core AI program, beside the same as ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgekit
from edgekit.cli import main

pytestmark = pytest.mark.slow
QUESTION = "Why is the sky blue?"


@pytest.fixture(scope="module")
def sample(sample_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> edgekit.Bundle:
    pytest.importorskip("coreai", reason="the extra coreai is not installed")
    out = tmp_path_factory.mktemp("sample") / "a.edgekit"
    # A short context: the interpreter is slow, and reads a text past half of it all the same.
    return edgekit.convert("sample", target="iphone-16", format=["onnx", "coreai"], context=512, out=out)


def test_sample_passes_its_gate(sample: edgekit.Bundle) -> None:
    onnx, coreai = (program.quality for program in sample.manifest.programs)
    assert (coreai["executed"], coreai["status"]) == ("coreai-linux", "ok")
    assert coreai["positions"] >= 256
    assert coreai["decode"]["positions"] >= 4
    assert coreai["late"]["first_position"] > 256
    assert coreai["kl_mean"] <= coreai["kl_bound"]
    assert (
        coreai["kl_mean"] <= onnx["kl_mean"]
    )  # the same blocks, but what they are multiplied with is not rounded to 8 bits


def test_run_begins_the_same_answer_and_says_what_it_is(
    sample: edgekit.Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(sample.directory), QUESTION, "--format", "coreai", "--max-tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert "coreai-linux: Core AI's reference interpreter" in printed.err
    with edgekit.load(sample.directory, format="onnx") as model:
        assert printed.out.strip() == model.generate(QUESTION, max_tokens=4).text.strip()
