"""Damaged and hostile checkpoints: whatever a file holds, readers end in one of EdgeKit's own errors, soon and small."""

from __future__ import annotations

import copy
import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.converters.from_gguf import open_gguf
from edgekit.converters.from_safetensors import open_directory, read_header
from edgekit.converters.gguf_header import read_gguf_header
from edgekit.converters.positional_file import PositionalFile
from edgekit.converters.to_onnx import export
from edgekit.errors import EdgeKitError
from edgekit.plan import make_plan
from edgekit.source import Source
from edgekit.target import load_target

# Files here have some 60 KB; reading one takes a few milliseconds and less than a megabyte.
MOST_BYTES = 32_000_000
MOST_TIME = timedelta(seconds=5)
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=MOST_TIME,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@contextmanager
def only_edgekit_errors() -> Iterator[None]:
    tracemalloc.start()
    try:
        with suppress(EdgeKitError):
            yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_BYTES


# ---- Bytes ----

NUMBERS = [0, 1, 0x7F, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 62) - 1, (1 << 63) - 1, (1 << 64) - 1]
OVERWRITES = st.sampled_from([number.to_bytes(8, "little") for number in NUMBERS]) | st.binary(min_size=1, max_size=9)


@st.composite
def damaged(draw: st.DrawFn, original: bytes, header_bytes: int) -> bytes:
    """A valid file with its header overwritten, spliced or cut at a few places."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, min(header_bytes, len(data))))
        change = draw(st.sampled_from(["overwrite", "flip", "insert", "delete", "move", "cut"]))
        if change == "overwrite":
            piece = draw(OVERWRITES)
            data[place : place + len(piece)] = piece
        elif change == "flip" and place < len(data):
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif change == "insert":
            data[place:place] = draw(OVERWRITES)
        elif change == "delete":
            del data[place : place + draw(st.integers(1, 40))]
        elif change == "move":
            start = draw(st.integers(0, header_bytes))
            data[place:place] = data[start : start + draw(st.integers(1, 200))]
        elif change == "cut":
            del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


@pytest.fixture(scope="module")
def hugging_face(tiny_model: Any) -> Path:
    return Path(tiny_model("llama", num_hidden_layers=1, **SIZES))


@pytest.fixture(scope="module")
def gguf_bytes(hugging_face: Path, write_gguf: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path: Path = write_gguf(hugging_face, tmp_path_factory.mktemp("gguf") / "model.gguf")
    return path.read_bytes()


@fuzz(60)
@given(data=st.binary(max_size=200), magic=st.sampled_from([b"", b"GGUF\x03\0\0\0", b"\x40\0\0\0\0\0\0\0{"]))
def test_random_bytes(data: bytes, magic: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(magic + data)
    for read in (read_header, read_gguf_header):
        with only_edgekit_errors():
            read(PositionalFile(path))


@fuzz(250)
@given(data=st.data())
def test_damaged_gguf(data: st.DataObject, gguf_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    header_bytes = gguf_bytes.index(b"output_norm.weight") + 30
    path.write_bytes(data.draw(damaged(gguf_bytes, header_bytes)))
    with only_edgekit_errors():
        open_gguf(path)


@fuzz(150)
@given(data=st.data())
def test_damaged_gguf_metadata(data: st.DataObject, gguf_bytes: bytes, tmp_path: Path) -> None:
    """Aimed at the few values that describe the model, which random places seldom hit."""
    path = tmp_path / "model.gguf"
    tokens = gguf_bytes.index(b"tokenizer.ggml.tokens")
    after = gguf_bytes.index(b"tokenizer.ggml.merges")
    changed = data.draw(damaged(gguf_bytes[:tokens], tokens)) + gguf_bytes[tokens:after]
    path.write_bytes(changed + data.draw(damaged(gguf_bytes[after:], 1500)))
    with only_edgekit_errors():
        open_gguf(path)


@fuzz(150)
@given(data=st.data())
def test_damaged_safetensors(data: st.DataObject, hugging_face: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    if not directory.is_dir():
        shutil.copytree(hugging_face, directory)
    original = (hugging_face / "model.safetensors").read_bytes()
    header_bytes = 8 + int.from_bytes(original[:8], "little")
    (directory / "model.safetensors").write_bytes(data.draw(damaged(original, header_bytes)))
    with only_edgekit_errors():
        open_directory(directory)


# ---- JSON ----

JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 1 << 31, 1 << 63, 10**400, 0.5, -0.0, 1.5, 5e-324, 1e-30, 1e30, 1e308,
    float("nan"), float("inf"), "", "text", "default", "yarn", "linear", "longrope", "llama3", "sliding_attention",
    "\ud800", "\0", "\x1b[2J", "a" * 1000, [], [[]], [{}], [None], [1.0] * 4, ["full_attention"], [0, 1], {}, {"a": []},
    {"content": 3}, {"rope_type": "yarn", "factor": 2.0}, {"rope_type": []}, {"full_attention": 3},
]  # fmt: skip


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(document, dict):
        for key, value in list(document.items())[:60]:
            yield from places(value, (*path, key))
    elif isinstance(document, list):
        for index, value in enumerate(document[:4]):
            yield from places(value, (*path, index))


@st.composite
def swapped(draw: st.DrawFn, original: str, keys: tuple[str, ...] = ()) -> str:
    """A JSON document with a few values replaced, removed or added."""
    document = json.loads(original)
    for _ in range(draw(st.integers(1, 3))):
        known = [*places(document), *((key,) for key in (*keys, "new"))]
        path = draw(st.sampled_from(known))
        target = document
        for key in path[:-1]:
            target = target[key]
        if draw(st.integers(0, 5)) == 0 and (isinstance(target, list) or path[-1] in target):
            del target[path[-1]]
        else:
            target[path[-1]] = copy.deepcopy(draw(st.sampled_from(JUNK)))
    return json.dumps(document)


KEYS = (
    "attention_bias", "head_dim", "layer_types", "max_window_layers", "mlp_bias", "no_rope_layers",
    "no_rope_layer_interval", "original_max_position_embeddings", "partial_rotary_factor", "quantization_config",
    "query_pre_attn_scalar", "rope_scaling", "rope_theta", "sliding_window", "sliding_window_pattern",
    "use_sliding_window", "norm_offset", "rope_local_base_freq", "use_bidirectional_attention",
)  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "beta_fast": 32.0,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 8, "rope_parameters": YARN | {"original_max_position_embeddings": 64}},
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "smollm3": {"no_rope_layers": [1, 0]},
    "ministral": {"head_dim": 6, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "ministral3": {
        "head_dim": 8,
        "rope_parameters": YARN | {"original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.1},
    },
    "gemma3": {
        "text_config": {"head_dim": 8, "sliding_window": 8, "num_hidden_layers": 2, **SIZES},
        "vision_config": {**SIZES, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
        "image_token_index": 7,
    },
}


def opened_copy(original: Path, folder: Path, name: str, text: str) -> Callable[[], Source]:
    """Opens a copy of a model with one file changed."""
    directory = folder / original.name
    if not directory.is_dir():
        shutil.copytree(original, directory)
    (directory / name).write_text(text, encoding="utf-8")
    return lambda: open_directory(directory)


@pytest.fixture
def original(model_type: str, tiny_model: Any) -> Path:
    """Made here, since an example's time limit is not for loading transformers."""
    sizes = {} if "text_config" in MODELS[model_type] else {"num_hidden_layers": 2, **SIZES}
    directory: Path = tiny_model(model_type, **sizes, **MODELS[model_type])
    return directory


@pytest.mark.parametrize("model_type", MODELS)
@fuzz(60)
@given(data=st.data())
def test_changed_config_is_refused_or_converts(
    model_type: str, data: st.DataObject, original: Path, tmp_path: Path
) -> None:
    text = data.draw(swapped((original / "config.json").read_text(encoding="utf-8"), KEYS))
    open_it = opened_copy(original, tmp_path, "config.json", text)
    with only_edgekit_errors():
        source = open_it()
        plan = make_plan(source, load_target("linux-x86-64"), quant="int8", context=min(64, source.config.context))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        export(source, plan, tmp_path / "out")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@fuzz(60)
@given(data=st.data())
def test_changed_tokenizer_files(name: str, data: st.DataObject, hugging_face: Path, tmp_path: Path) -> None:
    keys = ("added_tokens_decoder", "chat_template", "eos_token", "eos_token_id", "temperature", "model")
    text = data.draw(swapped((hugging_face / name).read_text(encoding="utf-8"), keys))
    open_it = opened_copy(hugging_face, tmp_path, name, text)
    with only_edgekit_errors():
        open_it()


@fuzz(60)
@given(data=st.data())
def test_changed_index(data: st.DataObject, tiny_model: Any, tmp_path: Path) -> None:
    original = tiny_model("llama", num_hidden_layers=1, max_shard_size="20KB", **SIZES)
    text = data.draw(swapped((original / "model.safetensors.index.json").read_text(encoding="utf-8")))
    open_it = opened_copy(original, tmp_path, "model.safetensors.index.json", text)
    with only_edgekit_errors():
        open_it()


@fuzz(100)
@given(data=st.data())
def test_changed_safetensors_header(data: st.DataObject, hugging_face: Path, tmp_path: Path) -> None:
    original = (hugging_face / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    header = data.draw(swapped(original[8:end].decode())).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + original[end:])
    with only_edgekit_errors():
        read_header(PositionalFile(path))
