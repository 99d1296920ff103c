"""What a loaded model takes: bounded by its weights and a fixed part, for a real model in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgekit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the memory in use from /proc"),
]
# Of packed copies beside their scales, and of the interpreter with ONNX Runtime, numpy and the tokenizer (issue 5).
WEIGHTS_FACTOR, RUNTIME_BYTES = 1.3, 80_000_000
# Loading a bundle and generating touches every weight and fills the cache: nothing is small because it was not used yet.
CHILD = """
import json, sys, edgekit
from dataclasses import asdict
from edgekit.runtimes.process_memory import memory_use
with edgekit.load(sys.argv[1], threads=2) as model:
    model.end_tokens = frozenset()
    session = model.session()
    reply = session.generate("Why is the sky blue?", max_tokens=64)
    print(json.dumps({"new_tokens": reply.stats.new_tokens, **asdict(memory_use())}))
"""


# `int4-mixed` has the blocks of `int4-block128`, which takes a tenth of its time to make.
@pytest.mark.parametrize("quant", ["keep", "int8", "int4-block128"])
def test_sample_stays_within_its_weights_and_a_fixed_part(sample_gguf: Path, tmp_path: Path, quant: str) -> None:
    edgekit.convert(sample_gguf, target="linux-x86-64", quant=quant, out=tmp_path / "b", verify=False)
    weights_bytes = (tmp_path / "b" / "onnx" / "model.onnx.data").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "b")], capture_output=True, text=True, check=True, timeout=300
    )
    found = json.loads(done.stdout)
    assert found["new_tokens"] == 64
    assert weights_bytes * 0.9 < found["rss_bytes"] < WEIGHTS_FACTOR * weights_bytes + RUNTIME_BYTES
