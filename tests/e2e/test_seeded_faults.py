"""Seeded faults: each is planted into a program, and the gate or `verify` must catch it and name it.

The converter is given a source, or parts, that are wrong in one point; the reference that the gate compares with is not. A
program of the same model without a fault passes: so it is the fault that is caught.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import edgekit
from edgekit.bundle import open_bundle
from edgekit.converters import weight_rows
from edgekit.converters.quantize import QuantizedRows
from edgekit.diagnosis import CACHE, MASK, ROTATION, STALE, WEIGHTS, WINDOW
from edgekit.errors import BundleError, ConversionError, MissingExtraError, SourceError
from edgekit.gate import verify_bundle
from edgekit.registry import CONVERTERS, check_installed, load_attribute
from edgekit.source import Source, Tensor

from .litert_faults import LitertChild, cross_caches

SLIDING = 24  # tokens: the texts that are compared are longer
MODEL = ("mistral", {"num_hidden_layers": 2, "sliding_window": SLIDING})
RIGHT_END, WRONG_END = 257, 5
Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Format:
    """Where a format's programs are converted for, and with which scheme."""

    target: str
    quant: str


FORMATS = {
    "onnx": Format("linux-x86-64", "int8"),
    "onnx-qdq": Format("copilot-lunar-lake", "int8"),
    "executorch": Format("linux-x86-64", "fp32"),
    "coreml": Format("iphone-16", "fp16"),
    "coreai": Format("iphone-16", "fp32"),
    "litert": Format("galaxy-s24", "int8"),
}


@dataclass(frozen=True)
class Fault:
    """What is wrong with a program, and what it is called.

    Attributes:
        named: What the diagnosis says.
        source: Makes the source that the converter is given.
        patch: Changes the converter while it runs.
        written: Changes what it has written.
        formats: It is planted into these.
    """

    named: str
    source: Callable[[Source], Source] = lambda source: source
    patch: Callable[[Patch], None] = lambda patch: None
    written: Callable[[Path], None] = lambda directory: None
    formats: tuple[str, ...] = tuple(FORMATS)


def _wrong_rope_base(source: Source) -> Source:
    """All layers rotate with another base."""
    layers = tuple(
        replace(layer, rope=layer.rope and replace(layer.rope, theta=layer.rope.theta / 20))
        for layer in source.config.layers
    )
    return replace(source, config=replace(source.config, layers=layers))


def _short_window(source: Source) -> Source:
    """All layers see one token less."""
    layers = tuple(replace(layer, window=layer.window - 1) for layer in source.config.layers)
    return replace(source, config=replace(source.config, layers=layers))


def _swapped_keys_and_values(source: Source) -> Source:
    """The first layer takes its values for keys."""
    query, key, value = source.parts["layers.0.qkv"]
    return replace(source, parts={**source.parts, "layers.0.qkv": (query, value, key)})


def _transposed_weight(source: Source) -> Source:
    """The first layer's output projection, which is square, lies on its side."""
    (tensor,) = source.parts["layers.0.output"]
    return replace(source, parts={**source.parts, "layers.0.output": (_Transposed(tensor),)})


class _Transposed:
    """A square tensor, its rows taken for columns."""

    def __init__(self, base: Tensor) -> None:
        self._base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def read(self, start: int = 0, stop: int | None = None) -> Any:
        return np.ascontiguousarray(self._base.read().T[start:stop])


def _mis_scaled_blocks(patch: Patch) -> None:
    """The scales of the first block in each row of one matrix are three times too large."""
    read_chunk = weight_rows.read_chunk

    def read_wrong(chunk: Any, *arguments: Any, **options: Any) -> Any:
        rows, figures = read_chunk(chunk, *arguments, **options)
        if chunk.role == "layers.0.down" and isinstance(rows, QuantizedRows):
            rows.scales[:, 0] *= 3
        return rows, figures

    for module in ("weight_writer", "stored_weights"):
        patch.setattr(f"edgekit.converters.{module}.read_chunk", read_wrong)


def _forgetful_cache(patch: Patch) -> None:
    """The PyTorch decoder's second layer does not find its earlier keys and values again."""
    from edgekit.converters.torch_decoder import DecoderLayer

    attend = DecoderLayer.attend

    def attend_wrong(self: Any, hidden: Any, shared: Any, attention: Any) -> Any:
        forgetful: Any = _Forgetful(attention)
        return attend(self, hidden, shared, forgetful)

    patch.setattr(DecoderLayer, "attend", attend_wrong)


class _Forgetful:
    """Attention whose second layer uses the first one's cache; or, where caches are values, does not keep what is new."""

    def __init__(self, base: Any) -> None:
        self._base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def attend(self, layer: int, *arguments: Any) -> Any:
        caches = getattr(self._base, "_bound", None)
        if layer and caches is not None:
            kept = caches.keys, caches.values
            attended = self._base.attend(layer, *arguments)
            caches.keys, caches.values = kept
            return attended
        if layer and list(self._base.buffers()):
            self._base.attend(layer, *arguments)  # a buffer that nothing uses would be left out of the program
        return self._base.attend(0, *arguments)


def _mask_that_sees_ahead(patch: Patch) -> None:
    """The ExecuTorch program's tokens see the one that follows."""
    from edgekit.converters import executorch_attention

    mask = executorch_attention._mask
    patch.setattr(executorch_attention, "_mask", lambda ago, *rest: mask(ago + 1, *rest))


def _cache_of_another_sequence(patch: Patch) -> None:
    """The ExecuTorch program adds to new keys what its cache's first places hold: after a rewind, another sequence."""
    from edgekit.converters.executorch_attention import ExecutorchAttention

    attend = ExecutorchAttention.attend

    def attend_wrong(self: Any, layer: int, query: Any, key: Any, *rest: Any) -> Any:
        left = self.get_buffer(f"keys_{layer}")[:, : key.shape[1]]
        return attend(self, layer, query, key + left.permute(2, 1, 0, 3), *rest)

    patch.setattr(ExecutorchAttention, "attend", attend_wrong)


def _crossed_caches(directory: Path) -> None:
    """Each layer of an ONNX or LiteRT program reads the keys and values that the other one kept."""
    for path in directory.glob("litert/*.tflite"):
        cross_caches(path)
    for path in directory.glob("onnx*/*.onnx"):
        program = onnx.load(path, load_external_data=False)
        for node in program.graph.node:
            for place, value in enumerate(node.input):
                name, _, layer = value.partition(".")
                # Not what an NPU's graph says of their ranges: past_key.0.scale.
                if name in {"past_key", "past_value"} and layer.isdecimal():
                    node.input[place] = f"{name}.{1 - int(layer)}"
        path.write_bytes(program.SerializeToString())


def _mis_scaled_rows(directory: Path) -> None:
    """The scales of all rows, which are an NPU's blocks, of one matrix are three times too large."""
    path = directory / "onnx-qdq" / "decode.onnx"
    if not path.is_file():
        return
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    (scales,) = (tensor for tensor in tensors if tensor.name == "layers.0.down.row_scales")
    place = {entry.key: entry.value for entry in scales.external_data}
    stored = np.memmap(path.with_name(place["location"]), np.float32, "r+", int(place["offset"]), tuple(scales.dims))
    stored *= 3
    stored.flush()


FAULTS = {
    "a wrong rope base": Fault(ROTATION, source=_wrong_rope_base),
    "swapped keys and values": Fault(WEIGHTS, source=_swapped_keys_and_values),
    "an off-by-one mask": Fault(WINDOW.format(window=SLIDING), source=_short_window),
    "a mis-scaled block": Fault(WEIGHTS, patch=_mis_scaled_blocks, written=_mis_scaled_rows),
    "a transposed weight": Fault(WEIGHTS, source=_transposed_weight),
    "a stale cache": Fault(CACHE, patch=_forgetful_cache, written=_crossed_caches),
    "a mask that sees ahead": Fault(MASK, patch=_mask_that_sees_ahead, formats=("executorch",)),
    "a cache of another sequence": Fault(STALE, patch=_cache_of_another_sequence, formats=("executorch",)),
}


litert_child = LitertChild()


def _convert(model: Path, format: str, out: Path, fault: Fault, patch: Patch, *, quant: str = "") -> Any:
    """Convert with a fault in the program alone: the gate's reference is converted without."""
    chosen = FORMATS[format]
    try:
        check_installed(format)
    except MissingExtraError as error:
        pytest.skip(error.message)

    def load(path: str) -> Any:
        found = load_attribute(path)
        if path != CONVERTERS[format]:
            return found

        def export(source: Source, plan: Any, directory: Path, **options: Any) -> Any:
            with patch.context() as during:
                fault.patch(during)
                graph = found(fault.source(source), plan, directory, **options)
            fault.written(directory)
            return graph

        return export

    with patch.context() as planted:
        planted.setattr("edgekit.pipeline.load_attribute", load)
        # An NPU's emulator takes minutes for all of these: ONNX Runtime computes the same graphs on the processor.
        planted.setattr("edgekit.runtimes.provider_choice.is_installed", lambda name: False)
        if format == "litert":
            planted.setattr("edgekit.converters.to_litert.run_child", litert_child)
        if format in {"executorch", "litert"}:  # that loading crashes nothing is tried in a process of its own
            planted.setattr(f"edgekit.runtimes.backend_{format}.try_out", lambda path, trial: None)
        return edgekit.convert(
            model, target=chosen.target, format=format, quant=quant or chosen.quant, context=192, out=out
        )


@pytest.mark.parametrize(
    ("format", "name"),
    [(format, name) for format in FORMATS for name, fault in FAULTS.items() if format in fault.formats],
)
def test_the_gate_catches_and_names(
    format: str, name: str, tiny_model: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    model, fault = tiny_model(MODEL[0], **MODEL[1]), FAULTS[name]
    quant = "int8" if name == "a mis-scaled block" else ""
    with pytest.raises(ConversionError) as caught:
        _convert(model, format, tmp_path / "a.edgekit", fault, monkeypatch, quant=quant)
    assert fault.named in caught.value.message
    assert not list(tmp_path.iterdir()), "nothing half-written is left"


@pytest.fixture(scope="module")
def sound_bundle(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`sound_bundle(format)`: the same model without a fault, which the gate lets pass; made once."""
    made: dict[str, Path] = {}

    def make(format: str) -> Path:
        if format not in made:
            out = tmp_path_factory.mktemp(format) / "sound.edgekit"
            with pytest.MonkeyPatch.context() as patch:
                bundle = _convert(tiny_model(MODEL[0], **MODEL[1]), format, out, Fault(""), patch)
            assert bundle.manifest.programs[0].quality["status"] == "ok"
            made[format] = out
        return made[format]

    return make


def _copied(bundle: Path, place: Path) -> Path:
    return Path(shutil.copytree(bundle, place / "copy.edgekit"))


def _change_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "edgekit.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_of_a_bundle_is_named(format: str, sound_bundle: Any, tmp_path: Path) -> None:
    for file in open_bundle(sound_bundle(format)).program(format).graph.files:
        bundle = _copied(sound_bundle(format), tmp_path / file.replace("/", "-"))
        os.truncate(bundle / file, (bundle / file).stat().st_size // 2)
        with pytest.raises(BundleError) as caught:
            verify_bundle(bundle)
        assert file in caught.value.message


@pytest.mark.parametrize("format", FORMATS)
def test_a_program_that_was_written_truncated_does_not_pass(
    format: str, tiny_model: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    truncated: list[str] = []

    def truncate(directory: Path) -> None:
        files = [path for path in (directory / format).rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
        truncated.extend(part for part in largest.relative_to(directory).parts if "." in part)

    with pytest.raises(ConversionError, match=r"does not (load|run)") as caught:
        _convert(tiny_model(MODEL[0], **MODEL[1]), format, tmp_path / "a", Fault("", written=truncate), monkeypatch)
    assert any(part.removesuffix(".data") in caught.value.message for part in truncated)


@pytest.mark.parametrize("format", ["executorch", "coreml"])  # others' programs name none
def test_a_wrong_end_token_of_a_program_is_named(
    format: str, tiny_model: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    def end_wrong(source: Source) -> Source:
        return replace(source, tokenizer=replace(source.tokenizer, eos_token_ids=(WRONG_END,)))

    with pytest.raises(ConversionError, match=f"has the end tokens {WRONG_END}, the bundle {RIGHT_END}"):
        _convert(tiny_model(MODEL[0], **MODEL[1]), format, tmp_path / "a", Fault("", source=end_wrong), monkeypatch)


@pytest.mark.parametrize("format", FORMATS)
def test_a_wrong_end_token_of_a_bundle_is_named(
    format: str, sound_bundle: Any, tiny_model: Any, tmp_path: Path
) -> None:
    bundle = _copied(sound_bundle(format), tmp_path)
    _change_manifest(bundle, lambda manifest: manifest["tokenizer"].update(eos_token_ids=[WRONG_END]))
    with pytest.raises(SourceError, match=rf"end tokens \[{RIGHT_END}\], the bundle \[{WRONG_END}\]"):
        verify_bundle(bundle, reference=tiny_model(MODEL[0], **MODEL[1]))
