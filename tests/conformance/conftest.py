"""The Python runner's frame: one test for each case of a suite, and declared gaps.

A test module names its suite, and its test takes a case: SUITE = "sampler"; def test_case(case, suite, outcome): ...
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekit import EdgeKitError, GenerateOptions, UnsupportedError

CONFORMANCE = Path(__file__).resolve().parents[2] / "runtimes" / "conformance"


def read(name: str) -> Any:
    return json.loads((CONFORMANCE / name).read_text(encoding="utf-8"))


GAPS: dict[str, str] = read("gaps/python.json")["gaps"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = read(f"{metafunc.module.SUITE}.json")["cases"]
        metafunc.parametrize("case", cases, ids=[case["name"] for case in cases])


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A case with a declared gap is run like any other: it must end in UnsupportedError."""
    case: Any = pyfuncitem.funcargs.get("case")
    if case is None or f"{pyfuncitem.module.SUITE}/{case['name']}" not in GAPS:
        return (yield)
    with pytest.raises(UnsupportedError):
        yield
    return True


@pytest.fixture(scope="session")
def conformance() -> Callable[[str], Any]:
    """`conformance("prompts.json")`: a file of runtimes/conformance."""
    return read


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The whole file of the module's suite."""
    values: dict[str, Any] = read(f"{request.module.SUITE}.json")
    return values


@pytest.fixture(scope="session")
def outcome() -> Callable[[Callable[[], Any]], Any]:
    """`outcome(run)`: what `run()` returns, or {"error": the kind} of the EdgeKitError that it raises."""

    def of(run: Callable[[], Any]) -> Any:
        try:
            return run()
        except UnsupportedError:
            raise  # a gap
        except EdgeKitError as error:
            return {"error": type(error).__name__}

    return of


@pytest.fixture(scope="session")
def splits() -> Callable[[str], list[list[str]]]:
    """`splits(reply)`: the reply whole, and in pieces of 1, 2 and 7 characters."""
    return lambda reply: [
        [reply],
        *([reply[at : at + length] for at in range(0, len(reply), length)] for length in (1, 2, 7)),
    ]


@pytest.fixture(scope="session")
def options_of() -> Callable[[Mapping[str, Any]], GenerateOptions]:
    """Options as JSON has them: keys of logit_bias are texts, null in it is minus infinity, lists are tuples."""

    def convert(values: Mapping[str, Any]) -> GenerateOptions:
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        if "logit_bias" in given:
            biases = given["logit_bias"].items()
            given["logit_bias"] = {int(token): -float("inf") if bias is None else bias for token, bias in biases}
        return GenerateOptions(**given)

    return convert


@pytest.fixture(scope="session")
def logits_of() -> Callable[[Mapping[str, Any]], NDArray[np.float32]]:
    """The row of a case, float32 [vocab], from its numbers or its formula, and its marks."""

    def make(case: Mapping[str, Any]) -> NDArray[np.float32]:
        if "logits" in case:
            values = np.array(case["logits"], dtype=np.float64)
        else:
            formula = case["logits_formula"]
            places = np.arange(formula["size"], dtype=np.int64)
            values = (places * formula["multiplier"] % formula["modulus"] - formula["offset"]) / formula["divisor"]
        for mark, value in (("minus_infinity", -np.inf), ("plus_infinity", np.inf), ("nan", np.nan)):
            values[case.get(mark, [])] = value
        return values.astype(np.float32)

    return make
