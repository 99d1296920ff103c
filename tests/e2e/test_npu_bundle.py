"""Bundles with NPU programs: converted, verified and run through the same doors as any other."""

from __future__ import annotations

import importlib.util
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import onnx
import pytest

import edgekit
from edgekit.child import ChildError
from edgekit.errors import EdgeKitError, MissingExtraError, PlanError
from edgekit.gate import verify_bundle
from edgekit.runtimes.npu_contexts import write_contexts

TARGET, FORMATS = "copilot-snapdragon-x-elite", ["onnx-qdq", "onnx"]
needs_emulator = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed"
)


@pytest.fixture(scope="module")
def bundle(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> edgekit.Bundle:
    source = tiny_model("llama", num_hidden_layers=2, tie_word_embeddings=True)
    out = tmp_path_factory.mktemp("npu") / "tiny.edgekit"
    return edgekit.convert(source, target=TARGET, format=FORMATS, quant="int8", context=128, out=out)


@pytest.mark.slow
@needs_emulator
def test_both_programs_are_verified_where_they_run(bundle: edgekit.Bundle) -> None:
    programs = bundle.manifest.programs
    assert [program.graph.format for program in programs] == FORMATS
    assert [program.quality["executed"] for program in programs] == ["qnn-htp-emulator", "onnxruntime"]
    assert {program.quality["status"] for program in programs} == {"ok"}
    assert {program.context for program in programs} == {128}
    assert bundle.manifest.plan["other_programs"]["onnx"]["format"] == "onnx"


@pytest.mark.slow
@needs_emulator
def test_graphs_are_compiled_for_the_targets_chip(bundle: edgekit.Bundle) -> None:
    """Both in one binary, which is smaller than two would be: the weights are in it once."""
    graph = bundle.manifest.programs[0].graph
    assert graph.npu == {"htp_arch": "73", "soc_model": "60"}  # SC8380XP
    prefill, decode, binary = (bundle.directory / name for name in graph.contexts)
    for path in (prefill, decode):
        (node,) = onnx.load(path).graph.node
        assert node.op_type == "EPContext"
    assert binary.stat().st_size > 0
    assert set(graph.contexts) <= set(bundle.manifest.files)
    assert edgekit.open_bundle(bundle.directory).manifest.programs[0].graph == graph


@pytest.mark.slow
def test_programs_share_texts_and_keep_their_own_tokens(bundle: edgekit.Bundle) -> None:
    goldens = json.loads((bundle.directory / "goldens.json").read_text(encoding="utf-8"))
    assert set(goldens["greedy"]) == set(goldens["margins"]) == set(FORMATS)
    assert len(list(bundle.directory.glob("tokenizer.json"))) == 1
    rows = verify_bundle(bundle.directory)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert all(row["greedy_match_tokens"] > 0 for row in rows)


@pytest.mark.slow
def test_each_program_generates(bundle: edgekit.Bundle, tmp_path: Path) -> None:
    for format in FORMATS:
        with edgekit.load(bundle.directory, format=format) as model, closing(model.session()) as session:
            reply = session.generate("ab", max_tokens=4, raw=True)
            assert reply.tokens == model.generate("ab", max_tokens=4, raw=True).tokens
            session.save(tmp_path / format)
            with closing(model.restore(tmp_path / format)) as restored:
                longer = "ab" + reply.text + "c"
                assert restored.generate(longer, max_tokens=3, raw=True).tokens == (
                    session.generate(longer, max_tokens=3, raw=True).tokens
                )


def test_formats_are_each_named_once(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="twice"):
        edgekit.convert(tiny_model("llama"), target=TARGET, format=["onnx", "onnx"], out=tmp_path / "a.edgekit")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MissingExtraError("onnxruntime-qnn", "qnn"), "edgekit-toolkit[qnn]"),
        (ChildError("it crashed with SIGSEGV"), "it crashed with SIGSEGV"),
    ],
)
def test_what_kept_it_from_being_compiled_is_told(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: EdgeKitError, told: str
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("edgekit.runtimes.npu_contexts.write_contexts", fail)
    out = tmp_path / "a.edgekit"
    source = tiny_model("llama", num_hidden_layers=2, tie_word_embeddings=True)
    made = edgekit.convert(source, target=TARGET, quant="int8", context=128, out=out, verify=False)
    assert made.manifest.programs[0].graph.format == "onnx-qdq", "what the target prefers"
    assert made.manifest.programs[0].graph.contexts == ()
    assert any(told in note for note in made.manifest.plan["notes"])


@pytest.mark.slow
@needs_emulator
def test_a_graph_that_the_compiler_does_not_take_ends_another_process(bundle: edgekit.Bundle, tmp_path: Path) -> None:
    graph = bundle.manifest.programs[0].graph
    for file in graph.files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"not a graph")
    with pytest.raises(ChildError, match="prefill"):
        write_contexts(tmp_path, graph)
