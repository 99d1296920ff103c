"""The command line as a function, and a converted tiny model to use it on."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.cli import main


@dataclass(frozen=True, slots=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`cli("run", bundle, "hi", stdin="")`: exit code and what was printed."""

    def call(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(cli: Callable[..., Result]) -> Callable[..., str]:
    """`refused("run", ...)`: the command ends with code 1, an error line and a hint line; what it said."""

    def call(*arguments: object, stdin: str = "") -> str:
        result = cli(*arguments, stdin=stdin)
        lines = result.err.splitlines()
        assert result.code == 1, result
        assert not result.out
        assert [line for line in lines if line.startswith("error: ")], result.err
        assert [line for line in lines if line.startswith("hint: ")], result.err
        assert "Traceback" not in result.err
        return result.err

    return call


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama, converted. Not to be changed."""
    out = tmp_path_factory.mktemp("bundles") / "tiny.edgekit"
    edgekit.convert(tiny_model("llama"), target="raspberry-pi-5", quant="int8", out=out)
    return out


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "own.edgekit"))
