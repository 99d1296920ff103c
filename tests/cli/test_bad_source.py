"""Checkpoints and requests that can't be converted: one error line, one hint, exit code 1, and nothing left on disk."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgekit.converters import weight_writer

TARGET = ("--target", "raspberry-pi-5")


def _edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | changes), encoding="utf-8")


def _empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def _truncated(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20_000])


def _header_only(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x10")


def _with_nan(model: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _unsupported_type(model: Path) -> None:
    _edit(model / "config.json", model_type="mamba")


def _quantized(model: Path) -> None:
    _edit(model / "config.json", quantization_config={"quant_method": "fp8"})


def _other_shape(model: Path) -> None:
    _edit(model / "config.json", intermediate_size=128)


def _broken_config(model: Path) -> None:
    (model / "config.json").write_text("{", encoding="utf-8")


def _broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}", encoding="utf-8")


def _hostile_template(model: Path) -> None:
    _edit(model / "tokenizer_config.json", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")


def _endless_template(model: Path) -> None:
    _edit(model / "tokenizer_config.json", chat_template="{% for i in range(10**9) %}x{% endfor %}")


BAD_SOURCES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (shutil.rmtree, "no/such/place"),
    "empty": (_empty, "config.json is missing"),
    "truncated": (_truncated, "the file has 20,000"),
    "no header": (_header_only, "model.safetensors"),
    "not a number": (_with_nan, "tensor model.layers.1.mlp.down_proj.weight holds values that are not finite"),
    "unsupported": (_unsupported_type, "'mamba' is not supported"),
    "quantized": (_quantized, "already quantized with FP8"),
    "shapes that disagree": (_other_shape, "proj.weight"),
    "broken config": (_broken_config, "config.json"),
    "broken tokenizer": (_broken_tokenizer, "tokenizer"),
    "hostile template": (_hostile_template, "the chat template does something that is not allowed"),
    "endless template": (_endless_template, "the chat template failed"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_source_is_refused(case: str, refused: Any, tiny_model: Any, tmp_path: Path) -> None:
    spoil, expected = BAD_SOURCES[case]
    model, place = tmp_path / "no" / "such" / "place", tmp_path / "out"
    shutil.copytree(tiny_model("llama"), model)
    place.mkdir()
    spoil(model)
    assert expected in refused("convert", model, *TARGET, "--out", place / "a.edgekit")
    assert not list(place.iterdir())


BAD_REQUESTS: dict[str, tuple[tuple[str, ...], str]] = {
    "target": (("--target", "raspberri-pi-5"), "did you mean raspberry-pi-5"),
    "quantization": ((*TARGET, "--quant", "int5"), "'int5' is not known"),
    "recipe file": ((*TARGET, "--quant", "none.toml"), "none.toml cannot be read"),
    "context": ((*TARGET, "--context", "257"), "the model has 1 to 256"),
    "format": ((*TARGET, "--format", "tflite"), "format 'tflite' is not known"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_is_refused(case: str, cli: Any, tiny_model: Any, tmp_path: Path) -> None:
    arguments, expected = BAD_REQUESTS[case]
    result = cli("convert", tiny_model("llama"), *arguments, "--out", tmp_path / "a.edgekit")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert expected in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [("--context", "0"), ("--context", "many"), ("--frob",), ("--forc",), ()], ids=str
)
def test_wrong_usage_is_code_2(arguments: tuple[str, ...], cli: Any, tmp_path: Path) -> None:
    target = TARGET if arguments else ()
    result = cli("convert", "sample", *target, "--out", tmp_path / "a", *arguments)
    assert (result.code, result.out) == (2, "")
    assert "error: " in result.err.lower()
    assert not list(tmp_path.iterdir())


def test_existing_bundle_is_kept_without_force(refused: Any, own_bundle: Path, tiny_model: Any) -> None:
    before = (own_bundle / "edgekit.json").read_bytes()
    assert "--force" in refused("convert", tiny_model("llama"), *TARGET, "--out", own_bundle)
    assert (own_bundle / "edgekit.json").read_bytes() == before
    assert list(own_bundle.parent.iterdir()) == [own_bundle]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_is_no_bundle_is_never_overwritten(kind: str, refused: Any, tiny_model: Any, tmp_path: Path) -> None:
    place = tmp_path / "photos"
    if kind == "directory":
        place.mkdir()
        (place / "a.jpg").touch()
    else:
        place.touch()
    said = refused("convert", tiny_model("llama"), *TARGET, "--out", place, "--force")
    assert "is not a bundle and is not overwritten" in said
    assert sorted(tmp_path.rglob("*")) == ([place, place / "a.jpg"] if kind == "directory" else [place])


def test_failed_forced_conversion_keeps_the_old_bundle(
    refused: Any, own_bundle: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in own_bundle.rglob("*") if path.is_file()}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    refused("convert", tiny_model("llama"), *TARGET, "--out", own_bundle, "--force")
    assert {path: path.read_bytes() for path in own_bundle.parent.rglob("*") if path.is_file()} == before


def test_disk_without_room_is_refused_first(
    refused: Any, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "no space left" in refused("convert", tiny_model("llama"), *TARGET, "--out", tmp_path / "a.edgekit")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["weights", "manifest"])
def test_disk_that_fills_up_leaves_nothing(
    place: str, refused: Any, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "weights":
        monkeypatch.setattr(weight_writer.RegionFile, "write_rows", full)
    else:
        monkeypatch.setattr("edgekit.pipeline._write_json", full)
    said = refused("convert", tiny_model("llama"), *TARGET, "--out", tmp_path / "a.edgekit")
    assert "the disk is full" in said or "no space left" in said
    assert not list(tmp_path.iterdir())


def test_directory_that_can_not_be_written_to_is_refused(refused: Any, tiny_model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused("convert", tiny_model("llama"), *TARGET, "--out", tmp_path / "file" / "a.edgekit")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
