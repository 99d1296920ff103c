"""What must hold on Windows and macOS too, as far as one system can tell."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit import gate, staging
from edgekit.errors import SourceError
from edgekit.source import open_source

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("edgekit", "converters", "runtimes", "examples")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES = [*dict.fromkeys(path.resolve() for path in SOURCES), ROOT / "tests" / "run.py"]
UNIX_ONLY = {"resource", "fcntl", "pwd", "grp", "termios", "pty", "posix"}
TEXT_CALLS = {"read_text": {"encoding"}, "write_text": {"encoding", "newline"}}


def _calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node, getattr(node.func, "attr", getattr(node.func, "id", ""))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_name_their_encoding_and_line_ends(path: Path) -> None:
    """Else Windows writes its own code page and line ends, and a bundle's bytes would differ."""
    for call, name in _calls(path):
        # Our own function of that name takes a path.
        if name in TEXT_CALLS and isinstance(call.func, ast.Attribute):
            missing = TEXT_CALLS[name] - {keyword.arg for keyword in call.keywords}
            assert not missing, f"line {call.lineno}: {name} without {missing}"
        if name == "open" and isinstance(call.func, ast.Attribute) and call.args:
            mode = call.args[0]
            assert not isinstance(mode, ast.Constant) or "b" in str(mode.value), f"line {call.lineno}: text mode"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_of_one_system_are_not_imported_at_the_top(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert not named & UNIX_ONLY


def _held_below(folder: Path) -> list[str]:
    """Files of a folder that this process has open or mapped: Windows would neither rename nor remove it."""
    targets = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_link(name)]
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return [name for name in [*targets, *(line.split(maxsplit=5)[-1] for line in maps)] if name.startswith(str(folder))]


def _is_link(name: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{name}")  # the listing's own is gone by now


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of open files")
@pytest.mark.parametrize("quality", ["verified", "failed"])
def test_no_file_is_held_when_its_folder_is_renamed_or_removed(
    quality: str, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, seen = tiny_model("llama"), list[str]()
    rename, rmtree = staging._rename, shutil.rmtree

    def checked_rename(path: Path, to: Path) -> None:
        seen.append("rename")
        assert not _held_below(path)
        rename(path, to)

    def checked_rmtree(path: Path, **options: Any) -> None:
        seen.append(path.name.split(".")[1])
        assert not _held_below(path)
        rmtree(path, **options)

    monkeypatch.setattr(staging, "_rename", checked_rename)
    monkeypatch.setattr(shutil, "rmtree", checked_rmtree)
    if quality == "failed":
        monkeypatch.setattr(gate, "kl_bound", lambda *_: -1.0)
    options: dict[str, Any] = {"target": "raspberry-pi-5", "quant": "int8", "out": tmp_path / "a.edgekit"}
    if quality == "failed":
        with pytest.raises(edgekit.ConversionError):
            edgekit.convert(source, **options)
    else:
        edgekit.convert(source, **options)
        edgekit.convert(source, force=True, **options)
    assert "edgekit-working" in seen
    assert ("rename" in seen) == (quality == "verified")


@pytest.mark.parametrize("arguments", [("-m", "edgekit", "targets"), ("-m", "edgekit", "inspect", "no 👍 такого")])
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_fits_any_console(arguments: tuple[str, ...], encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, env=environment, check=False)
    assert b"Traceback" not in done.stderr
    assert done.stdout or "no 👍 такого".encode() in done.stderr


EMOJI_MODEL = """
import runpy, sys, types
reply = types.SimpleNamespace(text="👍🏽 да", finish_reason="stop", stats=types.SimpleNamespace(decode_tokens_per_s=1.0))
class Model:
    __enter__ = lambda self: self
    __exit__ = lambda self, *_: None
    generate = lambda self, *_, **__: reply
    session = lambda self: self
    stream = lambda self, *_, **__: [reply]
import edgekit
edgekit.load = lambda path: Model()
sys.argv = ["generate.py"]
runpy.run_path(EXAMPLE, run_name="__main__")
"""


def test_example_prints_emoji_to_any_console() -> None:
    script = f"EXAMPLE = {str(ROOT / 'examples' / 'generate.py')!r}\n" + EMOJI_MODEL
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "👍🏽 да".encode() in done.stdout


@pytest.mark.parametrize("name", ["C:/models", "D:/no-such-folder", "org\\name/x"])
def test_windows_paths_are_no_hub_ids(name: str) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        open_source(name)


@pytest.mark.skipif(not hasattr(os, "pathconf"), reason="Windows takes long paths or not, by a setting")
def test_impossible_output_name_is_one_error(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(edgekit.ConversionError, match="can't be written"):
        edgekit.convert(tiny_model("llama"), target="raspberry-pi-5", quant="int8", out=tmp_path / ("x" * 300))
