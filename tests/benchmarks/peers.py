"""Engines that the benchmarks compare, and the child processes they run in.

Not a benchmark itself. `python peers.py ENGINE ARTIFACT THREADS CONTEXT` is the worker: it answers JSON lines on
standard input with JSON lines on standard output. `Worker` starts one and talks to it. EdgeKit's worker runs with the
interpreter of the benchmark; a peer's runs with `--peers-python`, so that peers are never dependencies of EdgeKit:

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 transformers==5.23.0
    PEERS/bin/pip install onnxruntime-genai==0.18.0 onnx-ir llama-cpp-python==0.3.36
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Prompt:
    """The same prompt as text and as tokens; an engine takes the one its interface has."""

    text: str
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Timing:
    """One reply: seconds up to its first token, seconds from there, and the number of its tokens."""

    ttft_s: float
    decode_s: float
    tokens: int

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, a second."""
        return (self.tokens - 1) / self.decode_s


class Engine(Protocol):
    """A loaded model. Decoding is greedy, and its time includes the choice of the token."""

    def prefill(self, prompt: Prompt) -> float:
        """Run the prompt from an empty cache up to its first new token; seconds."""
        ...

    def decode(self, count: int) -> float:
        """Continue the prompt by `count` tokens, one at a time; seconds."""
        ...

    def logits(self, tokens: Sequence[int]) -> Logits:
        """The logits after every token, `[len(tokens), vocabulary]`."""
        ...

    def reply(self, prompt: Prompt, count: int, options: dict[str, Any]) -> Timing:
        """Reply to a prompt from an empty cache, with `count` tokens or up to an end token.

        Args:
            options: `speculate`, and those of EdgeKit's `generate`.
        """
        ...


class EdgeKit:
    """An EdgeKit bundle through its public interface."""

    def __init__(self, bundle: str, threads: int, context: int) -> None:
        import edgekit

        # no prefix of an earlier prompt is kept: every prefill is a whole one
        self._model: Any = edgekit.load(bundle, threads=threads, session_cache_bytes=0)
        self._prompt = Prompt("", ())

    def prefill(self, prompt: Prompt) -> float:
        self._prompt = prompt
        stats = self._model.generate(prompt.text, max_tokens=1, raw=True).stats
        if abs(stats.prompt_tokens - len(prompt.tokens)) > 2:
            raise ValueError(f"the prompt has {stats.prompt_tokens} tokens, expected {len(prompt.tokens)}")
        return len(prompt.tokens) / float(stats.prefill_tokens_per_s)

    def decode(self, count: int) -> float:
        stats = self._model.generate(self._prompt.text, max_tokens=count, raw=True, speculate=False).stats
        if stats.new_tokens < count // 2:
            raise ValueError(f"the reply ended after {stats.new_tokens} tokens, too few to time")
        return count / float(stats.decode_tokens_per_s)

    def logits(self, tokens: Sequence[int]) -> Logits:
        return np.asarray(self._model.logits(tokens), dtype=np.float32)

    def reply(self, prompt: Prompt, count: int, options: dict[str, Any]) -> Timing:
        from edgekit.structure import JsonSchema

        chosen = {key: value for key, value in options.items() if key != "schema"}
        if "schema" in options:
            chosen["structure"] = JsonSchema(options["schema"])
        stats = self._model.generate(prompt.text, raw=True, max_tokens=count, **chosen).stats
        decode_s = (stats.new_tokens - 1) / stats.decode_tokens_per_s if stats.new_tokens > 1 else 0.0
        return Timing(stats.ttft_s, decode_s, stats.new_tokens)


class OnnxRuntimeGenAI:
    """A folder written by onnxruntime-genai's builder. Logits come from its `model.onnx` on plain ONNX Runtime."""

    def __init__(self, folder: str, threads: int, context: int) -> None:
        import onnxruntime_genai as genai

        self._genai, self._folder, self._context, self._threads = genai, folder, context, threads
        self._model: Any = None
        self._generator: Any = None

    def _open(self) -> Any:
        config = self._genai.Config(self._folder)
        options = {"session_options": {"intra_op_num_threads": self._threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        return self._genai.Model(config)

    def prefill(self, prompt: Prompt) -> float:
        self._model = self._model or self._open()
        options = self._genai.GeneratorParams(self._model)
        options.set_search_options(do_sample=False, min_length=self._context, max_length=self._context)
        self._generator = self._genai.Generator(self._model, options)
        tokens = np.array(prompt.tokens, dtype=np.int32)
        start = time.perf_counter()
        self._generator.append_tokens(tokens)
        self._generator.generate_next_token()
        return time.perf_counter() - start

    def reply(self, prompt: Prompt, count: int, options: dict[str, Any]) -> Timing:
        self._model = self._model or self._open()
        chosen = self._genai.GeneratorParams(self._model)
        chosen.set_search_options(do_sample=False, max_length=self._context)
        if options["speculate"]:
            chosen.set_speculative_options(ngram_size=3)  # its n-gram lookup; all else as it comes
        generator = self._genai.Generator(self._model, chosen)
        start = time.perf_counter()
        generator.append_tokens(np.array(prompt.tokens, dtype=np.int32))
        generator.generate_next_token()
        first, tokens = time.perf_counter(), 1
        while tokens < count and not generator.is_done():
            generator.generate_next_token()
            tokens += 1
        return Timing(first - start, time.perf_counter() - first, tokens)

    def decode(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self._generator.generate_next_token()
        return time.perf_counter() - start

    def logits(self, tokens: Sequence[int]) -> Logits:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        self._model = self._model or onnxruntime.InferenceSession(f"{self._folder}/model.onnx", options)
        decoder = json.loads(Path(self._folder, "genai_config.json").read_text())["model"]["decoder"]
        past = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), dtype=np.float32)
        feed = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), dtype=np.int64)}
        for value in self._model.get_inputs():
            feed.setdefault(value.name, past)
        return np.asarray(self._model.run(["logits"], feed)[0][0], dtype=np.float32)


class LlamaCpp:
    """A GGUF file on llama.cpp's own C interface."""

    def __init__(self, file: str, threads: int, context: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        weights = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, 512, 512
        options.n_threads = options.n_threads_batch = threads
        options.n_outputs_max = 512
        self._context = llama_cpp.llama_init_from_model(weights, options)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(weights))
        self._next = 0

    def _run(self, tokens: Sequence[int], *, every: bool = False) -> Logits:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self._api.llama_batch_get_one(array, len(tokens))
        if every:
            wanted = (ctypes.c_int8 * len(tokens))(*[1] * len(tokens))
            batch.logits = ctypes.cast(wanted, type(batch.logits))
        if self._api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        shape = (len(tokens) if every else 1, self._vocabulary)
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._context), shape)

    def prefill(self, prompt: Prompt) -> float:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        start = time.perf_counter()
        self._next = int(self._run(prompt.tokens)[0].argmax())
        return time.perf_counter() - start

    def decode(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self._next = int(self._run([self._next])[0].argmax())
        return time.perf_counter() - start

    def logits(self, tokens: Sequence[int]) -> Logits:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return self._run(tokens, every=True).copy()

    def reply(self, prompt: Prompt, count: int, options: dict[str, Any]) -> Timing:
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        lookup = LlamaPromptLookupDecoding() if options["speculate"] else None  # with the binding's defaults
        start = time.perf_counter()
        self.prefill(prompt)
        first, memory = time.perf_counter(), self._api.llama_get_memory(self._context)
        text, tokens = [*prompt.tokens, self._next], 1
        while tokens < count and text[-1] not in options["ends"]:
            draft = [] if lookup is None else lookup(np.array(text, dtype=np.intc)).tolist()
            best = self._run([text[-1], *draft], every=True).argmax(axis=1).tolist()
            kept = next((i for i, token in enumerate(draft) if token != best[i]), len(draft))
            text += best[: kept + 1]
            tokens += kept + 1
            self._api.llama_memory_seq_rm(memory, 0, len(text) - 1, -1)
        return Timing(first - start, time.perf_counter() - first, tokens)


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of a benchmark: an engine with an artifact, and the interpreter that runs it."""

    name: str
    engine: str
    artifact: Path
    python: str

    @property
    def file_bytes(self) -> int:
        """Size of the programs and weights, without tokenizer and settings."""
        files = [self.artifact, *self.artifact.rglob("*")]
        return sum(f.stat().st_size for f in files if f.is_file() and f.suffix not in {".json", ".jinja", ".txt"})


ENGINES: dict[str, type[EdgeKit] | type[OnnxRuntimeGenAI] | type[LlamaCpp]] = {
    "edgekit": EdgeKit,
    "onnxruntime-genai": OnnxRuntimeGenAI,
    "llama.cpp": LlamaCpp,
}
PIP_LINES = {
    "edgekit": "pip install edgekit-toolkit",
    "onnxruntime-genai": "pip install onnxruntime-genai",
    "llama.cpp": "pip install llama-cpp-python",
}


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
