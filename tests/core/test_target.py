"""Device profiles: the built-in ones load, a user's own is checked key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import TargetError
from edgekit.target import Target, list_targets, load_target

FOLDER = Path(__file__).parents[2] / "targets"
GOOD: dict[str, str] = {
    "name": '"A board"',
    "memory_bytes": "4_000_000_000",
    "app_memory_bytes": "3_000_000_000",
    "bandwidth_bytes_per_s": "10_000_000_000",
    "threads": "4",
    "int8_ops_per_s": "100_000_000_000",
    "formats": '["onnx"]',
    "int8_activations": "true",
    "sources": '{ name = "me" }',
}


def written(tmp_path: Path, **changes: str | None) -> Path:
    lines = [f"{key} = {value}" for key, value in (GOOD | changes).items() if value is not None]
    path = tmp_path / "my-board.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_every_profile_is_listed_by_id() -> None:
    ids = [target.id for target in list_targets()]
    assert ids == sorted(path.stem for path in FOLDER.glob("*.toml"))
    assert {"raspberry-pi-5", "linux-x86-64"} <= set(ids)


@pytest.mark.parametrize("target", list_targets(), ids=lambda target: target.id)
def test_profile_is_plausible_and_says_its_sources(target: Target) -> None:
    assert target.id == target.id.lower().replace("_", "-")
    assert 1e9 < target.app_memory_bytes <= target.memory_bytes < 1e12
    assert 1e9 < target.bandwidth_bytes_per_s < 1e12
    assert 1 <= target.threads <= 32
    assert "onnx" in target.formats
    figures = {"memory_bytes", "app_memory_bytes", "bandwidth_bytes_per_s", "threads", "int8_ops_per_s"}
    assert figures <= set(target.sources)


def test_own_file_loads_with_its_name_as_id(tmp_path: Path) -> None:
    target = load_target(written(tmp_path))
    assert (target.id, target.threads, target.formats) == ("my-board", 4, ("onnx",))
    assert target.to_json()["formats"] == ["onnx"]
    assert load_target(str(tmp_path / "my-board.toml")) == target


def test_unknown_target_suggests_the_nearest() -> None:
    with pytest.raises(TargetError, match="'rasberry-pi5' is not known") as caught:
        load_target("rasberry-pi5")
    assert str(caught.value.hint).startswith("did you mean raspberry-pi-5? known: ")


@pytest.mark.parametrize("name", ["toaster", "", "../targets/pixel-9-pro", "/etc/passwd", "a\0b"])
def test_unknown_target_lists_the_known(name: str) -> None:
    with pytest.raises(TargetError, match="is not known") as caught:
        load_target(name)
    assert "linux-x86-64" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ram": "3"}, "the key 'ram' is not known"),
        ({"threads": None}, "has no threads"),
        ({"threads": "0"}, "threads is 0"),
        ({"threads": "true"}, "threads is True"),
        ({"threads": "2.0"}, "threads is 2.0"),
        ({"name": "3"}, "name is 3"),
        ({"int8_activations": "1"}, "int8_activations is 1"),
        ({"formats": '"onnx"'}, "formats is 'onnx'"),
        ({"formats": "[]"}, "formats is []"),
        ({"formats": "[1]"}, "formats is [1]"),
        ({"sources": "{ name = 3 }"}, "sources"),
        ({"app_memory_bytes": "5_000_000_000"}, "more memory than the device has"),
        ({"name": "'"}, "not valid TOML"),
    ],
)
def test_mistake_in_a_file_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        load_target(written(tmp_path, **changes))
    assert words in caught.value.message
    assert "my-board.toml" in caught.value.message


def test_missing_file_is_a_target_error(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be read"):
        load_target(tmp_path / "none.toml")
