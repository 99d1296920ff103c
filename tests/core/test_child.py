"""Work in a child process: its answer, its errors, and what becomes of crashes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.child import ChildError, ChildTimeoutError, run_child

Write = Callable[[str], str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`module(code)`: the name of a module that a child can import, made of this code."""

    def write(code: str) -> str:
        (tmp_path / "work_of_a_child.py").write_text(code, encoding="utf-8")
        there = [path for path in [os.environ.get("PYTHONPATH")] if path]  # an empty entry is the working directory
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *there]))
        return "work_of_a_child"

    return write


def test_child_answers_what_it_is_asked(module: Write) -> None:
    code = "from edgekit.child import answer\nprint('noise')\nanswer(lambda first, second: {'sum': first + second})"
    assert run_child(module(code), {"first": 2, "second": 3}) == {"sum": 5}


def test_error_of_a_child_is_told_with_its_hint(module: Write) -> None:
    code = (
        "from edgekit.child import answer\nfrom edgekit.errors import BundleError\n"
        "def work():\n    raise BundleError('it is broken', hint='mend it')\nanswer(work)"
    )
    with pytest.raises(ChildError, match="it is broken") as caught:
        run_child(module(code), {})
    assert caught.value.hint == "mend it"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit(3)", "it ended with code 3"),
        ("1 / 0", "it ended with code 1: ZeroDivisionError: division by zero"),
        ("print('hello')", "it ended without an answer"),
        ("", "it ended without an answer"),
    ],
)
def test_child_that_does_not_answer_is_told_by_its_end(module: Write, code: str, said: str) -> None:
    with pytest.raises(ChildError) as caught:
        run_child(module(code), {})
    assert caught.value.message == said


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals: a crash there is a code")
def test_crash_is_named_by_its_signal(module: Write) -> None:
    with pytest.raises(ChildError, match="it crashed with SIGSEGV"):
        run_child(module("import ctypes\nctypes.string_at(0)"), {})


def test_child_that_hangs_is_ended(module: Write) -> None:
    with pytest.raises(ChildTimeoutError, match="did not end within 1 s"):
        run_child(module("import time\ntime.sleep(600)"), {}, timeout_s=1.0)


def test_child_imports_nothing_from_the_working_directory(
    module: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "json.py").write_text("raise SystemExit(9)", encoding="utf-8")
    monkeypatch.chdir(folder)
    assert run_child(module("from edgekit.child import answer\nanswer(lambda: {})"), {}) == {}
