"""The files themselves: of the stated form, and what their generator writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest

HERE = Path(__file__).resolve().parent
CONFORMANCE = HERE.parents[1] / "runtimes" / "conformance"
SUITES = sorted(CONFORMANCE.glob("*.json"))
every_suite = pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def schema(name: str) -> jsonschema.Draft202012Validator:
    document = read(CONFORMANCE / "schema" / f"{name}.json")
    jsonschema.Draft202012Validator.check_schema(document)
    return jsonschema.Draft202012Validator(document)


@every_suite
def test_suite_is_of_the_stated_form(path: Path) -> None:
    suite = read(path)
    errors = [f"{error.json_path}: {error.message[:200]}" for error in schema("suite").iter_errors(suite)]
    assert not errors
    assert suite["suite"] == path.stem


@every_suite
def test_names_of_cases_differ(path: Path) -> None:
    counts = Counter(case["name"] for case in read(path)["cases"])
    assert [name for name, count in counts.items() if count > 1] == []


@every_suite
def test_every_suite_has_a_runner_here_and_a_section_in_the_readme(path: Path) -> None:
    assert f'SUITE = "{path.stem}"' in (HERE / f"test_{path.stem}.py").read_text(encoding="utf-8")
    assert f"## `{path.name}`" in (CONFORMANCE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((CONFORMANCE / "gaps").glob("*.json")), ids=lambda path: path.stem)
def test_gaps_name_cases_that_exist(path: Path) -> None:
    gaps = read(path)
    schema("gaps").validate(gaps)
    assert gaps["runtime"] == path.stem
    known = {f"{suite.stem}/{case['name']}" for suite in SUITES for case in read(suite)["cases"]}
    assert set(gaps["gaps"]) <= known


def test_python_has_no_gap() -> None:
    assert read(CONFORMANCE / "gaps" / "python.json")["gaps"] == {}


def test_files_are_what_the_generator_writes() -> None:
    script = HERE / "generator" / "make_cases.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
