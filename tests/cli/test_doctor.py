"""edgekit doctor: what it finds here, what it says of packages that are missing, and a profile of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgekit import doctor
from edgekit.cli import main
from edgekit.registry import FORMAT_EXTRAS, OPTIONAL
from edgekit.target import load_target


def examined(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert main(["doctor", "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_it_tells_the_machine_packages_and_providers(capsys: pytest.CaptureFixture[str]) -> None:
    found = examined(capsys)
    assert found["machine"]["cores"] >= 1  # type: ignore[index]
    assert found["packages"]["onnxruntime"]  # type: ignore[index]
    extras = {*FORMAT_EXTRAS, *(extra for _, extra in OPTIONAL.values())}
    assert {extra["name"] for extra in found["extras"]} == extras  # type: ignore[attr-defined]
    assert "cpu" in {provider["name"] for provider in found["providers"] if not provider["problem"]}  # type: ignore[attr-defined]
    assert found["calibration"] is None


def test_missing_packages_come_with_their_pip_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "gguf" else version(name))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "[convert]" in line)
    assert "gguf missing" in line
    assert line.endswith('pip install "edgekit-toolkit[convert]"')


def test_calibration_writes_a_profile_that_the_plan_uses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sample_gguf: Path
) -> None:
    path = tmp_path / "mine.toml"
    assert main(["doctor", "--calibrate", "--out", str(path), "--json"]) == 0
    calibration = json.loads(capsys.readouterr().out)["calibration"]
    target = load_target(path)
    assert calibration["extends"] == target.extends
    assert target.memory.bandwidth_bytes_per_s == calibration["bandwidth_bytes_per_s"] > 10**8
    assert target.cpu.int8_ops_per_s == calibration["int8_ops_per_s"] > calibration["float32_ops_per_s"] / 4 > 0
    assert all(source.startswith(("measured, ", "estimate, ")) for source in target.sources.values())
    assert main(["plan", str(sample_gguf), "--target", str(path), "--json"]) == 0
    speed = json.loads(capsys.readouterr().out)["speed"]
    assert main(["plan", str(sample_gguf), "--target", "raspberry-pi-zero-2w", "--json"]) in (0, 1)
    assert speed["decode_tokens_per_s"] > json.loads(capsys.readouterr().out)["speed"]["decode_tokens_per_s"]
    assert main(["doctor", "--calibrate", "--out", str(path)]) == 1
    assert "--force" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.toml"]
