"""What users run into: interrupts, closed models, dates in templates, names with dots, other references."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.cli import main
from edgekit.runtimes.backend_onnxruntime import OnnxRuntimeDecoder

DATED_TEMPLATE = "{{ strftime_now('%d %B %Y') }}{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"


@pytest.fixture(scope="module")
def bundle(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("robust") / "tiny.edgekit"
    edgekit.convert(tiny_model("llama"), target="raspberry-pi-5", quant="fp32", out=out)
    return out


def test_a_turn_after_an_interrupted_one_equals_a_fresh_one(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = OnnxRuntimeDecoder.forward, list[int]()

    def interrupted(self: OnnxRuntimeDecoder, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, *args, **options)

    with edgekit.load(bundle) as model:
        session = model.session()
        with monkeypatch.context() as patch:
            patch.setattr(OnnxRuntimeDecoder, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.generate("abc", raw=True, max_tokens=16)
        expected = model.generate("abcdef", raw=True, max_tokens=8)
        assert session.generate("abcdef", raw=True, max_tokens=8).tokens == expected.tokens


def test_a_closed_model_says_so(bundle: Path) -> None:
    model = edgekit.load(bundle)
    model.close()
    model.close()
    with pytest.raises(edgekit.GenerationError, match="closed"):
        model.generate("abc", raw=True)


def test_goldens_do_not_change_with_the_date(tiny_model: Any, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model("llama"), tmp_path / "dated")
    (source / "chat_template.jinja").write_text(DATED_TEMPLATE, encoding="utf-8")
    edgekit.convert(source, target="raspberry-pi-5", quant="fp32", out=tmp_path / "b")
    texts = json.loads((tmp_path / "b" / "goldens.json").read_text())["texts"]
    prompts = [text["prompt"] for text in texts if not text.get("late")]  # which follows other texts, without a prompt
    assert prompts
    assert all(prompt.startswith("01 January 2026<|user|>") for prompt in prompts)


def test_default_name_keeps_dots(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shutil.copytree(tiny_model("llama"), tmp_path / "Tiny-3.2-1B")
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(source), "--target", "raspberry-pi-5", "--no-verify"]) == 0
    assert (tmp_path / "Tiny-3.2-1B-raspberry-pi-5.edgekit").is_dir()


def test_verify_refuses_another_model_as_reference(
    bundle: Path, tiny_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(bundle), "--reference", str(tiny_model("qwen2"))]) == 1
    assert "the reference is a qwen2" in capsys.readouterr().err


def test_saved_truncation_never_cuts_a_prompt(tiny_model: Any, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model("llama"), tmp_path / "cut")
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    edgekit.convert(source, target="raspberry-pi-5", quant="fp32", out=tmp_path / "b", verify=False)
    with edgekit.load(tmp_path / "b") as model:
        assert model.generate("abcdefgh", raw=True, max_tokens=1).stats.prompt_tokens == 8


def test_bound_of_an_unverified_bundle_is_that_of_its_bits(tiny_model: Any, tmp_path: Path) -> None:
    from edgekit.bounds import BOUND_4_BITS_SMALL, BOUND_8_BITS, kl_bound

    for quant, bound in (("int4", BOUND_4_BITS_SMALL), ("int8", BOUND_8_BITS)):
        made = edgekit.convert(
            tiny_model("llama"), target="raspberry-pi-5", quant=quant, out=tmp_path / quant, verify=False
        )
        assert kl_bound(made.manifest.programs[0].graph, made.manifest.model["parameters"]) == bound
