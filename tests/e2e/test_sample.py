"""The real model that the sample package ships, converted as the README says."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgekit
from edgekit.gate import verify_bundle

pytestmark = pytest.mark.slow
# fp32 itself is torn about the first word of an answer to the first half alone: 0.08 nats.
QUESTION = "What is the capital of France? Answer in one sentence."


@pytest.fixture(scope="module")
def sample(sample_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> edgekit.Bundle:
    return edgekit.convert("sample", target="raspberry-pi-5", out=tmp_path_factory.mktemp("sample") / "a.edgekit")


def test_sample_passes_its_gate(sample: edgekit.Bundle) -> None:
    quality = sample.manifest.programs[0].quality
    assert (quality["executed"], quality["status"]) == ("onnxruntime", "ok")
    assert quality["kl_mean"] <= quality["kl_bound"]


def test_sample_knows_the_capital_of_france(sample: edgekit.Bundle) -> None:
    with edgekit.load(sample.directory) as model:
        reply = model.generate(QUESTION, max_tokens=48)
    assert "Paris" in reply.text


def test_sample_verifies_without_its_source(sample: edgekit.Bundle) -> None:
    (row,) = verify_bundle(sample.directory)
    assert row["status"] == "ok"
