"""Disks that are too small for a program are refused before any work, whatever its format."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgekit.converters.disk_space import writing
from edgekit.errors import ConversionError
from edgekit.plan import make_plan
from edgekit.quiet import quieted
from edgekit.registry import CONVERTERS, FORMAT_EXTRAS, load_attribute
from edgekit.source import open_source
from edgekit.target import load_target

INSTALLED = [format for format, (modules, _) in FORMAT_EXTRAS.items() if all(map(find_spec, modules))]


@pytest.mark.parametrize("format", ["onnx", *INSTALLED])
def test_small_disk_is_refused_first(
    format: str, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(tiny_model("llama"))
    plan = make_plan(
        source, load_target("linux-x86-64" if format == "litert" else "iphone-16"), format=format, context=64
    )
    with quieted():
        export = load_attribute(CONVERTERS[format])
    needed = plan.memory.weights_bytes
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(ConversionError, match="no space left: the weights need") as caught:
        export(source, plan, tmp_path / "bundle")
    assert "--out" in str(caught.value.hint)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_file_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.mkdir()
    with pytest.raises(ConversionError, match=r"model\.bin can't be written: "), writing(path):
        path.write_bytes(b"")
