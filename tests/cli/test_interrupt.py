"""Ctrl-C and kill: exit code 130, no bundle, and after Ctrl-C no temporary directory either."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TARGET = ("--target", "raspberry-pi-5")
PLACES = {
    "a worker": "edgekit.converters.weight_writer._write_rows",
    "the export": "edgekit.converters.to_onnx.emit_decoder",
    "the verification": "edgekit.gate.write_texts",
    "the comparison": "edgekit.gate.compare",
    "the manifest": "edgekit.pipeline._write_json",
}


def _interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", PLACES)
def test_interrupted_conversion_leaves_nothing(
    place: str, cli: Any, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PLACES[place], _interrupt)
    result = cli("convert", tiny_model("llama"), *TARGET, "--out", tmp_path / "a.edgekit")
    assert (result.code, result.out, result.err.strip()) == (130, "", "interrupted")
    assert not list(tmp_path.iterdir())


def test_interrupted_reply_is_code_130(cli: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.runtimes.sampling.Sampler.next", _interrupt)
    result = cli("run", tiny_bundle, "hi")
    assert (result.code, result.err.strip()) == (130, "interrupted")


def test_interrupted_turn_goes_on_with_the_chat(cli: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.runtimes.sampling.Sampler.next", _interrupt)
    result = cli("chat", tiny_bundle, stdin="hi\nhi\n")
    assert result.code == 0
    assert result.err.count("[cancelled]") == 2


@contextmanager
def _started(source: Path, out: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A conversion in a process of its own, that has begun to write."""
    command = [sys.executable, "-m", "edgekit", "convert", str(source), *TARGET, *options, "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not list(out.parent.glob(".*.partial/onnx/*.data")):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_a_conversion_and_leaves_nothing(sample_gguf: Path, tmp_path: Path) -> None:
    with _started(sample_gguf, tmp_path / "a.edgekit") as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err.strip()) == (130, "", "interrupted")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_conversion_leaves_no_bundle(sample_gguf: Path, tmp_path: Path, cli: Any, tiny_model: Any) -> None:
    out = tmp_path / "a.edgekit"
    with _started(sample_gguf, out) as process:
        process.kill()
        process.wait(timeout=30)
    assert not out.exists()
    assert cli("convert", tiny_model("llama"), *TARGET, "--out", out).code == 0
    assert list(tmp_path.iterdir()) == [out]  # and what the killed one left is gone


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="executorch is not installed")
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_conversion_ended_in_its_second_format_leaves_no_bundle(
    name: str, tiny_model: Any, tmp_path: Path, cli: Any
) -> None:
    """PyTorch is at work by then, whose streams are quieted."""
    out, source = tmp_path / "a.edgekit", tiny_model("llama")
    with _started(source, out, "--format", "onnx", "--format", "executorch", "--quant", "int8") as process:
        time.sleep(1.0)
        process.send_signal(getattr(signal, name))
        printed, err = process.communicate(timeout=60)
    assert not printed
    if name == "SIGINT":
        assert (process.returncode, err.strip().splitlines()[-1:]) == (130, ["interrupted"])
        assert not list(tmp_path.iterdir())
    assert not out.exists()
    assert cli("convert", source, *TARGET, "--out", out).code == 0
    assert list(tmp_path.iterdir()) == [out]
