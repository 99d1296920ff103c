"""What calibration sees of each layer, against hooks on the modules of transformers."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from edgekit.calibration import THREADS
from edgekit.converters.calibrate import rounding_guides, second_moments
from edgekit.converters.gptq import make_guide
from edgekit.converters.layer_run import open_layer
from edgekit.converters.scaling import search_scales
from edgekit.converters.to_onnx import export
from edgekit.errors import ConversionError
from edgekit.plan import make_plan
from edgekit.source import Source, open_source, part_shapes
from edgekit.target import load_target

# Second moments sum 110 products of float32 numbers that two libraries compute in different orders.
RELATIVE_TOLERANCE = 1e-3
MODULES = {
    "qkv": ("self_attn.q_proj", "self_attn.qkv_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.gate_up_proj"),
    "down": ("mlp.down_proj",),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-padded-heads": ("llama", {"head_dim": 12}),
    "mistral": ("mistral", {"sliding_window": 24}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {"head_dim": 32, "sliding_window": 24, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
}


def reference_moments(directory: Path, texts: list[list[int]]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    found: dict[str, Any] = {}

    def listen(role: str) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0][0].double().numpy()
            found[role] = found.get(role, 0) + rows.T @ rows

        return hook

    for name, module in model.named_modules():
        for role, suffixes in MODULES.items():
            if name.endswith(suffixes):
                module.register_forward_pre_hook(listen(f"layers.{name.split('.')[2]}.{role}"))
        if name == "lm_head":
            module.register_forward_pre_hook(listen("embedding" if model.config.tie_word_embeddings else "head"))
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([text]))
    return found


@pytest.mark.parametrize("case", CASES)
def test_second_moments_equal_transformers(case: str, tiny_model: Any, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    directory = tiny_model(model_type, **changes)
    generator = np.random.default_rng(7)
    texts = [generator.integers(0, 256, length).tolist() for length in (70, 30, 10)]
    found: dict[str, Any] = {}
    source = open_source(directory)
    for some in second_moments(source, texts, tmp_path, frozenset(part_shapes(source.config))):
        found.update(some)
    expected = reference_moments(directory, texts)
    if not source.config.tied_embeddings:
        assert "embedding" not in found
    assert found.keys() == expected.keys()
    for role, moments in expected.items():
        np.testing.assert_allclose(found[role], moments, rtol=0, atol=RELATIVE_TOLERANCE * np.abs(moments).max())
    assert not list(tmp_path.iterdir()), "the layers' files are removed"


def test_only_what_is_asked_for_is_accumulated_and_later_layers_are_not_run(tiny_model: Any, tmp_path: Path) -> None:
    source, texts = open_source(tiny_model("llama", num_hidden_layers=3)), [[1, 2, 3], [4, 5]]
    whole: dict[str, Any] = {}
    for some in second_moments(source, texts, tmp_path, frozenset(part_shapes(source.config))):
        whole.update(some)
    without_last = replace(
        source, parts={role: parts for role, parts in source.parts.items() if not role.startswith("layers.2.mlp")}
    )
    (found,) = second_moments(without_last, texts, tmp_path, frozenset({"layers.1.down"}))
    assert found.keys() == {"layers.1.down"}
    np.testing.assert_array_equal(found["layers.1.down"], whole["layers.1.down"])
    (head,) = second_moments(source, texts, tmp_path, frozenset({"head"}))
    np.testing.assert_array_equal(head["head"], whole["head"])


def test_guides_of_a_layer_are_gone_before_the_next_are_made(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    living: list[weakref.ref[Any]] = []

    def watched(*arguments: Any) -> Iterator[Any]:
        made = rounding_guides(*arguments)
        while True:
            assert not any(reference() is not None for reference in living)
            guides = next(made, None)
            if guides is None:
                return
            living.extend(weakref.ref(guide.feedback) for guide in guides.values())
            yield guides
            del guides

    monkeypatch.setattr("edgekit.converters.stored_weights.rounding_guides", watched)
    source = open_source(tiny_model("llama"))
    plan = make_plan(source, load_target("linux-x86-64"), quant="int4-mixed")
    export(source, plan, tmp_path, texts=[[1, 2, 3, 4]])
    assert len(living) == len(plan.calibrated)


def guides_of(source: Source, place: Path) -> list[Any]:
    return list(rounding_guides(source, [[1, 2, 3]], place, frozenset(part_shapes(source.config))))


def test_want_of_memory_is_told(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("edgekit.converters.calibrate.make_guide", fail)
    with pytest.raises(ConversionError, match="not enough memory to calibrate") as caught:
        guides_of(open_source(tiny_model("llama")), tmp_path)
    assert caught.value.hint == "use --quant int4, which needs none"


def test_layer_that_does_not_run_is_named(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.converters.layer_run.LayerRun._feeds", lambda *_: {})
    with pytest.raises(ConversionError, match="layer 0 does not run: "):
        guides_of(open_source(tiny_model("llama")), tmp_path)
    assert not list(tmp_path.iterdir())


def test_layer_that_was_closed_keeps_no_session(tiny_model: Any, tmp_path: Path) -> None:
    """Who ran it still has it, and Windows removes no file that a session has mapped."""
    with open_layer(open_source(tiny_model("llama")), 0, tmp_path, context=8) as layer:
        session = weakref.ref(layer.session)
        assert session() is not None
    assert session() is None
    assert not list(tmp_path.iterdir())


def test_inputs_that_overflow_are_named(tiny_model: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    copy = shutil.copytree(tiny_model("llama"), tmp_path / "large")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e25
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"layers\.1\.down sees values too large to calibrate on"):
        guides_of(open_source(copy), tmp_path)


def test_bytes_do_not_depend_on_the_number_of_threads(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, seen = open_source(tiny_model("llama")), list[int]()
    plan = make_plan(source, load_target("linux-x86-64"), quant="int4-mixed")

    def watched(moments: Any) -> Any:
        seen.extend(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")
        return make_guide(moments)

    monkeypatch.setattr("edgekit.converters.calibrate.make_guide", watched)
    for threads in (1, 3):
        monkeypatch.setattr("edgekit.converters.weight_rows.MOST_THREADS", threads)
        monkeypatch.setattr("os.cpu_count", lambda threads=threads: threads)
        with threadpool_limits(threads, user_api="blas"):
            export(source, plan, tmp_path / str(threads), texts=[list(range(60)), [7, 8]])
    one, three = (tmp_path / name / "onnx" / "model.onnx.data" for name in ("1", "3"))
    assert one.read_bytes() == three.read_bytes()
    assert set(seen) <= {1}


def test_scales_are_searched_with_the_same_threads_everywhere(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, seen = open_source(tiny_model("llama")), list[int]()

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.extend(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")
        return search_scales(*arguments, **options)

    monkeypatch.setattr("edgekit.converters.scaling.search_scales", watched)
    plan = make_plan(source, load_target("linux-x86-64"), quant="int8-scaled")
    with threadpool_limits(1, user_api="blas"):
        export(source, plan, tmp_path / "scaled", texts=[list(range(60))])
    assert set(seen) <= {THREADS}
    assert (tmp_path / "scaled" / "onnx" / "model.onnx.data").is_file()
