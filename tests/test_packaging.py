"""What lands in site-packages: our packages, the device profiles, the typing marker, and nothing else."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT_ONLY = shutil.ignore_patterns(".git", ".venv*", ".*cache", "build", "dist", "*.egg-info", "*.edgekit", "tests")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_listed_packages_are_those_of_the_tree() -> None:
    found = set()
    for package, folder in SETTINGS["package-dir"].items():
        for directory, folders, files in os.walk(ROOT / folder):  # does not follow the links to the other packages
            folders[:] = [name for name in folders if name != "__pycache__"]
            if any(name.endswith(".py") for name in files):
                found.add(".".join((package, *Path(directory).relative_to(ROOT / folder).parts)))
    assert set(SETTINGS["packages"]) == found


def test_every_package_has_an_init_file() -> None:
    for package in SETTINGS["packages"]:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None, f"{package} has no __init__.py"


def _built_wheel(directory: Path) -> Path:
    """Built from a copy, since setuptools leaves its build folder; without an index where setuptools is installed."""
    source = directory / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=CHECKOUT_ONLY)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(directory), str(source)]
    try:
        if int(importlib.metadata.version("setuptools").partition(".")[0]) >= 77:
            command.insert(4, "--no-build-isolation")
    except importlib.metadata.PackageNotFoundError:
        pass
    subprocess.run(command, check=True, cwd=directory)
    return next(directory.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_our_package_only(tmp_path: Path) -> None:
    with zipfile.ZipFile(_built_wheel(tmp_path)) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {name.partition("/")[0] for name in names} == {"edgekit"}
    assert "edgekit/py.typed" in names
    profiles = {f"edgekit/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "targets").rglob("*.toml")}
    assert profiles == {name for name in names if name.endswith(".toml")}
    modules = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in ((p, _folder_of(p)) for p in SETTINGS["packages"])
        for path in folder.glob("*.py")
    }
    assert modules == {name for name in names if name.endswith(".py")}


def _folder_of(package: str) -> Path:
    home = max((name for name in SETTINGS["package-dir"] if f"{package}.".startswith(f"{name}.")), key=len)
    folder: str = SETTINGS["package-dir"][home]
    return ROOT / folder / package.removeprefix(home).lstrip(".").replace(".", "/")
