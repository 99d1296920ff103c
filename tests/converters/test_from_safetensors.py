"""The safetensors reader: values against the safetensors library, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekit.converters.from_safetensors import read_header
from edgekit.converters.positional_file import PositionalFile
from edgekit.converters.to_onnx import export
from edgekit.errors import EdgeKitError, SourceError, UnsupportedError
from edgekit.plan import make_plan
from edgekit.source import Source, Tensor, open_source
from edgekit.target import load_target


def library_values(directory: Path) -> dict[str, NDArray[np.float32]]:
    import torch
    from safetensors.torch import load_file

    tensors = {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}
    return {name: value.to(torch.float32).numpy() for name, value in tensors.items()}


def tensors_of(source: Source) -> dict[str, Tensor]:
    return {tensor.name: tensor for parts in source.parts.values() for tensor in parts}


def refusal(directory: Path) -> EdgeKitError:
    with pytest.raises(EdgeKitError) as caught:
        open_source(directory)
    assert caught.value.hint, "an error says what to do"
    return caught.value


@pytest.fixture
def llama(tiny_model: Any, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "llama"))


@pytest.fixture
def sharded(tiny_model: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama", max_shard_size="100KB"), tmp_path / "sharded"))


def change_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    values |= changes
    kept = {key: value for key, value in values.items() if value is not ...}
    path.write_text(json.dumps(kept), encoding="utf-8")


# ---- Values ----


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard_size", ["50GB", "100KB"])
def test_values_equal_the_safetensors_librarys(dtype: str, shard_size: str, tiny_model: Any) -> None:
    import torch

    directory = tiny_model("llama", dtype=getattr(torch, dtype), max_shard_size=shard_size)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == (shard_size == "100KB")
    expected, found = library_values(directory), tensors_of(open_source(directory))
    assert set(found) == set(expected)
    for name, tensor in found.items():
        values = tensor.read()
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_double_precision_is_rounded_to_float32(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    values = np.array([[0.1, 1e300], [-2.5, 3.0]])
    save_file({"weight": values}, tmp_path / "model.safetensors")
    tensor = read_header(PositionalFile(tmp_path / "model.safetensors"))["weight"]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(tensor.read(), values.astype(np.float32))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (7, 20), (319, 320), (0, 320)])
def test_rows_are_a_slice_of_the_whole(start: int, stop: int, tiny_model: Any) -> None:
    (tensor,) = open_source(tiny_model("llama")).parts["embedding"]
    np.testing.assert_array_equal(tensor.read(start, stop), tensor.read()[start:stop])


def test_tensors_without_elements_read_as_empty(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"empty": np.zeros((0, 4), np.float32)}, tmp_path / "model.safetensors")
    assert read_header(PositionalFile(tmp_path / "model.safetensors"))["empty"].read().shape == (0, 4)


def test_integers_are_refused_on_reading(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros((2, 4), np.int8)}, tmp_path / "model.safetensors")
    tensor = read_header(PositionalFile(tmp_path / "model.safetensors"))["weight"]
    with pytest.raises(UnsupportedError, match="tensor weight is stored as I8"):
        tensor.read()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_types_that_are_not_read_are_refused_on_opening(dtype: str, llama: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    save_file(tensors, llama / "model.safetensors")
    named = {"float8_e4m3fn": "F8_E4M3", "int8": "I8"}[dtype]
    assert f"tensor {name} is stored as {named}" in refusal(llama).message


# ---- What is read, and how often ----


ByteRange = tuple[str, int, int]
ReadLog = Callable[[], list[ByteRange]]


def header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_opening_reads_exactly_the_headers(sharded: Path, log_reads: ReadLog) -> None:
    ranges = log_reads()
    open_source(sharded)
    read = sum(size for _, _, size in ranges)
    assert read == sum(header_bytes(path) for path in sharded.glob("*.safetensors"))


@pytest.mark.parametrize("quant", ["int8", "fp32"])
def test_conversion_reads_every_weight_byte_once(
    quant: str, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_reads: ReadLog
) -> None:
    source = open_source(sharded)
    monkeypatch.setattr("edgekit.converters.weight_rows.CHUNK_ELEMENTS", 1000)  # many chunks a tensor
    ranges = log_reads()
    export(source, make_plan(source, load_target("linux-x86-64"), quant=quant), tmp_path / "out")
    assert max(Counter(ranges).values()) == 1
    for path in sharded.glob("*.safetensors"):
        pieces = sorted((offset, size) for name, offset, size in ranges if name == path.name)
        position = header_bytes(path)
        for offset, size in pieces:
            assert offset == position
            position += size
        assert position == path.stat().st_size


# ---- Files that are missing or disagree ----


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    error = refusal(sharded)
    assert isinstance(error, SourceError)
    assert shard.name in error.message


def test_tensor_that_only_the_index_knows_is_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map=weight_map | {"model.extra": next(iter(weight_map.values()))})
    assert "model.extra" in refusal(sharded).message


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "c:x.safetensors", "x.bin", "a\0.safetensors", 7, "",
     "x" * 300 + ".safetensors"],
)  # fmt: skip
def test_shard_names_that_are_not_plain_are_refused(name: object, sharded: Path) -> None:
    change_json(sharded / "model.safetensors.index.json", weight_map={"model.norm.weight": name})
    error = refusal(sharded)
    assert isinstance(error, SourceError)
    assert "not a plain file name" in error.message


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_index_without_weight_map_is_refused(weight_map: object, sharded: Path) -> None:
    change_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
    assert "has no weight_map" in refusal(sharded).message


def test_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shutil.copy(shards[0], shards[1])
    assert "is in" in refusal(sharded).message


def test_single_file_goes_before_other_layouts_of_the_same_weights(llama: Path) -> None:
    shutil.copy(llama / "model.safetensors", llama / "consolidated.safetensors")
    assert open_source(llama).weight_files == (llama / "model.safetensors",)


@pytest.mark.parametrize(
    ("files", "kind", "words"),
    [
        ((), SourceError, "config.json is missing"),
        (("config.json",), SourceError, "no *.safetensors"),
        (("config.json", "pytorch_model.bin"), UnsupportedError, "pickled"),
        (("config.json", "model.gguf"), SourceError, "GGUF"),
        (("config.json", "model.safetensors"), UnsupportedError, "no tokenizer.json"),
    ],
)
def test_incomplete_directory_says_what_it_lacks(
    files: tuple[str, ...], kind: type[EdgeKitError], words: str, tiny_model: Any, tmp_path: Path
) -> None:
    for name in files:
        original = tiny_model("llama") / name
        (tmp_path / name).write_bytes(original.read_bytes() if original.is_file() else b"x")
    error = refusal(tmp_path)
    assert type(error) is kind
    assert words in error.message


def test_weights_without_config_are_refused(llama: Path) -> None:
    (llama / "config.json").unlink()
    assert "config.json is missing" in refusal(llama).message


# ---- Config and tensors ----


def test_shape_that_disagrees_names_the_tensor_and_both_shapes(llama: Path) -> None:
    change_json(llama / "config.json", intermediate_size=128)
    error = refusal(llama)
    assert isinstance(error, SourceError)
    for words in ("model.layers.0.mlp.gate_proj.weight", "[96, 64]", "[128, 64]"):
        assert words in error.message


def rewrite(directory: Path, change: Any) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_missing_tensor_is_named(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    error = refusal(llama)
    assert isinstance(error, SourceError)
    assert "model.layers.1.mlp.up_proj.weight is missing" in error.message


def test_tensor_without_a_place_is_named(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({"vision.patch.weight": np.zeros((2, 2), np.float32)}))
    error = refusal(llama)
    assert isinstance(error, UnsupportedError)
    assert "vision.patch.weight" in error.message


def test_left_over_rotary_buffers_are_ignored(llama: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    rewrite(llama, lambda tensors: tensors.update(buffer))
    assert not set(buffer) & set(tensors_of(open_source(llama)))


def test_tied_model_takes_the_embedding_as_head_with_or_without_a_copy(tiny_model: Any, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_model("llama", tie_word_embeddings=True), tmp_path / "tied"))
    without = open_source(directory)
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    with_copy = open_source(directory)
    assert "head" not in without.parts
    assert set(tensors_of(without)) == set(tensors_of(with_copy))


def test_head_of_its_own_is_kept_whatever_the_config_says(tiny_model: Any, check_logits: Any, tmp_path: Path) -> None:
    """transformers ties only what is equal."""
    directory = Path(shutil.copytree(tiny_model("llama"), tmp_path / "own"))
    change_json(directory / "config.json", tie_word_embeddings=True)
    source = open_source(directory)
    assert not source.config.tied_embeddings
    assert source.notes[0].startswith("the head differs from the embedding")
    check_logits(directory, directory, tmp_path / "out")


def test_untied_model_without_head_is_refused(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight is missing" in refusal(llama).message


@pytest.mark.parametrize(
    ("changes", "words", "hint"),
    [
        ({"model_type": "mamba"}, "'mamba'", "smollm3"),
        ({"hidden_act": "relu2"}, "'relu2'", "gelu_pytorch_tanh"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "'proportional'", "longrope"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "ntk"}}, "'ntk'", "longrope"),
        ({"model_type": "gemma2", "sliding_window": 8, "layer_types": [[]] * 3}, "[]", "full_attention"),
    ],
)  # fmt: skip
def test_what_is_not_handled_is_refused_with_what_is(changes: Any, words: str, hint: str, llama: Path) -> None:
    change_json(llama / "config.json", **changes)
    error = refusal(llama)
    assert isinstance(error, UnsupportedError)
    assert words in error.message
    assert hint in str(error.hint)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": ...}, "has no 'model_type'"),
        ({"vocab_size": "320"}, "vocab_size is '320'"),
        ({"num_hidden_layers": 1 << 30}, "num_hidden_layers is 1073741824, expected at most"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"head_dim": 15}, "head_dim is 15, expected an even number"),
        ({"head_dim": None, "hidden_size": 60}, "head_dim is 15, expected an even number"),
        ({"head_dim": None, "hidden_size": 65}, "hidden_size is 65, expected a multiple of 4"),
        ({"num_key_value_heads": 3}, "expected a multiple of 3"),
        ({"partial_rotary_factor": 0.3, "head_dim": 10}, "3 of 10 dimensions would be rotated"),
        ({"partial_rotary_factor": 0.01}, "0 of 16 dimensions would be rotated"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, expected at most 1"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_theta is 1.0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0}}, "factor is 0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": -1}}, "beta_fast is -1"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0"),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 1}}, "at least 2"),
        ({"rope_parameters": []}, "rope_parameters is [], expected an object"),
        ({"eos_token_id": 320}, "end token 320"),
    ],
)
def test_wrong_config_value_is_named(changes: Any, words: str, llama: Path) -> None:
    (llama / "generation_config.json").unlink()
    change_json(llama / "config.json", **changes)
    error = refusal(llama)
    assert isinstance(error, SourceError)
    assert words in error.message


def test_origin_and_files_are_recorded(llama: Path) -> None:
    (llama / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Model\n", encoding="utf-8")
    source = open_source(llama)
    assert (source.provenance.kind, source.provenance.name) == ("safetensors", "llama")
    assert source.provenance.licence == "apache-2.0"
    assert source.weight_files == (llama / "model.safetensors",)
    assert not source.quantized
    assert source.parameters == sum(values.size for values in library_values(llama).values())


def test_file_cut_after_opening_is_an_error_on_reading(llama: Path) -> None:
    source = open_source(llama)
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(SourceError, match="ends after"):
        source.parts["embedding"][0].read()
