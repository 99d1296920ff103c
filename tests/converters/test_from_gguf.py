"""The GGUF reader: whole models against transformers, and every stored type against the `gguf` package."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.converters.from_gguf import GgufTensor, _tokenizer, open_gguf
from edgekit.converters.gguf_blocks import BLOCK_TYPES
from edgekit.converters.gguf_header import read_gguf_header
from edgekit.converters.positional_file import PositionalFile
from edgekit.errors import EdgeKitError, SourceError, UnsupportedError
from edgekit.plan import make_plan
from edgekit.source import open_source
from edgekit.target import load_target

WINDOW = 24
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [1.5 + 0.7 * index for index in range(8)],
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
}
GEMMA = {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
PARTIAL = {"partial_rotary_factor": 0.5, "head_dim": 32, "num_attention_heads": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-wide": ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3-no-window": ("phi3", {"sliding_window": None}),
    "phi3-partial": ("phi3", {"sliding_window": None, **PARTIAL}),
    "phi3-longrope-short": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    "phi3-longrope-long": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA | {"rope_parameters": GEMMA3_ROPE, "num_hidden_layers": 6}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "llama-100": ("llama", {"head_dim": 100, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "llama-20-llama3": ("llama", {"head_dim": 20, "rope_parameters": LLAMA3}),
    "phi3-partial-20": ("phi3", {"sliding_window": None, "hidden_size": 80, "partial_rotary_factor": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_original_models(
    case: str, tiny_model: Any, write_gguf: Any, check_logits: Any, tmp_path: Path
) -> None:
    model_type, changes = CASES[case]
    directory = tiny_model(model_type, **changes)
    path = write_gguf(directory, tmp_path / "model.gguf")
    check_logits(path, directory, tmp_path / "out")


@pytest.mark.parametrize("written", ["zero", "nothing"])
def test_gemma3_without_a_window_has_full_attention_everywhere(
    written: str, tiny_model: Any, write_gguf: Any, check_logits: Any, tmp_path: Path
) -> None:
    """As llama.cpp reads it: every layer is rotated as the global ones are."""
    everywhere = {"layer_types": ["full_attention"] * 3, "rope_parameters": GEMMA3_ROPE}
    directory = tiny_model("gemma3_text", **GEMMA | everywhere)
    extra = {"attention.sliding_window": (0, gguf.GGUFValueType.UINT32)} if written == "zero" else None
    path = write_gguf(directory, tmp_path / "model.gguf", extra=extra)
    check_logits(path, directory, tmp_path / "out")


def test_what_llama_cpp_reads_into_an_absent_key_counts(tiny_model: Any, write_gguf: Any, tmp_path: Path) -> None:
    """Not transformers' default: 32 key-value heads and heads of 128 for qwen3."""
    directory = tiny_model("qwen3", head_dim=16, num_attention_heads=4, num_key_value_heads=4)
    whole = write_gguf(directory, tmp_path / "whole.gguf")
    cut = tmp_path / "cut.gguf"
    data = whole.read_bytes()
    for key in (b"attention.head_count_kv", b"attention.key_length"):
        assert data.count(key) == 1
        data = data.replace(key, b"x" * len(key))
    cut.write_bytes(data)
    assert open_gguf(cut).config.attention == open_gguf(whole).config.attention


def end_tokens(kinds: dict[str, int], named: dict[str, int]) -> tuple[int, ...]:
    texts = ["a", "b", *kinds]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [1, 1, *kinds.values()],
        "tokenizer.ggml.merges": [],
    }
    return _tokenizer(metadata | {f"tokenizer.ggml.{key}": value for key, value in named.items()}).eos_token_ids


def test_end_tokens_are_those_named_then_those_known_by_their_text() -> None:
    kinds = {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 4, "<|eot_id|>": 1, "<|end|>": 5}
    assert end_tokens(kinds, {"eos_token_id": 4}) == (4, 2)
    assert end_tokens(kinds, {"eos_token_id": 2, "eot_token_id": 3}) == (2, 3, 4)
    assert end_tokens(kinds, {}) == (2, 4)


# ---- Every stored type ----

ROWS, COLUMNS, HEAD_DIM = 24, 512, 8
KINDS = [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, *gguf.quants._type_traits]
SLICES = st.lists(st.integers(0, ROWS), min_size=2, max_size=2, unique=True).map(sorted)
FEW = settings(max_examples=12, deadline=None, derandomize=True)


@cache
def stored_bytes(kind: gguf.GGMLQuantizationType) -> NDArray[np.uint8]:
    """Rows of a type: quantized from noise where `gguf` can, else random bytes, of which every pattern is valid."""
    generator = np.random.default_rng(int(kind))
    noise = generator.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    try:
        return np.ascontiguousarray(gguf.quants.quantize(noise, kind)).view(np.uint8)
    except NotImplementedError:
        block, size_bytes = gguf.GGML_QUANT_SIZES[kind]
        return generator.integers(0, 256, (ROWS, COLUMNS // block * size_bytes), dtype=np.uint8)


def one_tensor(path: Path, kind: gguf.GGMLQuantizationType, *, head_dim: int = 0) -> GgufTensor:
    """A file that is one tensor's bytes."""
    data = stored_bytes(kind)
    path.write_bytes(data.tobytes())
    return GgufTensor("weight", (ROWS, COLUMNS), kind.name, data.nbytes, PositionalFile(path), 0, head_dim)


def reference(kind: gguf.GGMLQuantizationType) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        values: NDArray[np.float32] = gguf.quants.dequantize(stored_bytes(kind), kind)
    return values


def in_halves(rows: NDArray[Any]) -> NDArray[Any]:
    """Undo llama.cpp's permutation."""
    return rows.reshape(-1, HEAD_DIM // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensors")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_whole_tensor_equals_gguf(kind: gguf.GGMLQuantizationType, folder: Path) -> None:
    found = one_tensor(folder / kind.name, kind).read()
    assert found.shape == (ROWS, COLUMNS)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, reference(kind))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@FEW
@given(rows=SLICES)
def test_row_slices_equal_gguf(kind: gguf.GGMLQuantizationType, folder: Path, rows: list[int]) -> None:
    start, stop = rows
    whole = reference(kind)
    plain = one_tensor(folder / kind.name, kind)
    np.testing.assert_array_equal(plain.read(start, stop), whole[start:stop])
    permuted = one_tensor(folder / kind.name, kind, head_dim=HEAD_DIM)
    np.testing.assert_array_equal(permuted.read(start, stop), in_halves(whole)[start:stop])


@pytest.mark.parametrize("head_dim", [0, HEAD_DIM])
@pytest.mark.parametrize("name", BLOCK_TYPES)
@FEW
@given(rows=SLICES)
def test_slices_of_blocks_are_slices_of_them_all(name: str, head_dim: int, folder: Path, rows: list[int]) -> None:
    start, stop = rows
    tensor = one_tensor(folder / name, gguf.GGMLQuantizationType[name], head_dim=head_dim)
    whole = one_tensor(folder / name, gguf.GGMLQuantizationType[name]).read_blocks(0, ROWS)
    found = tensor.read_blocks(start, stop)
    assert found.format == tensor.exact_format == whole.format
    for part, of_all in ((found.values, whole.values), (found.scales, whole.scales), (found.offsets, whole.offsets)):
        assert (part is None) == (of_all is None)
        if part is not None and of_all is not None:
            np.testing.assert_array_equal(part, (in_halves(of_all) if head_dim else of_all)[start:stop])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name not in BLOCK_TYPES], ids=lambda kind: kind.name)
def test_other_types_are_not_carried(kind: gguf.GGMLQuantizationType, folder: Path) -> None:
    assert one_tensor(folder / kind.name, kind).exact_format is None


# ---- Against transformers' own reader ----


def transformers_weights(path: Path) -> dict[str, NDArray[np.float32]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_tensors_equal_those_transformers_loads(
    model_type: str, tiny_model: Any, write_gguf: Any, tmp_path: Path
) -> None:
    kinds = {f"blk.{index}.attn_{part}.weight": gguf.GGMLQuantizationType.Q8_0 for index in range(3) for part in "qk"}
    path = write_gguf(tiny_model(model_type), tmp_path / "model.gguf", kinds=kinds)
    expected = transformers_weights(path)
    found = {tensor.name: tensor for parts in open_gguf(path).parts.values() for tensor in parts}
    assert set(found) == set(expected)
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.read(), expected[name], err_msg=name)


@pytest.mark.slow
def test_sample_tensors_equal_those_transformers_loads(sample_gguf: Path, tmp_path: Path) -> None:
    link = tmp_path / "sample.gguf"
    link.symlink_to(sample_gguf)
    expected = transformers_weights(link)
    source = open_gguf(sample_gguf)
    assert source.quantized
    for role in ("embedding", "layers.0.qkv", "layers.7.gate_up", "layers.29.down", "final_norm"):
        for tensor in source.parts[role]:
            np.testing.assert_array_equal(tensor.read(), expected[tensor.name], err_msg=tensor.name)


# ---- What is refused, and how ----


def refusal(path: Path) -> EdgeKitError:
    with pytest.raises(EdgeKitError) as caught:
        open_source(path)
    assert caught.value.hint, "an error says what to do"
    return caught.value


@pytest.fixture(scope="module")
def tiny_gguf(tiny_model: Any, write_gguf: Any, folder: Path) -> bytes:
    path: Path = write_gguf(tiny_model("llama"), folder / "tiny.gguf")
    return path.read_bytes()


def test_truncated_file_names_the_tensor_and_both_sizes(tiny_gguf: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf[:-1000])
    error = refusal(path)
    assert isinstance(error, SourceError)
    assert f"{len(tiny_gguf) - 1000:,}" in error.message
    assert "tensor" in error.message


@pytest.mark.parametrize(
    ("old", "new", "kind", "words"),
    [
        (b"GGUF\x03", b"GGUX\x03", SourceError, "is not a GGUF file"),
        (b"GGUF\x03\x00\x00\x00", b"GGUF\x00\x00\x00\x03", UnsupportedError, "big-endian"),
        (b"GGUF\x03", b"GGUF\x01", UnsupportedError, "GGUF version 1"),
        (b"\x05" + bytes(7) + b"llama", b"\x05" + bytes(7) + b"bloom", UnsupportedError, "'bloom'"),
        (b"blk.0.attn_q.weight", b"blk.0.attn_x.weight", SourceError, "layers.0.self_attn.q_proj.weight is missing"),
        (b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight", SourceError, "twice"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn\x1bup.weight", SourceError, "control characters"),
        (b"llama.block_count", b"llama.block_kount", SourceError, "num_hidden_layers"),
        (b"token_embd.weight", b"token_embx.weight", SourceError, "token_embd.weight"),
    ],
)  # fmt: skip
def test_changed_header_is_refused(
    old: bytes, new: bytes, kind: type[EdgeKitError], words: str, tiny_gguf: bytes, tmp_path: Path
) -> None:
    assert tiny_gguf.count(old) >= 1
    path = tmp_path / "changed.gguf"
    path.write_bytes(tiny_gguf.replace(old, new, 1))
    error = refusal(path)
    assert type(error) is kind
    assert words in error.message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("split.count", [1], "split"),
        ("rope.scaling.yarn_attn_factor", 2.0, "yarn_attn_factor"),
        ("rope.scaling.type", "dynamic", "'dynamic'"),
    ],
)
def test_metadata_that_is_not_handled_is_refused(
    key: str, value: Any, words: str, tiny_gguf: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "changed.gguf"
    path.write_bytes(tiny_gguf)

    def with_value(file: PositionalFile) -> Any:
        header = read_gguf_header(file)
        linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
        changed = {**header.metadata, **linear, key if key.startswith("split") else f"llama.{key}": value}
        return type(header)(changed, header.tensors, header.data_start)

    monkeypatch.setattr("edgekit.converters.from_gguf.read_gguf_header", with_value)
    error = refusal(path)
    assert isinstance(error, UnsupportedError)
    assert words in error.message


def test_types_that_cannot_be_read_are_refused_by_name(tiny_gguf: bytes, tmp_path: Path) -> None:
    name = b"output_norm.weight"
    place = tiny_gguf.index(name) + len(name) + 4 + 8  # one dimension, then the type
    path = tmp_path / "integers.gguf"
    path.write_bytes(
        tiny_gguf[:place] + int(gguf.GGMLQuantizationType.I32).to_bytes(4, "little") + tiny_gguf[place + 4 :]
    )
    error = refusal(path)
    assert isinstance(error, UnsupportedError)
    assert "output_norm.weight" in error.message
    assert "I32" in error.message


def test_overlapping_tensors_are_refused(tiny_gguf: bytes, tmp_path: Path) -> None:
    name = b"output_norm.weight"
    place = tiny_gguf.index(name) + len(name) + 4 + 8 + 4  # one dimension and the type, then the offset
    path = tmp_path / "overlap.gguf"
    path.write_bytes(tiny_gguf[:place] + bytes(8) + tiny_gguf[place + 8 :])
    error = refusal(path)
    assert isinstance(error, SourceError)
    assert "overlap" in error.message


def test_opening_reads_the_header_and_rope_factors_only(
    tiny_model: Any, write_gguf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tiny_model("llama", rope_parameters=LLAMA3), tmp_path / "model.gguf")
    monkeypatch.setattr("edgekit.converters.gguf_header._CHUNK_BYTES", 4096)
    data_start = read_gguf_header(PositionalFile(path)).data_start
    read, original = [], PositionalFile.read

    def counted(self: PositionalFile, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        read.append(size_bytes)
        return original(self, offset, size_bytes)

    monkeypatch.setattr(PositionalFile, "read", counted)
    open_gguf(path)
    # The window over the header doubles as it grows, so it ends at most at twice the header's size.
    assert sum(read) <= 2 * data_start + 4096
    assert sum(read) < path.stat().st_size / 2


def test_gguf_keeps_its_blocks_in_the_plan(tiny_model: Any, write_gguf: Any, tmp_path: Path) -> None:
    kinds = {"blk.0.ffn_down.weight": gguf.GGMLQuantizationType.Q8_0, "output.weight": gguf.GGMLQuantizationType.Q4_0}
    source = open_gguf(write_gguf(tiny_model("llama"), tmp_path / "model.gguf", kinds=kinds))
    plan = make_plan(source, load_target("linux-x86-64"), quant="auto")
    assert plan.quant == "keep"
    assert {role for role, weight in plan.weights.items() if weight.carried} == {"layers.0.down", "head"}
    assert plan.weights["head"].format.bits == 4
