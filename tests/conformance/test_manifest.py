from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from edgekit import BundleError, open_bundle

SUITE = "manifest"
# how this runtime words each reason
WORDING = {
    "no-manifest": "has no edgekit.json",
    "not-json": "can't be read as JSON",
    "field": r"is not (an object$|(a|an|int|str|bool|dict|list)\b)|lists no program|lacks files|does not name its|slides over",
    "newer-schema": r"has schema \d+",
    "path": "not a path in the bundle",
    "not-listed": "does not list the file",
    "missing-file": "is missing$",
    "extra-file": "is not part of the bundle",
    "size": "bytes, the manifest says",
    "hash": "SHA-256",
}


def changed(manifest: dict[str, Any], changes: list[dict[str, Any]]) -> dict[str, Any]:
    result = copy.deepcopy(manifest)
    for change in changes:
        *path, last = change["at"]
        container: Any = result
        for key in path:
            container = container[key]
        if change.get("remove"):
            del container[last]
        else:
            container[last] = change["set"]
    return result


def write_bundle(directory: Path, case: dict[str, Any], suite: dict[str, Any]) -> None:
    for name, text in (suite["files"] | case.get("files", {})).items():
        if text is not None:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8", newline="\n")
    manifest = json.dumps(changed(suite["manifest"], case.get("changes", [])))
    text = case.get("manifest_text", manifest)
    if text is not None:
        (directory / "edgekit.json").write_text(text, encoding="utf-8")


def test_case(case: dict[str, Any], suite: dict[str, Any], tmp_path: Path) -> None:
    write_bundle(tmp_path, case, suite)
    expect = case["expect"]
    if expect.get("opens"):
        assert open_bundle(tmp_path).manifest.to_json()["schema_version"] == 1
        return
    with pytest.raises(BundleError) as caught:
        open_bundle(tmp_path)
    assert re.search(WORDING[expect["reason"]], caught.value.message), caught.value.message
