"""Reading a GGUF file: metadata, tokenizer and quantized tensors.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file is untrusted: every count, length and
offset is checked before it is used. Block formats are dequantized by the `gguf` package; those of `gguf_blocks` can also be
carried over as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
from numpy.typing import NDArray

from edgekit.errors import SourceError, UnsupportedError
from edgekit.quant import WeightFormat
from edgekit.source import Provenance, Source, StoredBlocks, Tensor, TokenizerFiles

from .assemble import assemble_source
from .gguf_blocks import BLOCK_TYPES
from .gguf_config import hugging_face_config, hugging_face_names, permuted_heads
from .gguf_header import GgufHeader, TensorEntry, read_gguf_header
from .gguf_tokenizer import tokenizer_json
from .gguf_vocabulary import CONTROL, USER_DEFINED
from .positional_file import PositionalFile

__all__ = ["GgufTensor", "config_and_tensors", "open_gguf", "stored_tensors"]

_DAMAGED = "the file is damaged or the download incomplete; fetch it again"
_MOST_ROPE_FACTORS = 4096  # one for each pair of a head
# Where llama.cpp and transformers differ on what an absent key means: null is llama.cpp's reading.
_ABSENT = dict.fromkeys(
    (
        *("head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads"),
        *("num_hidden_layers", "num_key_value_heads", "original_max_position_embeddings"),
    )
)
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Files name one end token of several; llama.cpp knows the others by their text, whatever the metadata say.
_END_TEXTS = {
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    *("<|im_end|>", "<|endoftext|>", "<|end|>", "<end_of_turn>"),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file, under its Hugging Face name and in its row order.

    `head_dim` is not 0 where the file interleaves the rows of each head (query and key of llama, for ggml's rotation).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    file: PositionalFile
    offset: int
    head_dim: int = 0

    @property
    def exact_format(self) -> WeightFormat | None:
        """See `BLOCK_TYPES`."""
        kind = BLOCK_TYPES.get(self.dtype) if len(self.shape) == 2 else None
        return kind.format if kind else None

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) dequantized."""
        rows = self.shape[0]
        stop = rows if stop is None else stop
        raw = self._raw_rows(start, stop)
        with np.errstate(all="ignore"):  # values that are not finite are refused by the writer
            values: NDArray[np.float32] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[self.dtype])
        return values.astype(np.float32, copy=False).reshape(stop - start, *self.shape[1:])

    def read_blocks(self, start: int, stop: int) -> StoredBlocks:
        """Rows [start, stop) of a tensor that has an `exact_format`."""
        block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.dtype]][1]
        raw = self._raw_rows(start, stop)
        return BLOCK_TYPES[self.dtype].read(raw.reshape(stop - start, -1, block_bytes))

    def _raw_rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        row_bytes = self.size_bytes // self.shape[0]
        if not self.head_dim:
            return self.file.read(self.offset + start * row_bytes, (stop - start) * row_bytes).reshape(-1, row_bytes)
        low = start // self.head_dim * self.head_dim
        high = -(-stop // self.head_dim) * self.head_dim
        stored = self.file.read(self.offset + low * row_bytes, (high - low) * row_bytes)
        # Stored as pairs (i, i + head_dim / 2), wanted as halves.
        halves = stored.reshape(-1, self.head_dim // 2, 2, row_bytes).swapaxes(1, 2).reshape(-1, row_bytes)
        return halves[start - low : stop - low]


def open_gguf(path: str | Path) -> Source:
    """Open a GGUF file.

    Raises:
        SourceError, UnsupportedError: See `edgekit.source.open_source`.
    """
    path = Path(path)
    header = read_gguf_header(PositionalFile(path))
    config, tensors = config_and_tensors(path, header)
    provenance = Provenance("gguf", path.name, None, _text(header.metadata.get("general.license")))
    tokenizer = _tokenizer(header.metadata)
    return assemble_source(config, path.name, tensors, tokenizer, provenance=provenance, weight_files=(path,))


def stored_tensors(path: Path, header: GgufHeader) -> dict[str, GgufTensor]:
    """Every tensor of a file by its own name, each checked against the file.

    Raises:
        SourceError, UnsupportedError: See `edgekit.source.open_source`.
    """
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedError(f"{path.name} is one part of a split GGUF", hint="merge the parts: gguf-split --merge")
    file = PositionalFile(path)
    opened = {entry.name: _tensor(file, header, entry) for entry in header.tensors}
    _check_overlaps(path, opened)
    return opened


def config_and_tensors(path: Path, header: GgufHeader) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata as a Hugging Face config, and the tensors by their Hugging Face names.

    Raises:
        SourceError, UnsupportedError: See `edgekit.source.open_source`.
    """
    stored = {entry.name: entry for entry in header.tensors}
    opened = stored_tensors(path, header)
    config = hugging_face_config(header.metadata, stored, _rope_factors(path, opened))
    names = hugging_face_names(str(config["model_type"]), stored)
    heads = permuted_heads(header.metadata, config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in opened.items():
        wanted = names.get(name, name)
        if wanted in tensors:
            raise SourceError(f"{path.name}: tensor {wanted} stands twice, also as {name}", hint=_DAMAGED)
        head_dim = heads if ".q_proj." in wanted or ".k_proj." in wanted else 0
        tensors[wanted] = replace(tensor, name=wanted, head_dim=head_dim)
    return _ABSENT | config, tensors


def _check_overlaps(path: Path, tensors: Mapping[str, GgufTensor]) -> None:
    for one, other in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.offset)):
        if other.offset < one.offset + one.size_bytes:
            raise SourceError(f"{path.name}: tensors {one.name} and {other.name} overlap", hint=_DAMAGED)


def _rope_factors(path: Path, tensors: Mapping[str, GgufTensor]) -> dict[str, NDArray[np.float32]]:
    """The rotary divisors, the only tensors that are read on opening: they belong to the config."""
    factors = {}
    for name, tensor in tensors.items():
        if name.startswith(("rope_freqs.", "rope_factors_")):
            if math.prod(tensor.shape) > _MOST_ROPE_FACTORS:
                raise SourceError(f"{path.name}: tensor {name} has the impossible shape {list(tensor.shape)}")
            factors[name] = tensor.read().ravel()
    return factors


def _tensor(file: PositionalFile, header: GgufHeader, entry: TensorEntry) -> GgufTensor:
    name = f"{file.path.name}: tensor {entry.name[:80]!r}"
    if not _can_dequantize(entry.dtype):
        raise UnsupportedError(f"{name} is of type {entry.dtype}, which is not read", hint="use a type such as Q8_0")
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[entry.dtype]]
    if entry.shape[-1] % block:
        raise SourceError(f"{name} has rows of {entry.shape[-1]} elements, not a multiple of {block}", hint=_DAMAGED)
    if block > 1 and len(entry.shape) == 1:
        raise UnsupportedError(f"{name} is a vector stored in blocks ({entry.dtype}), which is not read")
    size_bytes = math.prod(entry.shape) // block * block_bytes
    offset = header.data_start + entry.offset
    if offset + size_bytes > file.size_bytes:
        raise SourceError(
            f"{name} ends at byte {offset + size_bytes:,}, the file has {file.size_bytes:,}", hint=_DAMAGED
        )
    return GgufTensor(entry.name, entry.shape, entry.dtype, size_bytes, file, offset)


@cache
def _can_dequantize(dtype: str) -> bool:
    kind = gguf.GGMLQuantizationType[dtype]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _tokenizer(metadata: Mapping[str, Any]) -> TokenizerFiles:
    document = tokenizer_json(metadata)  # refuses what is malformed
    tokens = metadata["tokenizer.ggml.tokens"]

    def token_id(key: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{key}")
        return value if isinstance(value, int) and 0 <= value < len(tokens) else None

    named = [token for key in _END_KEYS if (token := token_id(key)) is not None]
    kinds = metadata.get("tokenizer.ggml.token_type") or ()
    known = [
        index
        for index, (text, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (CONTROL, USER_DEFINED) and text in _END_TEXTS
    ]
    special = {
        name: str(tokens[token])
        for name, key in (
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        )
        if (token := token_id(key)) is not None
    }
    return TokenizerFiles(
        tokenizer_json=document,
        chat_template=_text(metadata.get("tokenizer.chat_template")),
        eos_token_ids=tuple(dict.fromkeys((*named, *known))),
        bos_token_id=token_id("bos_token_id"),
        special_tokens=special,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
