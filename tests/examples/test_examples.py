"""Each example runs as its documentation says, on a tiny model: what it prints has the form that it promises."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edgekit

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NEW = ("chat", "structured_extraction", "tool_loop", "async_client")
MAX_LINES = 60
TIMEOUT_S = 300
CONTEXT = 4096


def run(name: str, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        command, input=typed, capture_output=True, encoding="utf-8", timeout=TIMEOUT_S, check=False, env=environment
    )


@pytest.fixture(scope="module")
def make_bundle(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_bundle(template=None)`: a tiny model with a long context, and with another chat template."""

    def make(template: str | None = None) -> Path:
        directory = tmp_path_factory.mktemp("example")
        source = Path(shutil.copytree(tiny_model("llama", max_position_embeddings=CONTEXT), directory / "source"))
        if template is not None:
            settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
            changed = json.dumps(settings | {"chat_template": template})
            (source / "tokenizer_config.json").write_text(changed, encoding="utf-8")
        out = directory / "tiny.edgekit"
        edgekit.convert(source, target="linux-x86-64", quant="fp32", context=CONTEXT, out=out)
        return out

    return make


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle()


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """`serve(bundle)`: the URL of `edgekit serve`, a process of its own."""
    processes: list[subprocess.Popen[str]] = []

    def start(bundle: Path) -> str:
        command = [sys.executable, "-m", "edgekit", "serve", str(bundle), "--port", "0", "--grace", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    yield start
    for process in processes:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_S)


@pytest.mark.parametrize("name", NEW)
def test_help_says_how_to_run_it(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python examples/{name}.py" in done.stdout


@pytest.mark.parametrize("name", NEW)
def test_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_chat_answers_every_line(bundle: Path) -> None:
    options = ("--max-tokens", "8", "--seed", "1", "--system", "Be brief.")
    done = run("chat", str(bundle), *options, typed="Hello\nMore?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stdout == run("chat", str(bundle), *options, typed="Hello\nMore?\n").stdout


def test_chat_says_what_it_leaves_out(bundle: Path) -> None:
    long = "word " * (CONTEXT // 12)
    done = run("chat", str(bundle), "--max-tokens", "4", "--seed", "1", typed=f"{long}\n" * 4)
    assert done.returncode == 0, done.stderr
    assert "old messages left out" in done.stderr


def test_chat_shows_an_error_in_one_line() -> None:
    done = run("chat", "no-such.edgekit", typed="Hello\n")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no-such.edgekit is not a bundle")
    assert "Traceback" not in done.stderr


def test_extraction_gives_an_object_a_text(bundle: Path) -> None:
    done = run("structured_extraction", str(bundle), "Anna ordered 3 lamps.", "Bo wants a chair, at once!")
    assert done.returncode == 0, done.stderr
    orders = [json.loads(line) for line in done.stdout.splitlines()]
    assert [sorted(order) for order in orders] == [["article", "city", "customer", "quantity", "urgent"]] * 2
    assert all(1 <= order["quantity"] <= 1000 and isinstance(order["urgent"], bool) for order in orders)


def test_extraction_that_is_cut_is_an_error(bundle: Path) -> None:
    done = run("structured_extraction", str(bundle), "Anna ordered 3 lamps.", "--max-tokens", "3")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cut after 3 tokens")


def test_tools_are_called_over_the_server(make_bundle: Callable[..., Path], serve: Callable[[Path], str]) -> None:
    prompts = json.loads((ROOT / "runtimes" / "conformance" / "prompts.json").read_text(encoding="utf-8"))
    url = serve(make_bundle(prompts["templates"]["qwen2.5"]["source"]))
    done = run("tool_loop", "Is it warm in Paris?", "--url", url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("weather({", "to_fahrenheit({"))
    assert " -> {" in done.stdout.splitlines()[0]


def test_questions_are_asked_at_once(bundle: Path, serve: Callable[[Path], str]) -> None:
    questions = ("One?", "Two?", "Three?")
    done = run("async_client", *questions, "--url", serve(bundle), "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line in questions) == sorted(questions)
    assert done.stdout.count("[first text after ") == len(questions)
