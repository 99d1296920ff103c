"""Broken, cut off, foreign and too new .tflite files: one clean error each, and this process lives on."""

from __future__ import annotations

import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import BundleError
from edgekit.runtimes import program_trial
from edgekit.runtimes.backend_litert import LitertBackend
from edgekit.runtimes.tflite_file import check_tflite

Load = Callable[[bytes], LitertBackend]
needs_litert = pytest.mark.skipif(find_spec("ai_edge_litert") is None, reason="ai-edge-litert is not installed")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a LiteRT program: it has 0 bytes"),
        (b"PK\x03\x04" * 100, "is not a LiteRT program$"),
        (struct.pack("<I4s", 60, b"ET12") + bytes(500), "is not a LiteRT program$"),
        (struct.pack("<I4s", 28, b"TFL4") + bytes(500), "of version TFL4, this EdgeKit reads TFL3"),
        (struct.pack("<I4s", 600, b"TFL3") + bytes(500), "is cut off or damaged: it has 508 bytes"),
    ],
    ids=["empty", "zip", "pte", "newer", "rootless"],
)
def test_foreign_file_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=message) as caught:
        check_tflite(path)
    assert caught.value.hint


@given(data=st.binary(max_size=64))
def test_any_bytes_are_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tflite"
    path.write_bytes(data)
    begins = len(data) >= 12 and data[4:8] == b"TFL3" and 8 <= struct.unpack_from("<I", data)[0] <= len(data) - 4
    if begins:
        check_tflite(path)
    else:
        with pytest.raises(BundleError):
            check_tflite(path)


@pytest.fixture
def load(convert_litert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`load(data)`: these bytes as a program of a bundle, which nobody has tried yet."""
    monkeypatch.setattr(program_trial, "cache_directory", lambda: tmp_path / "cache")
    converted = program(convert_litert)

    def loaded(data: bytes) -> LitertBackend:
        path = tmp_path / converted.graph.files[0]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        found: LitertBackend = converted._replace(directory=tmp_path).load(tried=False)
        return found

    return loaded


def program(convert_litert: Any) -> Any:
    """The program that is damaged, which `test_backend_litert` runs too."""
    from .test_backend_litert import MODEL

    return convert_litert(MODEL[0], "int8", **MODEL[1])


@pytest.fixture
def sound(convert_litert: Any) -> bytes:
    converted = program(convert_litert)
    data: bytes = (converted.directory / converted.graph.files[0]).read_bytes()
    return data


@pytest.fixture
def edited(convert_litert: Any, tmp_path: Path) -> Callable[[Callable[[Any], None]], bytes]:
    """`edited(change)`: the program, well-formed, with its first function changed."""
    from ai_edge_litert.tools import flatbuffer_utils

    def edit(change: Callable[[Any], None]) -> bytes:
        converted = program(convert_litert)
        model, path = (
            flatbuffer_utils.read_model(str(converted.directory / converted.graph.files[0])),
            tmp_path / "edited",
        )
        change(model)
        flatbuffer_utils.write_model(model, str(path))
        return path.read_bytes()

    return edit


@needs_litert
@pytest.mark.slow
def test_untouched_program_is_tried_once_and_runs(
    load: Load, edited: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the others are measured by: edited without a change it runs, so the changes are what is refused."""
    logits = load(edited(lambda _: None)).decoder().forward(np.array([1, 2, 3]), rows=1, rope_length=0)
    assert np.isfinite(logits).all()
    assert len(list((tmp_path / "cache" / "litert").iterdir())) == 1


@needs_litert
@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_cut_off_program_is_refused(load: Load, sound: bytes, kept: float) -> None:
    with pytest.raises(BundleError, match=r"model\.tflite (does not run on LiteRT|is not loaded)") as caught:
        load(sound[: int(len(sound) * kept)])
    assert "\n" not in caught.value.message
    assert caught.value.hint


@needs_litert
@pytest.mark.slow
def test_program_that_crashes_takes_only_its_trial_along(load: Load, edited: Any) -> None:
    """Well-formed, and not to be computed: a matrix is larger than its numbers."""

    def shorten(model: Any) -> None:
        largest = max(model.buffers, key=lambda buffer: 0 if buffer.data is None else len(buffer.data))
        largest.data = largest.data[:16]

    with pytest.raises(BundleError, match=r"model\.tflite does not run on LiteRT"):
        load(edited(shorten))


@needs_litert
@pytest.mark.slow
def test_operator_of_a_newer_litert(load: Load, edited: Any) -> None:
    def renew(model: Any) -> None:
        model.operatorCodes[0].version = 99

    with pytest.raises(BundleError, match=r"does not run on LiteRT.*version '99'"):
        load(edited(renew))


@needs_litert
@pytest.mark.slow
def test_context_over_the_fixed_one_is_refused(convert_litert: Any) -> None:
    with pytest.raises(BundleError, match="is not the program that the manifest describes"):
        program(convert_litert).load(context=97)


@needs_litert
@pytest.mark.slow
def test_tokens_outside_of_the_vocabulary_are_refused(convert_litert: Any) -> None:
    with pytest.raises(ValueError, match="tokens outside of a vocabulary of 320"):
        program(convert_litert).load().decoder().forward(np.array([320]), rows=1, rope_length=0)
