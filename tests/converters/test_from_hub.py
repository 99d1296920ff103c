"""Opening hub ids through huggingface_hub's own cache, offline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub import errors

from edgekit.errors import SourceError
from edgekit.source import open_source

COMMIT, OTHER_COMMIT = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture
def cache(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with org/tiny at one commit, which `main` and `v1` name."""
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(tiny_model("llama"), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT, encoding="utf-8")
    # huggingface_hub reads its environment once, on import.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(repository.parent))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository.parent


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_cached_model_opens_offline_and_records_its_commit(revision: str, cache: Path) -> None:
    source = open_source("org/tiny" + revision)
    assert (source.provenance.name, source.provenance.revision) == ("org/tiny", COMMIT)
    assert source.weight_files[0].is_relative_to(cache)


@pytest.mark.parametrize("location", ["org/other", f"org/tiny@{OTHER_COMMIT}", "org/tiny@v2"])
def test_what_is_not_cached_is_an_error_that_says_what_to_check(location: str, cache: Path) -> None:
    with pytest.raises(SourceError, match=r"org/\w+ can't be downloaded and is not complete in the cache") as caught:
        open_source(location)
    assert "HF_HUB_OFFLINE" in str(caught.value.hint)


def test_snapshot_without_weights_says_so(cache: Path) -> None:
    (cache / "models--org--tiny" / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"no \*\.safetensors"):
        open_source("org/tiny")


@pytest.mark.parametrize("location", ["org/.bad..name", "org/" + "x" * 120, "org/na me", "or--g/x"])
def test_invalid_id_is_refused(location: str, cache: Path) -> None:
    with pytest.raises(SourceError, match="is not a valid hub id") as caught:
        open_source(location)
    assert "org/name" in str(caught.value.hint)


def response(status: int) -> Any:
    return type("Response", (), {"status_code": status, "headers": {}, "request": None, "text": ""})()


@pytest.mark.parametrize(
    ("error", "words", "hint"),
    [
        (errors.GatedRepoError("x", response=response(403)), "is gated", "HF_TOKEN"),
        (errors.RepositoryNotFoundError("x", response=response(404)), "is not on the hub", "spelling"),
        (errors.RevisionNotFoundError("x", response=response(404)), "has no revision 'v9'", "branch, tag or commit"),
        (errors.HfHubHTTPError("x", response=response(500)), "can't be downloaded", "network"),
        (RuntimeError("a proxy's own error"), "can't be downloaded", "network"),
        (OSError(28, "No space left on device"), "can't be downloaded", "network"),
    ],
)
def test_errors_of_the_hub_are_told_in_one_line(
    error: Exception, words: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SourceError) as caught:
        open_source("org/tiny@v9")
    assert words in caught.value.message
    assert hint in str(caught.value.hint)
    assert caught.value.__cause__ is error


def test_only_what_is_read_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["README.md", "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    wanted += ["chat_template.jinja", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"]
    others = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "onnx/config.json"]
    others += ["pytorch_model.bin", "original/tokenizer.model", "fp16/model.safetensors", "sample.txt"]
    fetched: list[str] = []
    utils: Any = huggingface_hub.utils

    def download(*_: object, allow_patterns: list[str], ignore_patterns: list[str], **__: object) -> str:
        files = utils.filter_repo_objects(
            [*wanted, *others], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        fetched.extend(files)
        return str(cache / "models--org--tiny" / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_source("org/tiny")
    assert fetched == wanted


def test_environment_variables_of_the_hub_count(cache: Path) -> None:
    code = "import sys; from edgekit.source import open_source as o; print(o('org/tiny').provenance.revision)"
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == COMMIT
