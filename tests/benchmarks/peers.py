"""The child processes that the benchmarks' engines run in.

Not a benchmark itself. `python peers.py ENGINE ARTIFACT THREADS CONTEXT` is the worker: it answers JSON lines on
standard input with JSON lines on standard output. `Worker` starts one and talks to it. EdgeKit's worker runs with the
interpreter of the benchmark; a peer's runs with `--peers-python`, so that peers are never dependencies of EdgeKit:

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 transformers==5.23.0
    PEERS/bin/pip install onnxruntime-genai==0.18.0 onnx-ir llama-cpp-python==0.3.36
    PEERS/bin/pip install torchao==0.18.0        # or in an environment of its own: --torchao-python
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from engines import ENGINES, PIP_LINES, Engine, Logits, Prompt, Timing, TorchAo

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of a benchmark: an engine with an artifact, and the interpreter that runs it."""

    name: str
    engine: str
    artifact: Path
    python: str

    @property
    def file_bytes(self) -> int:
        """Size of the programs and weights; 0 where there are none (torchao)."""
        return file_bytes(self.artifact)


def file_bytes(artifact: Path) -> int:
    """Size of a file, or of a folder without tokenizer and settings."""
    files = [artifact, *artifact.rglob("*")]
    return sum(f.stat().st_size for f in files if f.is_file() and f.suffix not in {".json", ".jinja", ".txt"})


class WorkerError(Exception):
    """A child process could not serve a request; the message says why, with the pip line of a missing package."""


class Worker:
    """A contender in a child process of its own."""

    def __init__(self, contender: Contender, *, threads: int, context: int) -> None:
        command = [contender.python, __file__, contender.engine, str(contender.artifact), str(threads), str(context)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.communicate()
        self._log.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # the child died while loading; its answer, if any, says why
        line = self._child.stdout.readline()
        if not line:
            self._log.seek(0)
            raise WorkerError(f"the worker ended: {' | '.join(self._log.read().splitlines()[-3:])}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["value"]

    def prefill(self, prompt: Prompt) -> float:
        return float(self._ask({"do": "prefill", **asdict(prompt)}))

    def decode(self, count: int) -> float:
        return float(self._ask({"do": "decode", "count": count}))

    def logits(self, tokens: Sequence[int]) -> Logits:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/logits.npy"
            self._ask({"do": "logits", "tokens": list(tokens), "path": path})
            return np.asarray(np.load(path))

    def weight_bytes(self) -> int:
        return int(self._ask({"do": "weight_bytes"}))

    def reply(self, prompt: Prompt, count: int, options: dict[str, Any]) -> Timing:
        return Timing(**self._ask({"do": "reply", **asdict(prompt), "count": count, "options": options}))

    def peak_rss_bytes(self) -> int:
        return int(self._ask({"do": "peak_rss_bytes"}))


def _peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _serve(engine: Engine, request: dict[str, Any]) -> float | int | dict[str, Any] | None:
    match request["do"]:
        case "prefill":
            return engine.prefill(Prompt(request["text"], request["tokens"]))
        case "decode":
            return engine.decode(request["count"])
        case "reply":
            prompt = Prompt(request["text"], request["tokens"])
            return asdict(engine.reply(prompt, request["count"], request["options"]))
        case "logits":
            np.save(request["path"], engine.logits(request["tokens"]))
            return None
        case "weight_bytes":
            assert isinstance(engine, TorchAo), "the other engines' weights are their files"
            return engine.weight_bytes()
        case _:
            return _peak_rss_bytes()


def main(name: str, artifact: str, threads: str, context: str) -> None:
    """Serve requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    engine: Engine | None = None
    for line in sys.stdin:
        try:
            engine = engine or ENGINES[name](artifact, int(threads), int(context))
            answer: dict[str, Any] = {"value": _serve(engine, json.loads(line))}
        except ModuleNotFoundError as error:
            answer = {"error": f"{error.name} is not installed: {PIP_LINES[name]}"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def take_turns(
    contenders: Sequence[Contender], rounds: int, measure: Callable[[Contender], Row]
) -> tuple[dict[str, list[Row]], dict[str, dict[str, str]]]:
    """Measure each once a round; the rounds of those that ran, and why others did not."""
    runs: dict[str, list[Row]] = {contender.name: [] for contender in contenders}
    failed: dict[str, dict[str, str]] = {}
    for turn in range(rounds):
        for contender in contenders:
            if contender.name in failed:
                continue
            print(f"round {turn + 1} of {rounds}: {contender.name}", file=sys.stderr)
            try:
                runs[contender.name].append(measure(contender))
            except WorkerError as error:
                failed[contender.name] = {"error": str(error)}
                del runs[contender.name]
    return runs, failed


if __name__ == "__main__":
    main(*sys.argv[1:])
