"""Every command on a good bundle: what it prints, where, and its exit code. stdout is data, stderr all else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

STATS = {
    "prompt_tokens",
    "cached_tokens",
    "new_tokens",
    "load_s",
    "ttft_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_rss_bytes",
    "decode_passes",
    "drafted_tokens",
    "accepted_tokens",
    "dropped_messages",
    "dropped_tokens",
}
VERIFY_ROW = {
    "format",
    "weights_bytes",
    "executed",
    "positions",
    "kl_mean",
    "kl_mean_interval",
    "kl_p99",
    "top1_agreement",
    "top1_interval",
    "reference_confidence",
    "decode",
    "late",
    "greedy_match_tokens",
    "reference_match_tokens",
    "text",
    "status",
    "reason",
}
COMMANDS = ("convert", "run", "chat", "verify", "profile", "inspect", "targets")


def _run_json(cli: Any, bundle: Path, *arguments: object) -> dict[str, Any]:
    result = cli("run", bundle, *arguments, "--json")
    assert (result.code, result.err) == (0, "")
    values: dict[str, Any] = json.loads(result.out)
    return values


def test_help_names_every_command(cli: Any) -> None:
    result = cli("--help")
    assert result.code == 0
    assert all(f"\n  {name} " in result.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_command_explains_itself(cli: Any, name: str) -> None:
    result = cli(name, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Usage: edgekit")


def test_convert_prints_where_the_bundle_is_and_what_it_is_worth(cli: Any, tiny_model: Any, tmp_path: Path) -> None:
    out = tmp_path / "a.edgekit"
    source = tiny_model("llama", intermediate_size=128)  # of whole blocks: no notes
    result = cli("convert", source, "--target", "raspberry-pi-5", "--out", out)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"{out}\n")
    assert "run on onnxruntime, ok: mean KL" in result.out
    assert "onnx, int8, context 256" in result.out


def test_convert_json_is_the_manifest(cli: Any, tiny_model: Any, tmp_path: Path) -> None:
    out = tmp_path / "a.edgekit"
    result = cli("convert", tiny_model("llama"), "--target", "raspberry-pi-5", "--out", out, "--json")
    values = json.loads(result.out)
    assert values.pop("bundle") == str(out)
    assert values == json.loads((out / "edgekit.json").read_text(encoding="utf-8"))


def test_convert_names_its_own_output(
    cli: Any, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tiny_model("llama")
    assert cli("convert", source, "--target", "raspberry-pi-5").code == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{source.name}-raspberry-pi-5.edgekit"]


def test_convert_forced_replaces_a_bundle(cli: Any, tiny_model: Any, own_bundle: Path) -> None:
    arguments = ("--target", "raspberry-pi-5", "--quant", "int4", "--out", own_bundle, "--force")
    assert cli("convert", tiny_model("llama"), *arguments).code == 0
    assert json.loads((own_bundle / "edgekit.json").read_text(encoding="utf-8"))["plan"]["quant"] == "int4"
    assert [path.name for path in own_bundle.parent.iterdir()] == [own_bundle.name]


def test_run_json_has_the_promised_keys(cli: Any, tiny_bundle: Path) -> None:
    values = _run_json(cli, tiny_bundle, "hello", "--max-tokens", 5)
    assert set(values) == {"text", "tokens", "finish_reason", "stats", "provider"}
    assert values["provider"]["executed"] == "onnxruntime"
    assert set(values["stats"]) == STATS
    assert values["finish_reason"] == "length"
    assert len(values["tokens"]) == values["stats"]["new_tokens"] == 5


def test_run_prints_the_text_only(cli: Any, tiny_bundle: Path) -> None:
    text = _run_json(cli, tiny_bundle, "hello", "--max-tokens", 5)["text"]
    result = cli("run", tiny_bundle, "hello", "--max-tokens", 5)
    assert (result.code, result.out) == (0, f"{text}\n")
    assert result.err == "note: ended after 5 tokens\n"


def test_run_reads_the_prompt_from_stdin(cli: Any, tiny_bundle: Path) -> None:
    result = cli("run", tiny_bundle, "-", "--max-tokens", 5, stdin="hello")
    assert result.out == cli("run", tiny_bundle, "hello", "--max-tokens", 5).out


def test_run_is_repeatable_with_a_seed(cli: Any, tiny_bundle: Path) -> None:
    options = ("--temperature", 1, "--max-tokens", 16, "--seed")
    first, second, other = (_run_json(cli, tiny_bundle, "hello", *options, seed)["tokens"] for seed in (7, 7, 8))
    assert first == second != other


def test_run_ends_at_a_stop_text(cli: Any, tiny_bundle: Path) -> None:
    text = _run_json(cli, tiny_bundle, "hello", "--max-tokens", 32)["text"]
    stop = text[3:5]
    values = _run_json(cli, tiny_bundle, "hello", "--max-tokens", 32, "--stop", stop, "--stop", "never there")
    assert values["finish_reason"] == "stop"
    assert values["text"] == text[: text.index(stop)]


def test_run_puts_the_prompt_into_the_template_unless_raw(cli: Any, tiny_bundle: Path) -> None:
    def prompt_tokens(*options: str) -> int:
        return int(_run_json(cli, tiny_bundle, "hello", "--max-tokens", 1, *options)["stats"]["prompt_tokens"])

    assert prompt_tokens("--raw") == len("hello")
    assert prompt_tokens() == len("hello") + 3  # user, end, assistant
    assert prompt_tokens("--system", "short") == len("hello") + 3 + len("short") + 2  # system, end


def test_chat_answers_each_line_and_forgets_when_told(cli: Any, tiny_bundle: Path) -> None:
    result = cli("chat", tiny_bundle, "--max-tokens", 6, stdin="hello\n\n/new\nhello\n/quit\nnot read\n")
    reply = _run_json(cli, tiny_bundle, "hello", "--max-tokens", 6)["text"]
    assert result.code == 0
    assert result.out == f"{reply}\n" * 2


def test_chat_goes_on_after_a_message_that_is_too_long(cli: Any, tiny_bundle: Path) -> None:
    result = cli("chat", tiny_bundle, "--max-tokens", 6, stdin="x" * 300 + "\nhello\n")
    reply = _run_json(cli, tiny_bundle, "hello", "--max-tokens", 6)["text"]
    assert (result.code, result.out) == (0, f"{reply}\n")
    assert "error: the prompt is 303 tokens" in result.err


def test_inspect_shows_a_bundle(cli: Any, tiny_bundle: Path) -> None:
    result = cli("inspect", tiny_bundle)
    assert (result.code, result.err) == (0, "")
    for part in (
        "llama",
        "raspberry-pi-5",
        "program     onnx, context 256, ok",
        "8 bits, blocks of 64",
        "run on onnxruntime: programs of this format run on the CPU",
        "goldens.json",
    ):
        assert part in result.out
    values = json.loads(cli("inspect", tiny_bundle, "--json").out)
    assert values["kind"] == "bundle"
    assert values["schema_version"] == 1


def test_inspect_shows_a_source(cli: Any, tiny_model: Any) -> None:
    source = tiny_model("llama")
    result = cli("inspect", source)
    assert (result.code, result.err) == (0, "")
    assert "llama" in result.out
    values = json.loads(cli("inspect", source, "--json").out)
    assert (values["kind"], values["model_type"], values["layers"], values["vocab_size"]) == ("source", "llama", 3, 320)


def test_what_a_multimodal_checkpoint_loses_is_said(cli: Any, tiny_model: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    text = {"head_dim": 32, "sliding_window": 24}
    source = tiny_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=319)
    note = "the text part of a gemma3 checkpoint: images are not read"
    assert note in cli("inspect", source).out
    assert note in json.loads(cli("inspect", source, "--json").out)["notes"][0]
    out = tmp_path / "text.edgekit"
    result = cli("convert", source, "--target", "linux-x86-64", "--quant", "fp32", "--out", out)
    assert result.code == 0
    assert f"note: {note}" in result.err
    assert note in cli("inspect", out).out


def test_targets_lists_every_profile(cli: Any) -> None:
    names = {path.stem for path in (Path(__file__).parents[2] / "targets").glob("*.toml")}
    header, *rows = cli("targets").out.splitlines()
    assert header.split()[0] == "id"
    assert {row.split()[0] for row in rows} == names
    assert {target["id"] for target in json.loads(cli("targets", "--json").out)["targets"]} == names


def test_targets_explains_one_with_its_sources(cli: Any) -> None:
    result = cli("targets", "raspberry-pi-5")
    values = json.loads(cli("targets", "raspberry-pi-5", "--json").out)
    assert values["id"] == "raspberry-pi-5"
    assert all(text in result.out for text in values["sources"].values())


def test_verify_json_has_the_promised_keys(cli: Any, tiny_bundle: Path) -> None:
    result = cli("verify", tiny_bundle, "--json")
    assert (result.code, result.err) == (0, "")
    values = json.loads(result.out)
    assert set(values) == {"ok", "programs"}
    assert values["ok"] is True
    (row,) = values["programs"]
    assert set(row) == VERIFY_ROW
    assert (row["format"], row["executed"], row["status"]) == ("onnx", "onnxruntime", "ok")


def test_verify_against_the_source_repeats_the_quality_card(cli: Any, tiny_bundle: Path, tiny_model: Any) -> None:
    result = cli("verify", tiny_bundle, "--reference", tiny_model("llama"), "--json")
    (row,) = json.loads(result.out)["programs"]
    manifest = json.loads((tiny_bundle / "edgekit.json").read_text(encoding="utf-8"))
    quality = manifest["programs"][0]["quality"]
    assert row["kl_mean"] == pytest.approx(quality["kl_mean"], rel=0.01)
    assert row["kl_mean_interval"] == pytest.approx(quality["kl_mean_interval"], rel=0.01)
    assert row["positions"] == quality["positions"] == 256
    assert result.code == 0


def test_verify_text_is_one_line_a_program(cli: Any, tiny_bundle: Path) -> None:
    assert cli("verify", tiny_bundle).out.startswith("onnx: ok, run on onnxruntime, ")


def test_verify_fails_a_program_that_computes_something_else(cli: Any, own_bundle: Path) -> None:
    goldens = json.loads((own_bundle / "goldens.json").read_text(encoding="utf-8"))
    goldens["top_tokens"] = goldens["top_tokens"][::-1]  # as another model's
    text = json.dumps(goldens)
    (own_bundle / "goldens.json").write_text(text, encoding="utf-8", newline="\n")
    manifest = json.loads((own_bundle / "edgekit.json").read_text(encoding="utf-8"))
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    manifest["files"]["goldens.json"] = {"size_bytes": len(text.encode()), "sha256": sha256}
    (own_bundle / "edgekit.json").write_text(json.dumps(manifest), encoding="utf-8")
    result = cli("verify", own_bundle, "--json")
    values = json.loads(result.out)
    assert (result.code, values["ok"], values["programs"][0]["status"]) == (1, False, "failed")
    assert "over the bound" in values["programs"][0]["reason"]


@pytest.mark.parametrize("arguments", [("-v", "inspect", "nowhere"), ("inspect", "nowhere", "--verbose")])
def test_verbose_shows_the_traceback_of_an_error(cli: Any, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert result.code == 1
    assert "Traceback" in result.err
    assert "error: nowhere does not exist" in result.err
    assert "Traceback" not in cli("inspect", "nowhere").err, "it lasts for one call"
