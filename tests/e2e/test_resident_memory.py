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
# Code of Python, numpy, ONNX Runtime and tokenizers that is mapped: 25 to 46 MB for the same program, by how large the pages are
# that the system keeps those files in. The least of it is taken off the bound, and the rest is compared: private memory and the
# pages of the weights' file.
LIBRARY_BYTES = 25_000_000
# Loading a bundle and generating touches every weight and fills the cache: nothing is small because it was not used yet.
CHILD = """
import json, sys, edgekit
from dataclasses import asdict
from edgekit.runtimes.process_memory import memory_use
with edgekit.load(sys.argv[1], threads=2) as model:
    model.end_tokens = frozenset()
    session = model.session()
    reply = session.generate("Why is the sky blue?", max_tokens=64)
    weights, resident = False, 0
    for line in open("/proc/self/smaps", encoding="utf-8"):
        if not line.split()[0].endswith(":"):
            weights = line.rstrip().endswith("model.onnx.data")
        elif weights and line.startswith("Rss:"):
            resident += 1024 * int(line.split()[1])
    print(json.dumps({"new_tokens": reply.stats.new_tokens, "weight_pages_bytes": resident, **asdict(memory_use())}))
"""


# `int4-mixed` has, nearly, the blocks of `int4-block64`, which takes a tenth of its time to make.
@pytest.mark.parametrize("quant", ["keep", "int8", "int4-block64"])
def test_sample_stays_within_its_weights_and_a_fixed_part(sample_gguf: Path, tmp_path: Path, quant: str) -> None:
    edgekit.convert(sample_gguf, target="linux-x86-64", quant=quant, out=tmp_path / "b", verify=False)
    weights_bytes = (tmp_path / "b" / "onnx" / "model.onnx.data").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "b")], capture_output=True, text=True, check=True, timeout=300
    )
    found = json.loads(done.stdout)
    assert found["new_tokens"] == 64
    taken_bytes = found["private_bytes"] + found["weight_pages_bytes"]
    assert weights_bytes * 0.9 < taken_bytes < WEIGHTS_FACTOR * weights_bytes + RUNTIME_BYTES - LIBRARY_BYTES
