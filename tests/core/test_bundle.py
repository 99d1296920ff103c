"""A manifest is untrusted: whatever it says, opening a bundle gives a bundle that is whole, or a BundleError."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgekit
from edgekit import BundleError, open_bundle
from edgekit.bundle import hash_file, list_files

WEIGHTS = "onnx/model.onnx.data"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def whole(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle. Only its manifest may be changed, by a test that writes it anew."""
    out = tmp_path_factory.mktemp("bundles") / "whole.edgekit"
    edgekit.convert(tiny_model("llama"), target="raspberry-pi-5", quant="int8", out=out)
    shutil.copy(out / "edgekit.json", out.parent)
    return out


@pytest.fixture
def own(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    copy = Path(shutil.copytree(whole, tmp_path / "own.edgekit"))
    shutil.copy(whole.parent / "edgekit.json", copy)
    return copy


def _manifest(bundle: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((bundle.parent / "edgekit.json").read_text(encoding="utf-8"))
    return values


def _places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document; of long lists the first two items."""
    yield path
    items = values.items() if isinstance(values, dict) else enumerate(values[:2]) if isinstance(values, list) else ()
    for key, value in items:
        yield from _places(value, (*path, key))


def _replaced(values: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """`change(container, key)` at a path of the document."""
    document = [values]
    container: Any = document
    for key in (0, *path[:-1]):
        container = container[key]
    if path:
        change(container, path[-1])
    else:
        change(document, 0)
    return document[0] if document else None


def _opens(bundle: Path, manifest: object) -> bool:
    """Whether a bundle with this manifest opens, and is whole then."""
    (bundle / "edgekit.json").write_text(json.dumps(manifest), encoding="utf-8")
    try:
        opened = open_bundle(bundle, check_hashes=False)
    except BundleError:
        return False
    json.dumps(opened.manifest.to_json())
    assert opened.program().context > 0
    assert all((bundle / name).is_file() for name in opened.manifest.files)
    return True


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_value_is_an_error_or_a_valid_bundle(whole: Path, data: st.DataObject) -> None:
    values = _manifest(whole)
    path = data.draw(st.sampled_from(list(_places(values))))
    new = data.draw(JSON)

    def change(container: Any, key: Any) -> None:
        container[key] = new

    _opens(whole, _replaced(values, path, change))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_lost_key_is_an_error_or_a_valid_bundle(whole: Path, data: st.DataObject) -> None:
    values = _manifest(whole)
    path = data.draw(st.sampled_from([path for path in _places(values) if path]))

    def change(container: Any, key: Any) -> None:
        del container[key]

    _opens(whole, _replaced(values, path, change))


REQUIRED = """schema_version edgekit_version model target plan programs tokenizer generation_defaults files provenance
programs.0.format programs.0.files programs.0.inputs programs.0.outputs programs.0.cache programs.0.context
programs.0.vocab_size programs.0.rope_switch programs.0.weights programs.0.quality programs.0.cache.layers
programs.0.cache.dtype tokenizer.eos_token_ids tokenizer.special_tokens programs.0.inputs.tokens
programs.0.outputs.logits programs.0.weights.0.role programs.0.weights.0.relative_error"""


@pytest.mark.parametrize("place", REQUIRED.split())
def test_required_field_is_asked_for(place: str, own: Path, whole: Path) -> None:
    path = tuple(int(part) if part.isdigit() else part for part in place.split("."))

    def change(container: Any, key: Any) -> None:
        del container[key]

    assert not _opens(own, _replaced(_manifest(whole), path, change))


def test_unchanged_manifest_opens(own: Path, whole: Path) -> None:
    values = _manifest(whole)
    assert _opens(own, values)
    assert json.loads(json.dumps(open_bundle(own).manifest.to_json())) == values


def test_unknown_keys_are_ignored(own: Path, whole: Path) -> None:
    assert _opens(own, _manifest(whole) | {"a_later_field": {"of": ["any", "kind"]}})


@pytest.mark.parametrize(
    "name",
    ["../a", "/etc/passwd", "onnx/../../a", "./tokenizer.json", "onnx//a", "a\\b", "C:a", "a\0b", "", ".", "..", "a/"],
)
def test_path_out_of_the_bundle_is_refused(name: str, own: Path, whole: Path) -> None:
    values = _manifest(whole)
    values["files"][name] = values["files"][WEIGHTS]
    (own / "edgekit.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(BundleError, match="not a path in the bundle"):
        open_bundle(own)


@pytest.mark.parametrize("value", [10**400, -(10**400), "0.1", None, [0.1]])
def test_quality_that_is_no_number_is_refused(value: Any, own: Path, whole: Path) -> None:
    values = _manifest(whole)
    values["programs"][0]["quality"]["kl_mean"] = value
    assert not _opens(own, values)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("npu", {"htp_arch": "73", "backend_path": "/tmp/libevil.so"}),
        ("npu", {"soc_model": 60}),
        ("contexts", ["../prefill.onnx", "../decode.onnx"]),
        ("contexts", ["/tmp/prefill.onnx", "/tmp/decode.onnx"]),
        ("contexts", ["onnx/model.onnx"]),
    ],
)
def test_program_names_no_library_and_no_file_outside(field: str, value: Any, own: Path, whole: Path) -> None:
    """What goes to an NPU's tools is steered by nothing but the chip, and by files of the bundle."""
    values = _manifest(whole)
    values["programs"][0][field] = value
    assert not _opens(own, values)


def test_what_an_npu_is_told_is_read(own: Path, whole: Path) -> None:
    values = _manifest(whole)
    told = {"htp_arch": "73", "soc_model": "60"}
    values["programs"][0] |= {"npu": told, "contexts": ["onnx/model.onnx", WEIGHTS]}
    assert _opens(own, values)
    assert open_bundle(own).program().graph.npu == told


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_link_out_of_the_bundle_is_refused(kind: str, own: Path) -> None:
    name = "tokenizer.json" if kind == "file" else "onnx"
    (own / name).rename(own.parent / name)
    (own / name).symlink_to(own.parent / name)
    with pytest.raises(BundleError):
        open_bundle(own)


@pytest.mark.parametrize("name", [".DS_Store", "onnx/._model.onnx", "Thumbs.db", "onnx/desktop.ini"])
def test_what_file_managers_leave_is_no_change(name: str, own: Path) -> None:
    (own / name).write_bytes(b"x")
    open_bundle(own)


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes on disk")
def test_pipe_in_place_of_a_file_is_refused(own: Path) -> None:
    (own / "tokenizer.json").unlink()
    os.mkfifo(own / "tokenizer.json")
    with pytest.raises(BundleError):
        open_bundle(own)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"1", b"\xff\xfe", b"[" * 100_000, b'{"schema_version": 1e999}']
)
def test_manifest_that_is_no_manifest_is_refused(content: bytes, own: Path) -> None:
    (own / "edgekit.json").write_bytes(content)
    with pytest.raises(BundleError):
        open_bundle(own)


def test_huge_manifest_is_not_read(own: Path) -> None:
    with (own / "edgekit.json").open("r+b") as handle:
        handle.truncate(10**12)  # a sparse file: takes no room
    with pytest.raises(BundleError, match="too large"):
        open_bundle(own)


def test_hashes_can_be_left_unchecked_but_not_sizes(own: Path) -> None:
    content = bytearray((own / WEIGHTS).read_bytes())
    content[0] ^= 1
    (own / WEIGHTS).write_bytes(content)
    open_bundle(own, check_hashes=False)
    with pytest.raises(BundleError, match="SHA-256"):
        open_bundle(own)
    (own / WEIGHTS).write_bytes(content[:-1])
    with pytest.raises(BundleError, match="bytes, the manifest says"):
        open_bundle(own, check_hashes=False)


def test_listed_files_are_all_but_the_manifest(own: Path) -> None:
    files = list_files(own)
    assert list(files) == sorted(files)
    assert set(files) == {"goldens.json", "onnx/model.onnx", WEIGHTS, "tokenizer.json"}
    assert files[WEIGHTS]["sha256"] == hash_file(own / WEIGHTS)


def test_program_is_chosen_by_format(own: Path) -> None:
    bundle = open_bundle(own)
    assert bundle.program() is bundle.program("onnx") is bundle.manifest.programs[0]
    with pytest.raises(BundleError, match="has no coreml program"):
        bundle.program("coreml")


@pytest.mark.parametrize("others", [None, [], {}, {"onnx": 3}, {"onnx-qdq": {"quant": "int4"}}])
def test_plan_of_a_program_is_the_first_ones_where_there_is_no_other(others: Any, own: Path, whole: Path) -> None:
    values = _manifest(whole)
    values["plan"]["other_programs"] = others
    assert _opens(own, values)
    opened = open_bundle(own)
    assert opened.plan_of(opened.program()) == values["plan"]
    other = {"quant": "fp32"}
    values["plan"]["other_programs"] = {"onnx": other}
    assert _opens(own, values)
    opened = open_bundle(own)
    assert opened.plan_of(opened.program()) == other
