"""Putting a checkpoint's tensors under the roles of its decoder, each name and shape checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgekit.config import ModelConfig
from edgekit.errors import SourceError, UnsupportedError
from edgekit.registry import ARCHITECTURES, MULTIMODAL, load_attribute
from edgekit.source import Provenance, Source, Tensor, TokenizerFiles, part_shapes, require_supported

from .architectures.fields import ConfigFields
from .prequantized import PACKED_TYPES

__all__ = ["assemble_source", "described_parts"]

# Left-overs that published checkpoints carry and no model reads.
_UNUSED = re.compile(r"(rotary_emb\.inv_freq|rope_freqs\.weight|rope_factors_(long|short)\.weight|\.masked_bias)$")
_SAFETENSORS_TYPES = {"F64", "F32", "F16", "BF16"} | PACKED_TYPES
COMPARED_ROWS = 64  # a head that was trained apart differs in every row
_LAYER = re.compile(r"layers\.(\d+)\.(\w+)")


def assemble_source(
    config: Mapping[str, object],
    origin: str,
    tensors: Mapping[str, Tensor],
    tokenizer: TokenizerFiles,
    *,
    provenance: Provenance,
    weight_files: tuple[Path, ...],
    notes: tuple[str, ...] = (),
) -> Source:
    """Describe the model and give each of its roles the tensors that make it up.

    Args:
        config: A Hugging Face config, or a GGUF's metadata put in its words.
        origin: The file the config came from, for errors.
        tensors: By Hugging Face name.
        notes: What the reader has to say about the checkpoint.

    Raises:
        UnsupportedError: The architecture is not described, or the checkpoint has tensors that it does not use or that are
            of a type that is not read.
        SourceError: A tensor is missing or of another shape than the config says.
    """
    description, parts, found = described_parts(config, origin, tensors)
    if provenance.kind == "safetensors":  # a GGUF's types are checked as it is read
        _check_types(parts)
    _check_tokenizer(description, tokenizer)
    return Source(description, tokenizer, parts, provenance, weight_files, notes + found)


def described_parts(
    config: Mapping[str, object], origin: str, tensors: Mapping[str, Tensor]
) -> tuple[ModelConfig, dict[str, tuple[Tensor, ...]], tuple[str, ...]]:
    """The description, the tensors of each role, and notes; arguments and errors as `assemble_source` has them."""
    fields = ConfigFields(config, origin)
    model_type = fields.text("model_type")
    require_supported("architecture", model_type, ARCHITECTURES, also=MULTIMODAL)
    architecture = load_attribute(ARCHITECTURES[model_type])
    description: ModelConfig = architecture.describe(fields)
    notes: tuple[str, ...] = ()
    if description.tied_embeddings and _has_own_head(description, architecture.NAMES, tensors):
        description = replace(description, tied_embeddings=False)
        notes = ("the head differs from the embedding and is kept, though the config says that they are one",)
    parts = {
        role: _parts_of(description, role, shape, architecture.NAMES, tensors)
        for role, shape in part_shapes(description).items()
    }
    _check_all_used(description, parts, tensors)
    return description, parts, notes


def _has_own_head(config: ModelConfig, names: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor]) -> bool:
    """True where the head is no copy of the embedding: transformers then believes the weights, not the config."""
    head, embedding = (tensors.get(names[role][0]) for role in ("head", "embedding"))
    if not head or not embedding or not head.shape == embedding.shape == (config.vocab_size, config.hidden_size):
        return False
    rows = range(0, config.vocab_size, max(config.vocab_size // COMPARED_ROWS, 1))
    return any(not np.array_equal(head.read(row, row + 1), embedding.read(row, row + 1)) for row in rows)


def _parts_of(
    config: ModelConfig,
    role: str,
    shape: tuple[int, ...],
    names: Mapping[str, tuple[str, ...]],
    tensors: Mapping[str, Tensor],
) -> tuple[Tensor, ...]:
    match = _LAYER.fullmatch(role)
    index, role_name = (match[1], match[2]) if match else ("", role)
    wanted = [name.format(index) for name in names[role_name]]
    rows = (shape[0],) if len(wanted) == 1 else _rows_of_each(config, role_name)
    return tuple(_checked(name, (count, *shape[1:]), tensors) for name, count in zip(wanted, rows, strict=True))


def _rows_of_each(config: ModelConfig, role: str) -> tuple[int, ...]:
    attention = config.attention
    if role.startswith("qkv"):
        queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        return queries, keys, keys
    return config.intermediate_size, config.intermediate_size


def _checked(name: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    hint = "config.json and the weights are from different models, or the download is incomplete"
    tensor = tensors.get(name)
    if tensor is None:
        raise SourceError(f"tensor {name} is missing; the config asks for {list(shape)}", hint=hint)
    if tensor.shape != shape:
        raise SourceError(f"tensor {name} is {list(tensor.shape)}, the config asks for {list(shape)}", hint=hint)
    return tensor


def _check_all_used(
    config: ModelConfig, parts: Mapping[str, tuple[Tensor, ...]], tensors: Mapping[str, Tensor]
) -> None:
    used = {id(tensor) for tensors_of_role in parts.values() for tensor in tensors_of_role}
    # A copy of the embedding that the config says to ignore.
    ignored = {"lm_head.weight", "output.weight"} if config.tied_embeddings else set()
    unknown = sorted(
        tensor.name
        for name, tensor in tensors.items()
        if id(tensor) not in used and name not in ignored and not _UNUSED.search(name)
    )
    if unknown:
        raise UnsupportedError(
            f"tensor {unknown[0]} has no place in a {config.model_type} decoder ({len(unknown)} such tensors)",
            hint="the model has parts that are not handled, such as a vision tower, adapters or other biases",
        )


def _check_types(parts: Mapping[str, tuple[Tensor, ...]]) -> None:
    unread = [tensor for tensors in parts.values() for tensor in tensors if tensor.dtype not in _SAFETENSORS_TYPES]
    if unread:
        raise UnsupportedError(
            f"tensor {unread[0].name} is stored as {unread[0].dtype}, which is not read yet ({len(unread)} such tensors)",
            hint="use a checkpoint in BF16, F16 or F32",
        )


def _check_tokenizer(config: ModelConfig, tokenizer: TokenizerFiles) -> None:
    beyond = [token for token in tokenizer.eos_token_ids if not 0 <= token < config.vocab_size]
    if beyond:
        raise SourceError(
            f"end token {beyond[0]} is outside the vocabulary of {config.vocab_size}",
            hint="the tokenizer and the weights are from different models",
        )
