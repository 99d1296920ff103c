"""`edgekit serve` as a process: what it prints, how it ends, and what it refuses."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from .conftest import NEVER_ENDS

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
ENDLESS: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "logit_bias": NEVER_ENDS, "n": 100}


@contextmanager
def serving(*arguments: object, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`edgekit serve ... --port 0`, and the base URL that it printed."""
    import os

    command = [sys.executable, "-m", "edgekit", "serve", *map(str, arguments), "--port", "0"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | variables, **pipes) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def ended(process: subprocess.Popen[str], signal_number: int) -> tuple[int, str]:
    """Code and stderr of a server that was sent a signal."""
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@POSIX
def test_serves_and_ends_on_sigterm(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--threads", 1) as (process, url):
        with openai.OpenAI(base_url=url, api_key="none") as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            assert client.completions.create(model="tiny", prompt="Hi", max_tokens=2).choices
        assert ended(process, signal.SIGTERM) == (0, "serving tiny\n")


@POSIX
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_stream_that_runs_is_told_of_the_end(tiny_bundle: Path, number: int, code: int) -> None:
    with serving(tiny_bundle, "--grace", 0.3) as (process, url):
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(model="tiny", stream=True, **ENDLESS)
            next(stream)
            process.send_signal(number)
            with pytest.raises(openai.APIError) as caught:
                list(stream)
            assert caught.value.code == "stopping"
        _, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in err


@POSIX
def test_request_that_runs_may_finish(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--grace", 60) as (process, url):
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            asked: Any = {"model": "tiny", "prompt": "Hi", "logit_bias": NEVER_ENDS, "max_tokens": 500}
            stream = client.completions.create(**asked, stream=True)
            first = next(stream)
            process.send_signal(signal.SIGTERM)
            chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(timeout=60) == 0


def test_key_from_the_environment(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, EDGEKIT_API_KEY="secret") as (_, url):
        with openai.OpenAI(base_url=url, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with openai.OpenAI(base_url=url, api_key="secret") as client:
            assert client.models.list().data


def test_open_door_is_warned_of(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--host", "0.0.0.0") as (process, url):
        assert url.startswith("http://0.0.0.0:")
        process.kill()
        _, err = process.communicate(timeout=60)
    assert err.startswith("warning: ")
    assert "--api-key" in err


def failing(*arguments: object) -> tuple[int, list[str]]:
    """Code and lines of stderr of a server that does not start."""
    command = [sys.executable, "-m", "edgekit", "serve", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert not done.stdout
    return done.returncode, done.stderr.splitlines()


def test_taken_port_and_unknown_address_are_one_line(tiny_bundle: Path) -> None:
    with serving(tiny_bundle) as (_, url):
        code, lines = failing(tiny_bundle, "--port", url.split(":")[2].removesuffix("/v1"))
    assert (code, len(lines)) == (1, 2)
    assert "can't be listened on" in lines[0]
    code, lines = failing(tiny_bundle, "--host", "203.0.113.1", "--port", 0)
    assert (code, len(lines)) == (1, 2)


def test_two_bundles_of_one_name_are_refused(tiny_bundle: Path) -> None:
    code, lines = failing(tiny_bundle, tiny_bundle, "--port", 0)
    assert (code, len(lines)) == (1, 2)
    assert "called tiny" in lines[0]


def test_missing_extra_names_the_pip_line(tiny_bundle: Path) -> None:
    program = "import sys; sys.modules['uvicorn'] = None; from edgekit.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "serve", str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert 'pip install "edgekit-toolkit[serve]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--slots", 0),
        ("--max-queue", -1),
        ("--timeout", 0),
        ("--timeout", "nan"),
        ("--port", 70000),
        ("--api-key", " "),
    ],
)
def test_impossible_values_are_wrong_usage(tiny_bundle: Path, options: tuple[object, ...]) -> None:
    assert failing(tiny_bundle, *options)[0] == 2


@pytest.mark.slow
def test_sample_answers_and_its_prefix_is_kept(sample_gguf: Path, tmp_path: Path) -> None:
    import edgekit

    edgekit.convert(sample_gguf, target="linux-x86-64", out=tmp_path / "sample.edgekit", verify=False)
    with serving(tmp_path / "sample.edgekit") as (_, url), openai.OpenAI(base_url=url, api_key="none") as client:
        messages: Any = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
        reply = client.chat.completions.create(model="sample", messages=messages, max_tokens=20)
        assert "Paris" in (reply.choices[0].message.content or "")
        again = client.chat.completions.create(model="sample", messages=messages, max_tokens=20)
        assert again.choices[0].message.content == reply.choices[0].message.content
