"""A model on ExecuTorch through EdgeKit's own interface, and the same .pte in the runner that apps use."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

import edgekit
from edgekit.cli import main
from edgekit.errors import GenerationError
from edgekit.quiet import quieted
from edgekit.runtimes.engine import LoadedModel

CONTEXT = 96
END = "<|end|>"
VOCABULARY = 261  # 256 bytes and 5 special tokens
NEW = 24
# float32 in other orders of additions; logits here are of size 1 to 10
LOGITS_TOLERANCE = 2e-4
PROMPTS = ("hello there", "Why is the sky blue?", "0123456789 " * 4)


@pytest.fixture(scope="module")
def readable_llama(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama whose every token is a text of its own, in ASCII: the stock runner tells texts, not token ids."""
    directory = shutil.copytree(
        tiny_model("llama", vocab_size=VOCABULARY), tmp_path_factory.mktemp("readable") / "llama"
    )
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    for text, number in list(vocabulary.items()):
        if not (text.isascii() or text == "Ġ"):
            del vocabulary[text]
            vocabulary[f"{chr(ord('a') + number // 26)}{chr(ord('a') + number % 26)}"] = number
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def bundle(readable_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in both formats, in full precision and verified."""
    pytest.importorskip("executorch", reason="executorch is not installed")
    out = tmp_path_factory.mktemp("executorch") / "llama.edgekit"
    edgekit.convert(
        readable_llama, target="linux-x86-64", quant="fp32", context=CONTEXT, format=["onnx", "executorch"], out=out
    )
    return out


@pytest.fixture(scope="module")
def model(bundle: Path) -> Any:
    with edgekit.load(bundle, format="executorch", threads=2, session_cache_bytes=0) as loaded:
        assert isinstance(loaded, LoadedModel)
        yield loaded


@pytest.fixture(scope="module")
def onnx(bundle: Path) -> Any:
    with edgekit.load(bundle, format="onnx", threads=2, session_cache_bytes=0) as loaded:
        yield loaded


@pytest.mark.parametrize("prompt", PROMPTS)
def test_same_greedy_tokens_as_onnx(model: Any, onnx: Any, prompt: str) -> None:
    expected = onnx.generate(prompt, raw=True, max_tokens=NEW).tokens
    assert len(expected) > 8
    assert model.generate(prompt, raw=True, max_tokens=NEW).tokens == expected
    assert model.generate(prompt, max_tokens=NEW).tokens == onnx.generate(prompt, max_tokens=NEW).tokens


def test_same_logits_as_transformers(model: Any, readable_llama: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokens = [int(token) for token in np.random.default_rng(3).integers(0, 256, CONTEXT)]
    reference = AutoModelForCausalLM.from_pretrained(readable_llama, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(model.logits(tokens), expected, atol=LOGITS_TOLERANCE, rtol=0)


def test_stock_runner_writes_the_same_tokens(model: Any, bundle: Path) -> None:
    """What an app on Android or iOS does: ExecuTorch's own runner, tokenizer reader, prefill, sampler and metadata."""
    with quieted():
        from executorch.extension.llm.runner import _llm_runner as stock

        runner = stock.TextLLMRunner(str(bundle / "executorch" / "model.pte"), str(bundle / "tokenizer.json"))
    settings = stock.GenerationConfig(echo=False, max_new_tokens=NEW, temperature=0.0)
    replies = {prompt: model.generate(prompt, raw=True, max_tokens=NEW) for prompt in map(str, range(200))}
    ended = next(prompt for prompt, reply in replies.items() if reply.finish_reason == "stop")
    for prompt in (*PROMPTS, ended):
        reply = model.generate(prompt, raw=True, max_tokens=NEW)
        ends = [END] if reply.finish_reason == "stop" else []  # the runner shows it, and stops
        pieces: list[str] = []
        with quieted():
            runner.reset()
            runner.generate(prompt, settings, pieces.append)
        assert pieces == [
            *(model.tokenizer.decode([token], skip_special_tokens=False) for token in reply.tokens),
            *ends,
        ]


def test_conversation_computes_only_what_is_new(model: Any) -> None:
    session, messages = model.session(), [{"role": "user", "content": "hello"}]
    first = session.generate(messages, max_tokens=8)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "go on"}]
    second = session.generate(messages, max_tokens=8)
    assert second.stats.cached_tokens >= first.stats.prompt_tokens
    assert second.tokens == model.generate(messages, max_tokens=8).tokens


def test_sessions_fork_rewind_and_are_kept(model: Any, tmp_path: Path) -> None:
    session = model.session()
    session.generate("hello there", raw=True, max_tokens=4)
    length = len(session.tokens)
    session.save(tmp_path / "session")
    fork, whole = session.fork(), model.generate("hello there, you", raw=True, max_tokens=8).tokens
    session.generate("something else", raw=True, max_tokens=9)
    for other in (fork, model.restore(tmp_path / "session")):
        assert len(other.tokens) == length
        reply = other.generate("hello there, you", raw=True, max_tokens=8)
        assert reply.stats.cached_tokens == len("hello there")
        assert reply.tokens == whole
        other.rewind(5)
        assert other.generate("hello there, you", raw=True, max_tokens=8).tokens == whole


def test_sessions_in_threads_are_as_alone(model: Any) -> None:
    prompts = [f"{index} {PROMPTS[index % 3]}" for index in range(6)]
    alone = [model.generate(prompt, raw=True, max_tokens=NEW).tokens for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda prompt: model.generate(prompt, raw=True, max_tokens=NEW).tokens, prompts))
    assert together == alone


def test_probabilities_of_a_prompt_are_those_of_onnx(model: Any, onnx: Any) -> None:
    """More rows of logits than the program gives at once."""
    text = "The quick brown fox jumps over the lazy dog."
    assert model.perplexity(text) == pytest.approx(onnx.perplexity(text), rel=1e-4)


def test_fixed_context_is_the_end(model: Any) -> None:
    reply = model.generate("x" * (CONTEXT - 8), raw=True, max_tokens=100)
    assert (len(reply.tokens), reply.finish_reason) == (8, "length")
    with pytest.raises(GenerationError, match=str(CONTEXT)) as caught:
        model.generate("x" * (CONTEXT + 1), raw=True)
    assert caught.value.hint


def test_command_line_runs_and_verifies_it(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One JSON object on stdout, and nothing of what the libraries say."""
    assert main(["run", str(bundle), "hello", "--format", "executorch", "--max-tokens", "4", "--json"]) == 0
    found = capfd.readouterr()
    assert len(json.loads(found.out)["tokens"]) == 4
    assert found.err == ""
    assert main(["verify", str(bundle), "--format", "executorch", "--json"]) == 0
    (program,) = json.loads(capfd.readouterr().out)["programs"]
    assert (program["format"], program["executed"], program["status"]) == ("executorch", "executorch", "ok")
    assert program["greedy_match_tokens"] > 0


def test_chat_talks_with_it(
    bundle: Path, model: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/quit\n"))
    assert main(["chat", str(bundle), "--format", "executorch", "--max-tokens", "5"]) == 0
    expected = model.generate([{"role": "user", "content": "hello"}], max_tokens=5).text
    assert capfd.readouterr().out == f"{expected}\n"


def test_server_answers_several_at_a_time(bundle: Path, model: Any) -> None:
    command = [sys.executable, "-m", "edgekit", "serve", str(bundle), "--format", "executorch", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            with openai.OpenAI(base_url=url, api_key="none") as client, ThreadPoolExecutor(3) as pool:
                ask = partial(client.completions.create, model="llama", max_tokens=NEW)
                answers = list(pool.map(lambda prompt: ask(prompt=prompt).choices[0].text, PROMPTS))
        finally:
            process.kill()
    assert answers == [model.generate(prompt, raw=True, max_tokens=NEW).text for prompt in PROMPTS]


def test_damaged_program_is_one_line(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Cut off, with a manifest that says it is to be so short."""
    broken = shutil.copytree(bundle, tmp_path / "broken.edgekit")
    path = broken / "executorch" / "model.pte"
    os.truncate(path, path.stat().st_size - 1000)
    manifest = json.loads((broken / "edgekit.json").read_text(encoding="utf-8"))
    manifest["files"]["executorch/model.pte"]["size_bytes"] = path.stat().st_size
    manifest["files"]["executorch/model.pte"]["sha256"] = edgekit.bundle.hash_file(path)
    (broken / "edgekit.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert main(["run", str(broken), "hello", "--format", "executorch"]) == 1
    error = capfd.readouterr().err
    assert "model.pte is cut off or damaged" in error
    assert "hint:" in error
    assert "Traceback" not in error
