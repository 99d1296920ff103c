"""Rehearsals around a bundle's measured peak: what they say, what enforces the limit, and that the plan agrees."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import edgekit
from edgekit import memory_limit
from edgekit.cli import main
from edgekit.memory_limit import make_control_group
from edgekit.rehearse import Rehearsal, rehearse
from edgekit.target import Target, load_target

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="a child's memory is limited on Linux only")
ARGUMENTS = ["--max-tokens", "4", "--raw"]


@pytest.fixture(scope="module")
def bundle(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a large cache: 200 MB, most of what it takes. Little of that is shared with other processes."""
    source = tiny_model(
        "llama", num_attention_heads=8, num_key_value_heads=8, head_dim=64, max_position_embeddings=16384
    )
    out = tmp_path_factory.mktemp("rehearsed") / "b"
    edgekit.convert(source, target="linux-x86-64", quant="int8", context=16384, out=out, verify=False)
    return out


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`device(app_bytes)`: the file of a device whose apps may use so much."""

    def make(app_bytes: int) -> Path:
        path = tmp_path_factory.mktemp("targets") / "synthetic.toml"
        path.write_text(
            f'extends = "raspberry-pi-5"\n[memory]\napp_bytes = {app_bytes}\n'
            '[sources]\nmemory = "estimate, 2026-11: made up for a test"\n',
            encoding="utf-8",
        )
        return path

    return make


@pytest.fixture(scope="module")
def peak(bundle: Path, device: Any) -> int:
    """What the bundle takes with all the memory that it wants."""
    found, code, _ = rehearsed(bundle, load_target(device(4_000_000_000)))
    assert (found.survived, code) == (True, 0)
    return found.peak_rss_bytes


def rehearsed(bundle: Path, target: Target) -> tuple[Rehearsal, int, str]:
    return rehearse(bundle, target, ["run", str(bundle), "hello", *ARGUMENTS], captured=True)


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("is_watched", [False, True], ids=["best limit here", "watched"])
@pytest.mark.parametrize(("part", "survives"), [(0.7, False), (1.3, True)])
def test_rehearsal_and_plan_agree_around_the_measured_peak(
    bundle: Path, device: Any, peak: int, part: float, survives: bool, is_watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_watched:
        monkeypatch.setattr(memory_limit, "make_control_group", lambda limit_bytes: None)
    found, code, output = rehearsed(bundle, load_target(device(int(part * peak))))
    assert (found.survived, found.planned_to_fit) == (survives, "yes" if survives else "no")
    assert (code, bool(output)) == (0 if survives else 1, survives)
    assert (
        found.enforced_by == "watched-rss"
        if is_watched
        else found.enforced_by in ("cgroup-v1", "cgroup-v2", "watched-rss")
    )
    assert 0 < found.peak_rss_bytes < 1.05 * peak


@linux_only
def test_killed_rehearsal_is_told_plainly(bundle: Path, device: Any, capfd: pytest.CaptureFixture[str]) -> None:
    code = main(["run", str(bundle), "hello", *ARGUMENTS, "--rehearse", str(device(100_000_000)), "--json"])
    printed = capfd.readouterr()
    assert code == 1
    assert json.loads(printed.out)["rehearsal"]["survived"] is False
    assert "rehearsed on synthetic: is killed for memory" in printed.err
    assert "hint: convert with fewer bits" in printed.err
    assert "Traceback" not in printed.err


@linux_only
def test_verify_is_rehearsed_with_its_rows(bundle: Path, device: Any, capfd: pytest.CaptureFixture[str]) -> None:
    code = main(["verify", str(bundle), f"--rehearse={device(4_000_000_000)}", "--json"])
    answer = json.loads(capfd.readouterr().out)
    assert [row["status"] for row in answer["programs"]] == ["not-compared"]
    assert (code, answer["rehearsal"]["survived"]) == (1, True)


@linux_only
def test_program_that_fails_for_another_reason_is_no_verdict(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(bundle), "hello", "--rehearse", "linux-x86-64", "--provider", "qnn"]) == 1
    assert "not for memory" in capfd.readouterr().err


def test_elsewhere_it_is_not_rehearsed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_limit, "sys", SimpleNamespace(platform="win32"))
    assert main(["run", str(bundle), "hello", *ARGUMENTS, "--rehearse", "raspberry-pi-5", "--json"]) == 0
    printed = capfd.readouterr()
    answer = json.loads(printed.out)
    assert answer["finish_reason"]
    assert (answer["rehearsal"]["survived"], answer["rehearsal"]["enforced_by"]) == (None, None)
    assert "not rehearsed" in printed.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "b", "hello", "--rehearse", "raspbery-pi-5"], 1, "did you mean raspberry-pi-5"),
        (
            ["verify", "b", "--rehearse", "raspberry-pi-5", "--reference", "sample"],
            2,
            "--rehearse takes no --reference",
        ),
        (
            ["verify", "b", "--rehearse", "raspberry-pi-5", "--format", "onnx", "--format", "onnx-qdq"],
            2,
            "one --format at a time",
        ),
        (["run", "nowhere.edgekit", "hello", "--rehearse", "raspberry-pi-5"], 1, "no such directory"),
    ],
)
def test_bad_input(arguments: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    assert message in capfd.readouterr().err


def test_groups_of_version_2_lie_beside_ones_own_and_are_limited_without_swap(tmp_path: Path) -> None:
    """The files of a group are plain ones here: this machine's kernel gives memory to version 1."""
    own = tmp_path / "user.slice" / "app.slice" / "shell.scope"
    own.mkdir(parents=True)
    mounts, groups = tmp_path / "mounts", tmp_path / "cgroup"
    mounts.write_text(f"cgroup2 {tmp_path} cgroup2 rw,nosuid 0 0\n", encoding="ascii")
    groups.write_text("0::/user.slice/app.slice/shell.scope\n", encoding="ascii")
    group = make_control_group(123_456_789, mounts, groups)
    assert group is not None
    assert (group.version, group.directory.parent) == (2, own.parent)
    assert (group.directory / "memory.max").read_text(encoding="ascii") == "123456789"
    (group.directory / "memory.swap.max").write_text("max", encoding="ascii")
    (group.directory / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n", encoding="ascii")
    group.set_limit(1)
    assert (group.directory / "memory.swap.max").read_text(encoding="ascii") == "0"
    assert group.oom_kills == 1


def test_without_permission_there_is_no_group(tmp_path: Path) -> None:
    mounts, groups = tmp_path / "mounts", tmp_path / "cgroup"
    mounts.write_text(
        "cgroup /nowhere/memory cgroup rw,memory 0 0\ncgroup2 /nowhere cgroup2 rw 0 0\n", encoding="ascii"
    )
    groups.write_text("4:memory:/here\n0::/here\n", encoding="ascii")
    assert make_control_group(1_000_000, mounts, groups) is None


def test_system_that_hides_its_groups_has_none(tmp_path: Path) -> None:
    assert make_control_group(1_000_000, tmp_path / "mounts", tmp_path / "cgroup") is None
