"""The real model that the sample package ships, as an ExecuTorch program."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgekit

pytestmark = pytest.mark.slow
LAYERS = 30
# 8-bit rows: the matrices of the layers, and the embedding twice, which the delegate can't look rows up in.
SIZE_MB = 170


@pytest.fixture(scope="module")
def sample(sample_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> edgekit.Bundle:
    pytest.importorskip("executorch", reason="executorch is not installed")
    out = tmp_path_factory.mktemp("sample") / "a.edgekit"
    return edgekit.convert("sample", target="galaxy-s24", format="executorch", context=1024, out=out)


def test_sample_passes_its_gate_in_few_calls(sample: edgekit.Bundle) -> None:
    (program,) = sample.manifest.programs
    assert (program.quality["executed"], program.quality["status"]) == ("executorch", "ok")
    assert program.graph.operators["forward"]["call xnnpack"] <= LAYERS + 2
    assert (sample.directory / program.graph.files[0]).stat().st_size < SIZE_MB * 1e6


def test_sample_answers_on_executorch(sample: edgekit.Bundle) -> None:
    with edgekit.load(sample.directory) as model:
        reply = model.generate("What is the capital of France? Answer in one sentence.", max_tokens=24)
    assert "Paris" in reply.text
