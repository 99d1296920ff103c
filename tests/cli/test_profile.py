"""`edgekit profile` on a tiny bundle: real processes, and the JSON that other tools read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import hash_file
from edgekit.profile_record import read_profile

SPREAD = {"median", "min", "max"}
# The contract of `profile --json` (design), and what was added to it.
CONTRACT: dict[str, Any] = {
    "load_s": SPREAD,
    "ttft_s": SPREAD,
    "prefill_tokens_per_s": SPREAD,
    "decode_tokens_per_s": SPREAD,
    "peak_rss_bytes": int,
    "bytes_per_token": int,
    "bandwidth_bytes_per_s": int,
    "roofline_fraction": float,
    "machine": {"system", "architecture", "processor", "cores", "memory_bytes", "python", "onnxruntime"},
    "bundle_sha256": str,
    "kind": str,
    "schema_version": int,
    "bundle": str,
    "format": str,
    "executed": str,
    "provider": str,
    "provider_reason": str,
    "threads": int,
    "date": str,
    "new_tokens": int,
    "between_tokens_s": SPREAD | {"p95"},
    "idle_rss_bytes": int,
    "weights_bytes": int,
    "bandwidth_basis": str,
    "cold": {"files", "start_s", "load_s", "ttft_s", "runs"},
    "lengths": list,
    "sustained": {"seconds", "kept_fraction", "samples"},
    "plan": {"target", "decode_tokens_per_s", "prefill_tokens_per_s", "total_bytes"},
}
LENGTH = {
    "prompt_tokens",
    "prompt_sha256",
    "ttft_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "between_tokens_s",
    "peak_rss_bytes",
    "runs",
}


@pytest.fixture(scope="module")
def profiled(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One profile of the tiny bundle, with all that can be asked for."""
    from click.testing import CliRunner

    from edgekit.cli.profile import command

    report = tmp_path_factory.mktemp("profile") / "report.html"
    arguments = ["--prompt-tokens", "32", "--prompt-tokens", "8", "--new-tokens", "6", "--runs", "1", "--threads", "1"]
    arguments += ["--sustained", "1", "--target", "raspberry-pi-5", "--html", str(report), "--json"]
    done = CliRunner().invoke(command, [str(tiny_bundle), *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    values: dict[str, Any] = json.loads(done.stdout)
    return values | {"report": report}


@pytest.fixture
def values(profiled: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in profiled.items() if key != "report"}


def test_json_has_the_promised_keys(values: dict[str, Any]) -> None:
    assert set(values) == set(CONTRACT)
    for key, expected in CONTRACT.items():
        if isinstance(expected, set):
            assert set(values[key]) == expected, key
        else:
            assert isinstance(values[key], expected), key
    assert all(set(length) == LENGTH for length in values["lengths"])


def test_figures_agree_with_each_other_and_the_bundle(values: dict[str, Any], tiny_bundle: Path) -> None:
    manifest = json.loads((tiny_bundle / "edgekit.json").read_text(encoding="utf-8"))
    program = manifest["programs"][0]
    weights = sum(weight["size_bytes"] for weight in program["weights"])
    assert values["bundle_sha256"] == hash_file(tiny_bundle / "edgekit.json")
    assert values["weights_bytes"] == weights
    looked_up = next(weight["size_bytes"] for weight in program["weights"] if weight["role"] == "embedding")
    cache = program["cache"]
    token_bytes = 2 * cache["layers"] * cache["kv_heads"] * cache["head_dim"] * 4
    assert values["bytes_per_token"] == weights - looked_up + (32 + 3) * token_bytes  # halfway through 6 new tokens
    used = values["decode_tokens_per_s"]["median"] * values["bytes_per_token"]
    assert values["roofline_fraction"] == pytest.approx(used / values["bandwidth_bytes_per_s"])
    assert values["bandwidth_basis"] == "as raspberry-pi-5 has it"
    assert values["plan"]["total_bytes"] == manifest["plan"]["memory"]["total_bytes"]
    assert (values["executed"], values["provider"], values["threads"]) == ("onnxruntime", "cpu", 1)


def test_prompts_have_the_lengths_that_were_asked_for(values: dict[str, Any]) -> None:
    assert [length["prompt_tokens"] for length in values["lengths"]] == [32, 8]
    first = values["lengths"][0]
    assert {key: values[key] for key in ("ttft_s", "decode_tokens_per_s")} == {
        key: first[key] for key in ("ttft_s", "decode_tokens_per_s")
    }
    (run,) = first["runs"]
    assert len(run["between_tokens_s"]) == 5
    assert 0 < run["load_s"] < run["start_s"]
    assert 10**7 < run["idle_rss_bytes"] <= run["peak_rss_bytes"] == first["peak_rss_bytes"]


def test_sustained_samples_go_on_for_as_long(values: dict[str, Any]) -> None:
    samples = values["sustained"]["samples"]
    assert samples[-1]["time_s"] == values["sustained"]["seconds"] >= 1
    assert all(sample["decode_tokens_per_s"] > 0 for sample in samples)


def test_report_is_written(profiled: dict[str, Any]) -> None:
    text = profiled["report"].read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert text.count("<svg") >= 4
    assert profiled["bundle_sha256"] in text


def test_saved_profile_compares_with_itself(cli: Any, values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    assert json.loads(json.dumps(read_profile(path).to_json())) == values
    result = cli("profile", "--compare", path, path)
    assert result.code == 0
    assert "too few runs" in result.out
    compared = json.loads(cli("profile", "--compare", path, path, "--json").out)
    assert {figure["ratio"] for figure in compared["figures"]} == {1.0}


def test_text_is_a_table(cli: Any, tiny_bundle: Path) -> None:
    result = cli(
        "profile", tiny_bundle, "--prompt-tokens", 8, "--new-tokens", 2, "--runs", 1, "--target", "raspberry-pi-5"
    )
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[2].split()[0] == "prompt"
    assert "provider" in result.out


def test_a_manifest_whose_plan_holds_no_sane_numbers_gives_no_prediction(
    cli: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle, report = tmp_path / "spoilt.edgekit", tmp_path / "report.html"
    shutil.copytree(tiny_bundle, bundle)
    manifest = json.loads((bundle / "edgekit.json").read_text(encoding="utf-8"))
    manifest["plan"]["speed"] |= {"decode_tokens_per_s": float("nan"), "prefill_tokens_per_s": 10**400}
    manifest["plan"]["memory"]["total_bytes"] = float("inf")
    (bundle / "edgekit.json").write_text(json.dumps(manifest), encoding="utf-8")
    result = cli("profile", bundle, "--runs", 1, "--prompt-tokens", 8, "--new-tokens", 2, "--html", report, "--json")
    assert (result.code, json.loads(result.out)["plan"]) == (0, None), result.err
    assert "planned" not in report.read_text(encoding="utf-8")


def test_what_does_not_fit_is_refused(refused: Callable[..., str], tiny_bundle: Path) -> None:
    said = refused("profile", tiny_bundle, "--prompt-tokens", 250, "--new-tokens", 10)
    assert "do not fit the context of 256" in said
    assert "--prompt-tokens 246" in said


def test_what_is_no_bundle_or_profile_is_refused(
    refused: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    assert "not a bundle" in refused("profile", tmp_path)
    assert "has no other program" in refused("profile", tiny_bundle, "--format", "other")
    assert "no such folder" in refused("profile", tiny_bundle, "--html", tmp_path / "none" / "a.html")
    manifest = tiny_bundle / "edgekit.json"
    assert "is not a profile" in refused("profile", "--compare", manifest, manifest)


@pytest.mark.parametrize("arguments", [(), ("x", "--compare", "a", "b"), ("--compare", "a", "b", "--html", "c")])
def test_wrong_usage_is_told(cli: Any, arguments: tuple[str, ...]) -> None:
    result = cli("profile", *arguments)
    assert result.code == 2
    assert "Usage" in result.err
