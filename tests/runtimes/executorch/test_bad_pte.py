"""Broken, cut off, foreign, too new and hostile .pte files: one clean error each, and this process lives on."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit import child
from edgekit.errors import BundleError
from edgekit.quiet import quieted
from edgekit.runtime_options import RuntimeOptions
from edgekit.runtimes import program_trial
from edgekit.runtimes.backend_executorch import ExecuTorchBackend
from edgekit.runtimes.pte_file import check_pte

CONTEXT = 64
Load = Callable[[bytes], ExecuTorchBackend]


@pytest.fixture
def load(exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`load(data)`: these bytes as a program of a bundle, which nobody has tried yet."""
    monkeypatch.setattr(program_trial, "cache_directory", lambda: tmp_path / "cache")
    options = RuntimeOptions(threads=1)

    def loaded(data: bytes) -> ExecuTorchBackend:
        (tmp_path / "model.pte").write_bytes(data)
        return ExecuTorchBackend(tmp_path, exported.graph, context=CONTEXT, options=options)

    return loaded


@pytest.fixture
def edited(exported: Any) -> Callable[[Callable[[Any], None]], bytes]:
    """`edited(change)`: the program, well-formed, with its execution plan changed."""
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

    def edit(change: Callable[[Any], None]) -> bytes:
        with quieted():
            whole = deserialize_pte_binary(exported.path.read_bytes())
            change(whole.program.execution_plan[0])
            return bytes(serialize_pte_binary(whole, extract_delegate_segments=True))

    return edit


def test_untouched_program_is_taken(load: Load, exported: Any, edited: Any) -> None:
    """What the others are measured by: edited without a change it runs, so the changes are what is refused."""
    tokens = [1, 2, 3]
    for data in (exported.path.read_bytes(), edited(lambda _: None)):
        found = load(data).decoder().forward(np.array(tokens), rows=1, rope_length=0)
        np.testing.assert_allclose(found[0], exported.module.whole(tokens)[-1], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not an ExecuTorch program: it has 0 bytes"),
        (b"PK\x03\x04" * 100, "is not an ExecuTorch program$"),
        (struct.pack("<I4s", 28, b"TFL3") + bytes(500), "is not an ExecuTorch program$"),
        (struct.pack("<I4s4sI", 60, b"ET13", b"eh00", 32) + bytes(500), "of version ET13, this EdgeKit reads ET12"),
        (struct.pack("<I4s", 60, b"ET12") + bytes(500), "lacks the header"),
    ],
    ids=["empty", "zip", "tflite", "newer", "headless"],
)
def test_foreign_file_is_named(load: Load, data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        load(data)
    assert caught.value.hint


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.floats(0, 1, exclude_max=True))
def test_cut_off_anywhere_is_found_without_loading(exported: Any, tmp_path: Path, kept: float) -> None:
    data, path = exported.path.read_bytes(), tmp_path / "model.pte"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(BundleError, match=r"is cut off or damaged|is not an ExecuTorch program"):
        check_pte(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.binary(min_size=40, max_size=40))
def test_sizes_in_a_header_are_bounded_by_the_file(exported: Any, tmp_path: Path, header: bytes) -> None:
    """Any numbers behind the right identifiers: taken only where all parts lie in the file."""
    data, path = exported.path.read_bytes(), tmp_path / "model.pte"
    start = data[:16] + header[16:]
    path.write_bytes(start + data[40:])
    program, segments, size = struct.unpack("<QQQ", start[16:])
    fits = 40 <= program <= len(data) and (not segments or program <= segments) and segments + size <= len(data)
    if fits:
        check_pte(path)
    else:
        with pytest.raises(BundleError, match="is cut off or damaged"):
            check_pte(path)


def test_operator_of_a_newer_executorch(load: Load, edited: Any) -> None:
    def rename(plan: Any) -> None:
        next(operator for operator in plan.operators if operator.name == "llama::custom_sdpa").name = "llama::next_sdpa"

    with pytest.raises(BundleError, match="operators that this ExecuTorch does not have"):
        load(edited(rename))


def test_delegate_that_is_not_here(load: Load, edited: Any) -> None:
    def rename(plan: Any) -> None:
        plan.delegates[0].id = "NextBackend"

    with pytest.raises(BundleError, match="a delegate or data that are not there"):
        load(edited(rename))


def test_program_that_crashes_takes_only_its_trial_along(load: Load, edited: Any, exported: Any) -> None:
    """Well-formed, and aborts where it runs: the arguments of the first kernel are all the same value."""

    def confuse(plan: Any) -> None:
        call = plan.chains[0].instructions[0].instr_args
        call.args = [call.args[0]] * len(call.args)

    crashed = "code 3" if os.name == "nt" else "it crashed with SIGABRT"
    with pytest.raises(BundleError, match=crashed) as caught:
        load(edited(confuse))
    assert caught.value.message.startswith("model.pte does not run on ExecuTorch")
    assert load(exported.path.read_bytes()).decoder().length == 0


def test_scrambled_program_is_refused(load: Load, exported: Any) -> None:
    data = bytearray(exported.path.read_bytes())
    (size,) = struct.unpack_from("<Q", data, 16)
    middle = size // 2
    data[middle : middle + 200] = b"\xff" * 200
    with pytest.raises(BundleError, match=r"a malformed program|crashed|not loaded|does not run"):
        load(bytes(data))


def test_trial_is_made_once_for_a_file(
    load: Load, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def counted(module: str, task: Any, **options: Any) -> dict[str, Any]:
        tried.append(module)
        return child.run_child(module, task, **options)

    monkeypatch.setattr(program_trial, "run_child", counted)
    data = exported.path.read_bytes()
    load(data)
    options = RuntimeOptions(threads=1)
    renamed = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-renamed"))
    monkeypatch.setattr(program_trial, "cache_directory", lambda: renamed / "cache")
    ExecuTorchBackend(renamed, exported.graph, context=CONTEXT, options=options)
    assert len(tried) == 1, "a bundle is written aside and renamed"
    os.utime(renamed / "model.pte", ns=(0, 0))
    ExecuTorchBackend(renamed, exported.graph, context=CONTEXT, options=options)
    assert len(tried) == 2
