"""A SentencePiece `tokenizer.model` as a Hugging Face tokenizer, for directories that have no tokenizer.json.

The file is a protocol buffer (sentencepiece_model.proto); the few fields that matter are read here, so that no package that
compiles code is needed. The rest is what a GGUF of the same model says, and goes the same way.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekit.errors import SourceError, UnsupportedError

from .gguf_tokenizer import SPACE, tokenizer_json

__all__ = ["sentencepiece_tokenizer"]

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_BPE = 2
_NORMAL = 1
_DAMAGED = "the file is damaged; download it again"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def sentencepiece_tokenizer(path: Path, settings: Mapping[str, object], model_type: str = "") -> str:
    """The text of a tokenizer.json.

    Args:
        path: The `tokenizer.model`.
        settings: tokenizer_config.json; `add_bos_token`, `add_eos_token` and `legacy` count.
        model_type: Of the config; Gemma and Phi-3 have ways of their own.

    Raises:
        SourceError: The file is malformed.
        UnsupportedError: It is a unigram model, or normalizes text in a way that is not handled.
    """
    tokens, scores, kinds = list[str](), list[float](), list[int]()
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(path.read_bytes(), path):
        if number == _PIECES:
            piece = dict(_fields(_bytes(value, path), path))
            tokens.append(_text(piece.get(1, b""), path))
            scores.append(struct.unpack("<f", piece[2])[0] if isinstance(piece.get(2), bytes) else 0.0)
            kinds.append(piece.get(3, _NORMAL))
        elif number == _TRAINER:
            trainer = dict(_fields(_bytes(value, path), path))
        elif number == _NORMALIZER:
            normalizer = dict(_fields(_bytes(value, path), path))
    if trainer.get(3, 1) != _BPE:
        raise UnsupportedError(f"{path.name} is a SentencePiece unigram model", hint="only BPE models are handled")
    if normalizer.get(2):
        raise UnsupportedError(
            f"{path.name} normalizes text by a table", hint="save a tokenizer.json with transformers"
        )
    prefix = bool(normalizer.get(3, 1))
    text = tokenizer_json(
        {
            "general.architecture": model_type,
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.unknown_token_id": trainer.get(40, 0),
            "tokenizer.ggml.bos_token_id": trainer.get(41, 1),
            "tokenizer.ggml.eos_token_id": trainer.get(42, 2),
            "tokenizer.ggml.add_bos_token": settings.get("add_bos_token", True),
            "tokenizer.ggml.add_eos_token": settings.get("add_eos_token", False),
            "tokenizer.ggml.add_space_prefix": prefix,
        }
    )
    return _with_one_space(text) if prefix and settings.get("legacy") is False else text


def _with_one_space(text: str) -> str:
    """Put a space before the first word only, not after each special token too: what `legacy: false` asks for."""
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    document = json.loads(text) | {"normalizer": None, "pre_tokenizer": metaspace}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def _fields(data: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of one message: integers, or bytes for all else."""
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        if position + count > len(data):
            raise SourceError(f"{path.name} ends in the middle of a field", hint=_DAMAGED)
        position += count
        return data[position - count : position]

    def varint() -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise SourceError(f"{path.name} holds an overlong number", hint=_DAMAGED)

    while position < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            yield number, varint()
        elif kind in {_FIXED64, _FIXED32}:
            yield number, take(8 if kind == _FIXED64 else 4)
        elif kind == _BYTES:
            yield number, take(varint())
        else:
            raise SourceError(f"{path.name} is not a SentencePiece model", hint=_DAMAGED)


def _bytes(value: object, path: Path) -> bytes:
    if not isinstance(value, bytes):
        raise SourceError(f"{path.name} is not a SentencePiece model", hint=_DAMAGED)
    return value


def _text(value: object, path: Path) -> str:
    try:
        return _bytes(value, path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path.name} holds a piece that is no UTF-8", hint=_DAMAGED) from error
