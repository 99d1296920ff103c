"""edgekit plan on the command line, and convert's refusal of what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from edgekit.cli.options import size_text
from edgekit.cli.plan_text import count_text
from edgekit.quant import RECIPES
from edgekit.target import list_targets

CLI = Callable[..., Any]
Refused = Callable[..., str]


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """`config("deepseek_v3")`: a directory with nothing but transformers' default config of that type."""

    def write(model_type: str, **changes: Any) -> Path:
        directory = tmp_path / model_type
        directory.mkdir(exist_ok=True)
        values = AutoConfig.for_model(model_type).to_dict() | changes
        (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
        return directory

    return write


def values_of(cli: CLI, *arguments: object) -> dict[str, Any]:
    result = cli("plan", *arguments, "--json")
    assert result.code == 0, result.err
    values: dict[str, Any] = json.loads(result.out)
    return values


def test_json_has_the_documented_keys(cli: CLI) -> None:
    values = values_of(cli, "sample", "--target", "raspberry-pi-5")
    assert {"model", "target", "fits", "format", "quant", "context", "cache", "memory", "speed", "notes"} <= set(values)
    lines = ("weights_bytes", "kv_bytes", "activations_bytes", "runtime_bytes", "total_bytes", "budget_bytes")
    assert set(lines) <= set(values["memory"])
    assert {"decode_tokens_per_s", "prefill_tokens_per_s", "basis"} <= set(values["speed"])
    assert values["fits"] == "yes"
    assert values["model"]["parameters"] == 134_515_008
    assert values["findings"] == []


def test_text_says_what_the_json_says(cli: CLI) -> None:
    text = cli("plan", "sample", "--target", "raspberry-pi-5").out
    assert "SmolLM2-135M-Instruct.Q4_1.gguf: llama, 135M parameters, 30 layers, context 8,192" in text
    assert "on raspberry-pi-5: fits" in text
    for line in ("format", "memory", "weights", "keys, values", "activations", "runtime", "speed"):
        assert f" {line} " in text


def test_a_model_of_hundreds_of_billions_is_planned_from_its_config(cli: CLI, config: Callable[..., Path]) -> None:
    values = values_of(cli, config("deepseek_v3"), "--target", "raspberry-pi-5")
    assert values["fits"] == "no"
    assert values["model"]["parameters"] == 671_026_404_352
    assert not values["model"]["converted"]
    assert values["notes"][0] == "EdgeKit does not convert deepseek_v3 yet"
    assert set(values["memory"]["kv_by_kind"]) == {"latent"}
    assert values["would_fit"]["target"] is None
    assert values["would_fit"]["smallest_total_bytes"] > 60e9


def test_what_would_fit_is_told(cli: CLI, config: Callable[..., Path]) -> None:
    text = cli("plan", config("gpt_oss"), "--target", "raspberry-pi-5").out
    assert "does not fit" in text
    assert "the smallest scheme" in text
    changes = {"num_hidden_layers": 24, "num_local_experts": 32}
    fitting = values_of(cli, config("gpt_oss", **changes), "--target", "raspberry-pi-5-16gb", "--quant", "int8")
    assert fitting["fits"] == "no"
    assert fitting["would_fit"]["target"] == "jetson-agx-orin"


def test_all_ranks_every_device(cli: CLI) -> None:
    plans = values_of(cli, "sample", "--target", "all")["plans"]
    assert {plan["target"] for plan in plans} == {target.id for target in list_targets()}
    order = [(plan["fits"] == "yes", plan["speed"]["decode_tokens_per_s"]) for plan in plans]
    assert order == sorted(order, reverse=True)
    rows = cli("plan", "sample", "--target", "all").out.splitlines()[2:]
    assert [row.split()[0] for row in rows] == [plan["target"] for plan in plans]


def test_limits_turn_the_question_round(cli: CLI) -> None:
    options = ("--max-ram", "300MB", "--min-speed", "40")
    values = values_of(cli, "sample", "--target", "raspberry-pi-5", *options)
    assert values["limits"] == {"max_bytes": 300_000_000, "min_tokens_per_s": 40.0}
    assert len({plan["quant"] for plan in values["plans"]}) == len(values["plans"]) > 1
    for plan in values["plans"]:
        assert plan["memory"]["total_bytes"] <= 300_000_000
        assert plan["speed"]["decode_tokens_per_s"] >= 40
    everywhere = values_of(cli, "sample", "--target", "all", *options)["plans"]
    assert len({plan["target"] for plan in everywhere}) == len(everywhere) > 1
    nothing = cli("plan", "sample", "--target", "raspberry-pi-5", "--max-ram", "50MB")
    assert (nothing.code, nothing.out.splitlines()[1:]) == (0, ["nothing keeps to these limits"])


def test_a_model_that_is_not_understood_is_unknown(cli: CLI, config: Callable[..., Path]) -> None:
    values = values_of(cli, config("bert"), "--target", "raspberry-pi-5")
    assert values["fits"] == "unknown"
    assert values["memory"] is values["speed"] is values["quant"] is None
    assert values["notes"] == ["the architecture 'bert' is not understood"]
    assert cli("plan", config("bert"), "--target", "all").out == (
        "bert: unknown, since the architecture 'bert' is not understood\n"
    )


def test_requests_are_checked_whatever_the_model(refused: Refused, config: Callable[..., Path]) -> None:
    assert "is not known" in refused("plan", config("bert"), "--target", "raspberry-pi-5", "--quant", "nonsense")
    assert "is not known" in refused("plan", config("bert"), "--target", "raspberry-pi-5", "--format", "onyx")
    assert "is not known" in refused("plan", config("bert"), "--target", "nonsense")


def test_every_recipe_is_planned_for_models_that_are_not_converted(cli: CLI, config: Callable[..., Path]) -> None:
    plans = values_of(cli, config("deepseek_v3"), "--target", "all", "--max-ram", "600GB")["plans"]
    assert plans == []
    small = config("gpt_oss", num_hidden_layers=2, num_local_experts=8)
    plans = values_of(cli, small, "--target", "raspberry-pi-5-16gb", "--max-ram", "16GB")["plans"]
    assert {plan["quant"] for plan in plans} == {name for name, scheme in RECIPES.items() if not scheme.keep}


def test_a_quantized_checkpoints_own_blocks_are_the_finest(cli: CLI) -> None:
    plans = values_of(cli, "sample", "--target", "raspberry-pi-5", "--max-ram", "1GB")["plans"]
    assert plans[0]["quant"] == "keep"


def test_what_is_only_looked_up_stays_in_the_file(cli: CLI, config: Callable[..., Path]) -> None:
    asked = (config("gemma3n_text"), "--target", "raspberry-pi-5", "--quant", "int4")
    memory = values_of(cli, *asked)["memory"]
    layers, rows = 35 * 256, 262_144
    assert memory["weights_mapped"]
    assert memory["unread_bytes"] > layers * rows // 2
    assert "of the embedding, which stay in the file" in cli("plan", *asked).out


@pytest.mark.parametrize("size", ["0", "-1GB", "2XB", "GB", "1e9", "two", "nan", "2IB", "٢GB"])
def test_an_impossible_size_is_wrong_usage(size: str, cli: CLI) -> None:
    result = cli("plan", "sample", "--target", "raspberry-pi-5", "--max-ram", size)
    assert result.code == 2
    assert "is not a size such as 2GB" in result.err


@pytest.mark.parametrize(("size", "expected"), [("2GB", 2 * 10**9), ("1.5GiB", 3 << 29), ("512 mb", 512 * 10**6)])
def test_sizes_are_read(size: str, expected: int, cli: CLI) -> None:
    values = values_of(cli, "sample", "--target", "raspberry-pi-5", "--max-ram", size)
    assert values["limits"]["max_bytes"] == expected


@pytest.mark.parametrize("speed", ["-1", "nan", "inf", "fast"])
def test_an_impossible_speed_is_wrong_usage(speed: str, cli: CLI) -> None:
    result = cli("plan", "sample", "--target", "raspberry-pi-5", "--min-speed", speed)
    assert result.code == 2
    assert "Invalid value for '--min-speed'" in result.err


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999"), (999_499_999, "999M"), (999_885_952, "1B"), (30_532_122_624, "30.5B"), (10**12, "1T")],
)
def test_parameters_are_counted_in_the_unit_that_shows_them_short(count: int, text: str) -> None:
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (999_499, "999 kB"), (999_600_000, "1 GB"), (2.5e9, "2.5 GB"), (1.2e12, "1,200 GB")],
)
def test_sizes_are_told_in_the_unit_that_shows_them_short(size_bytes: float, text: str) -> None:
    assert size_text(size_bytes) == text


def test_bad_requests_are_refused(refused: Refused, config: Callable[..., Path]) -> None:
    assert "did you mean raspberry-pi-5" in refused("plan", "sample", "--target", "raspbery-pi-5")
    assert "the model has 1 to 8192" in refused("plan", "sample", "--target", "raspberry-pi-5", "--context", 9000)
    assert "is not known" in refused("plan", "sample", "--target", "raspberry-pi-5", "--quant", "int3")
    assert "is not known" in refused("plan", "sample", "--target", "raspberry-pi-5", "--format", "onyx")
    assert "does not take coreml" in refused("plan", "sample", "--target", "galaxy-s24", "--format", "coreml")
    missing = config("llama") / "config.json"
    missing.write_text("{", encoding="utf-8")
    assert "is not valid JSON" in refused("plan", missing.parent, "--target", "raspberry-pi-5")


# ---- convert ----


def small_device(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(
        'name = "Small"\nextends = "raspberry-pi-zero-2w"\n[memory]\napp_bytes = 60_000_000\n'
        '[sources]\n"memory.app_bytes" = "estimate, 2026-11: too little for anything"\n',
        encoding="utf-8",
    )
    return path


def test_convert_refuses_what_does_not_fit_and_says_what_would(
    refused: Refused, tiny_model: Any, tmp_path: Path
) -> None:
    target, out = small_device(tmp_path), tmp_path / "out.edgekit"
    said = refused("convert", tiny_model("llama"), "--target", target, "--quant", "int8", "--out", out)
    assert "as int8 with a context of 256 needs" in said
    assert "an app on small may use 60 MB" in said
    assert "it fits on" in said
    assert "--allow-too-large" in said
    assert not out.exists()


def test_convert_goes_on_where_it_is_told_to(cli: CLI, tiny_model: Any, tmp_path: Path) -> None:
    target, out = small_device(tmp_path), tmp_path / "out.edgekit"
    options = ("--quant", "fp32", "--out", out, "--no-verify", "--allow-too-large", "--json")
    result = cli("convert", tiny_model("llama"), "--target", target, *options)
    assert result.code == 0, result.err
    assert json.loads(result.out)["plan"]["fits"] == "no"
    assert "needs" in result.err
