"""Outlines: what is read of a model to plan it, from a directory, a GGUF, and a hub id without its weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
from transformers import AutoConfig

from edgekit.anatomy import Anatomy, anatomy_of
from edgekit.converters.anatomies.families import describe
from edgekit.converters.architectures.fields import ConfigFields
from edgekit.errors import SourceError
from edgekit.outline import Outline, UnknownModel, open_outline, outline_of
from edgekit.plan import make_plan
from edgekit.source import open_source
from edgekit.target import load_target

LINUX = load_target("linux-x86-64")


def known(source: str | Path) -> Outline:
    found = open_outline(source)
    assert isinstance(found, Outline), found
    return found


def unknown(source: str | Path) -> str:
    found = open_outline(source)
    assert isinstance(found, UnknownModel)
    return found.reason


def write_config(directory: Path, values: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return directory


def default_config(model_type: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = AutoConfig.for_model(model_type).to_dict()
    return values | changes


# ---- A directory ----


def test_a_config_alone_gives_the_plan_of_the_whole_checkpoint(tiny_model: Any, tmp_path: Path) -> None:
    source = open_source(tiny_model("llama"))
    (tmp_path / "alone").mkdir()
    shutil.copy(tiny_model("llama") / "config.json", tmp_path / "alone")
    outline = known(tmp_path / "alone")
    assert outline.config == source.config
    assert outline.anatomy == outline_of(source).anatomy
    assert make_plan(outline, LINUX) == make_plan(source, LINUX)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "qwen3_next"])
def test_a_model_that_is_not_converted_is_planned_with_a_note(model_type: str, tmp_path: Path) -> None:
    outline = known(write_config(tmp_path / "m", default_config(model_type)))
    assert (outline.name, outline.config) == ("m", None)
    assert make_plan(outline, LINUX).notes[0] == f"EdgeKit does not convert {model_type} yet"


def test_a_quantized_checkpoint_is_planned_with_a_note(tmp_path: Path) -> None:
    values = default_config("qwen3", quantization_config={"quant_method": "fp8"})
    outline = known(write_config(tmp_path, values))
    assert outline.config
    assert outline.obstacle == "this checkpoint is already quantized with FP8, which is not read"


def test_a_packed_checkpoint_has_no_obstacle_but_a_note(tmp_path: Path) -> None:
    settings = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    outline = known(write_config(tmp_path, default_config("qwen3", quantization_config=settings)))
    assert outline.obstacle == ""
    assert "counts its weights as floats" in outline.notes[0]


def test_the_text_part_of_a_multimodal_model_is_planned(tmp_path: Path) -> None:
    text = default_config("gemma3n_text")
    outline = known(write_config(tmp_path, {"model_type": "gemma3n", "text_config": text, "vision_config": {}}))
    assert outline.anatomy == describe(ConfigFields(text, ""))
    assert outline.notes == ("the text part of a gemma3n checkpoint: images and sound are not counted",)


def test_the_text_part_may_be_of_a_converted_kind_inside_another(tmp_path: Path) -> None:
    text = default_config("qwen2")
    outline = known(write_config(tmp_path, {"model_type": "llava", "text_config": text, "vision_config": {}}))
    assert outline.anatomy.model_type == "qwen2"
    assert outline.obstacle == "EdgeKit does not convert llava yet"


def test_the_list_of_tensors_says_if_the_head_is_its_own(tmp_path: Path) -> None:
    text = {key: value for key, value in default_config("mistral").items() if key != "tie_word_embeddings"}
    write_config(tmp_path, {"model_type": "mistral3", "text_config": text})
    assert "head" not in known(tmp_path).anatomy.weights
    index = {"weight_map": {"language_model.lm_head.weight": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert "head" in known(tmp_path).anatomy.weights


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "qwen2_vl"}, "the architecture 'qwen2_vl' is not understood"),
        ({"model_type": "bert"}, "the architecture 'bert' is not understood"),
        ({"model_type": "qwen3_next", "layer_types": ["odd"] * 48}, "layers of the kind 'odd' are not known"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "spiral"}}, "spiral"),
    ],
)
def test_what_is_not_understood_is_unknown(values: dict[str, Any], reason: str, tmp_path: Path) -> None:
    base = default_config(values["model_type"])
    base.pop("rope_parameters", None)
    assert reason in unknown(write_config(tmp_path, base | values))


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"hidden_size": 3}', '{"model_type": "mixtral"}', '{"model_type": 4}']
)
def test_a_broken_config_is_an_error_and_not_unknown(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(SourceError, match=r"config\.json"):
        open_outline(tmp_path)


# ---- No weights are read ----


@contextmanager
def bytes_read() -> Iterator[Callable[[], int]]:
    """How much PositionalFile, the only way to a weight, and files opened whole have read."""
    opened: list[Path] = []
    active = [True]

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if active[0] and event == "open" and isinstance(arguments[0], str | Path):
            opened.append(Path(arguments[0]))

    sys.addaudithook(note)
    try:
        yield lambda: sum(path.stat().st_size for path in set(opened) if path.suffix == ".safetensors")
    finally:
        active[0] = False


def test_a_plan_opens_no_file_of_weights(tiny_model: Any, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_model("llama", max_shard_size="100KB"), tmp_path / "m"))
    assert list(directory.glob("*.safetensors"))
    with bytes_read() as count:
        make_plan(known(directory), LINUX)
        assert count() == 0
        open_source(directory)
        assert count() > 0, "the counter works"


def test_of_a_gguf_only_the_header_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekit.converters import gguf_header, positional_file

    read: list[tuple[int, int]] = []
    original = positional_file.PositionalFile.read

    def counted(self: Any, offset: int, size_bytes: int) -> Any:
        read.append((offset, size_bytes))
        return original(self, offset, size_bytes)

    monkeypatch.setattr(positional_file.PositionalFile, "read", counted)
    outline = known("sample")
    file = next(iter(outline.parts["embedding"])).file  # type: ignore[attr-defined]
    start = gguf_header.read_gguf_header(file).data_start
    assert make_plan(outline, LINUX).fits == "yes"
    ahead = 1 << 20  # the header is read in pieces of this size, or of twice what was read before
    assert all(offset + size <= 2 * start + ahead for offset, size in read)
    assert sum(size for _, size in read) < file.size_bytes / 10


def test_a_gguf_has_the_plan_of_its_open_checkpoint() -> None:
    assert make_plan(known("sample"), LINUX) == make_plan(open_source("sample"), LINUX)


# ---- A hub that serves a config only ----

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The answers of the hub that a snapshot of single files needs; it remembers which files were asked for."""

    config = b""
    files: tuple[str, ...] = ("config.json", "model-00001-of-00163.safetensors", "README.md")
    fetched: tuple[str, ...] = ()

    def do_GET(self) -> None:
        """Repository information, or the config."""
        if "/resolve/" in self.path:
            Hub.fetched += (self.path.rpartition("/")[2],)
        if self.path.startswith("/api/models/org/big/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            repository = {"id": "org/big", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            self._answer(json.dumps(repository).encode(), "application/json")
        elif self.path.startswith("/api/models/org/big/tree/"):
            tree = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.files]
            self._answer(json.dumps(tree).encode(), "application/json")
        elif self.path == f"/org/big/resolve/{COMMIT}/config.json":
            self._answer(self.config, "application/json")
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815 - http.server's own name

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"' + "a" * 40 + '"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A stand-in for huggingface.co on this machine, with one repository of which only the config is served."""
    Hub.config = json.dumps(default_config("deepseek_v3")).encode()
    Hub.fetched = ()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield Hub
    server.shutdown()
    server.server_close()


def test_of_a_hub_id_only_the_config_is_fetched(hub: type[Hub]) -> None:
    outline = known("org/big")
    assert (outline.name, outline.anatomy.parameters) == ("org/big", 671_026_404_352)
    assert set(hub.fetched) == {"config.json"}
    assert make_plan(outline, LINUX).fits == "no"


def test_a_repository_without_a_config_is_an_error(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "files", ("model.gguf",))
    with pytest.raises(SourceError, match=r"config\.json is missing"):
        open_outline("org/big")


# ---- GGUF headers of architectures that are not converted ----

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3moe": ("qwen3_moe", {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 32}),
    "deepseek2": (
        "deepseek_v3",
        {"n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 32,
         "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    ),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 64,
                            "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "llama": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
}  # fmt: skip
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 4, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip


def tiny_config(model_type: str, changes: dict[str, Any]) -> Any:
    return AutoConfig.for_model(model_type, **(SIZES | changes))


def write_gguf(path: Path, architecture: str, config: Any) -> None:
    """A GGUF of transformers' own parameters under the names that the gguf package gives them; only the header counts."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)
    count = getattr(config, "num_local_experts", None) or getattr(config, "n_routed_experts", 0)
    if count:
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
    for name, values in split_experts(dict(model.named_parameters()), config):
        plain = name.removesuffix(".weight").removesuffix(".bias")
        suffix = ".bias" if name.endswith("bias") else ".weight"
        found = names.get_name(plain) or names.get_name(name)
        assert found, name
        writer.add_tensor(found + suffix, values.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def split_experts(state: dict[str, Any], config: Any) -> Iterator[tuple[str, Any]]:
    """transformers keeps gate and up in one tensor, GGUF in two."""
    for name, values in state.items():
        if "lm_head" in name and config.tie_word_embeddings:
            continue
        if ".experts.gate_up_proj" in name:
            axis = -1 if config.model_type == "gpt_oss" else 1
            gate, up = values.chunk(2, dim=axis)
            for part, half in (("gate_proj", gate), ("up_proj", up)):
                yield name.replace("gate_up_proj_bias", f"{part}.bias").replace("gate_up_proj", part), half.contiguous()
        else:
            yield name.replace("down_proj_bias", "down_proj.bias"), values


@pytest.mark.parametrize("architecture", sorted(TINY))
def test_a_gguf_header_gives_the_anatomy_of_the_config(architecture: str, tmp_path: Path) -> None:
    model_type, changes = TINY[architecture]
    config = tiny_config(model_type, changes)
    path = tmp_path / "m.gguf"
    write_gguf(path, architecture, config)
    outline, expected = known(path), describe(ConfigFields(config.to_dict(), ""))
    assert outline.obstacle == f"EdgeKit does not convert {architecture} yet"
    assert counts(outline.anatomy) == counts(expected)
    assert outline.anatomy.caches == expected.caches
    assert outline.anatomy.active_parameters == pytest.approx(expected.active_parameters, abs=1)
    assert make_plan(outline, LINUX).fits == "yes"


def counts(anatomy: Anatomy) -> dict[str, int]:
    return {kind: count for kind, count in anatomy.parameters_by_kind().items() if count}


def test_a_gguf_of_an_unknown_architecture_is_unknown(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert unknown(tmp_path / "m.gguf") == "the GGUF architecture 'mamba' is not understood"


def test_described_models_have_one_anatomy_by_either_way(tiny_model: Any) -> None:
    source = open_source(tiny_model("gemma3_text"))
    assert known(tiny_model("gemma3_text")).anatomy == anatomy_of(source.config)
