"""The environment of LiteRT's converter: made once, whole or not at all. Pip is left out: `test_backend_litert` runs it."""

from __future__ import annotations

import os
import subprocess
import time
import venv
from pathlib import Path

import pytest

from edgekit.converters import litert_environment
from edgekit.converters.litert_environment import environment_python
from edgekit.errors import ConversionError

pytest.importorskip("torch")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The environments that were installed, in a cache of their own."""
    found: list[Path] = []

    def install(directory: Path, torch: str) -> None:
        venv.create(directory, with_pip=False)
        found.append(directory)

    monkeypatch.setattr(litert_environment, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(litert_environment, "_install", install)
    return found


def test_environment_is_made_once_and_runs_where_it_was_moved_to(made: list[Path], tmp_path: Path) -> None:
    python = environment_python()
    assert environment_python() == python
    assert len(made) == 1
    done = subprocess.run([python, "-c", "import sys; print(sys.prefix)"], check=True, capture_output=True, text=True)
    assert Path(done.stdout.strip()).resolve() == python.parent.parent.resolve()
    assert [path.name for path in (tmp_path / "cache" / "environments").iterdir()] == [python.parent.parent.name]


def test_each_parent_has_an_environment_of_its_own(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = environment_python()
    with monkeypatch.context() as other:
        other.setattr(litert_environment, "_packages", lambda: "/elsewhere/site-packages\n")
        assert environment_python() != first
    assert environment_python() == first  # the other one has not replaced it
    assert len(made) == 2


def test_what_a_killed_installation_left_is_swept(made: list[Path], tmp_path: Path) -> None:
    environments = tmp_path / "cache" / "environments"
    left = environments / ".edgekit-working.killed.partial"
    left.mkdir(parents=True)
    (left / "half").touch()
    left.with_suffix(".lock").touch()
    python = environment_python()
    assert [path.name for path in environments.iterdir()] == [python.parent.parent.name]


AGES = {  # of an environment: whose it is, days that nobody used it, whether it stays when another one is made
    "of another parent, used": ("/", 30, True),
    "of another parent, not used": ("/", 61, False),
    "of a parent that is gone": ("/nowhere/site-packages", 2, False),
    "of this parent, for other versions": ("", 2, False),
    "of this parent, perhaps still in use": ("", 0.5, True),
    "not complete": (None, 2, False),
}


@pytest.mark.parametrize("what", AGES)
def test_old_environments_are_removed_when_one_is_made(made: list[Path], tmp_path: Path, what: str) -> None:
    parent, days, stays = AGES[what]
    old = tmp_path / "cache" / "environments" / "litert-torch-0.9.0-torch-2.12.0-cpython-311-1234"
    old.mkdir(parents=True)
    last_used = time.time() - days * 86400
    if parent is not None:
        (old / "edgekit-done").write_text(f"{parent}\n" if parent else litert_environment._packages(), encoding="utf-8")
        os.utime(old / "edgekit-done", (last_used, last_used))
    os.utime(old, (last_used, last_used))
    python = environment_python()
    assert old.is_dir() == stays
    assert python.is_file()


def test_use_of_an_environment_is_noted(made: list[Path]) -> None:
    done = environment_python().parent.parent / "edgekit-done"
    os.utime(done, (0, 0))
    environment_python()
    assert time.time() - done.stat().st_mtime < 86400


def test_installation_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, made: list[Path], tmp_path: Path
) -> None:
    def failing(directory: Path, torch: str) -> None:
        (directory / "half").write_text("", encoding="utf-8")
        raise ConversionError("litert-torch can't be installed: no network")

    monkeypatch.setattr(litert_environment, "_install", failing)
    with pytest.raises(ConversionError, match="no network"):
        environment_python()
    assert list((tmp_path / "cache" / "environments").iterdir()) == []


def test_user_without_a_home_is_told(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litert_environment, "cache_directory", lambda: None)
    with pytest.raises(ConversionError, match="no home directory"):
        environment_python()
