"""Outlines: what a plan needs, read from a config or a header alone. No weight and no tokenizer is read or fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekit.anatomy import anatomy_of
from edgekit.errors import UnsupportedError
from edgekit.outline import Outline, UnknownModel
from edgekit.registry import ARCHITECTURES, MULTIMODAL, load_attribute

from .anatomies.families import DESCRIBED, MULTIMODAL_TEXT, describe
from .anatomies.gguf import GGUF_ARCHITECTURES, describe_gguf
from .architectures.fields import ConfigFields
from .assemble import described_parts
from .from_gguf import config_and_tensors, stored_tensors
from .from_hub import fetch
from .gguf_config import is_described
from .gguf_header import read_gguf_header
from .json_files import optional_json, read_json
from .positional_file import PositionalFile
from .prequantized import unread_method
from .text_part import text_part

__all__ = ["outline_of_directory", "outline_of_gguf", "outline_of_hub"]

_PACKED = "the checkpoint is quantized: a conversion carries its groups over, this plan counts its weights as floats"
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"


def outline_of_directory(directory: str | Path, *, name: str | None = None) -> Outline | UnknownModel:
    """Of a directory with a config.json; weights may be there or not. `name`: of the model, by default the directory's.

    Raises:
        SourceError: The config is missing or broken.
    """
    directory = Path(directory)
    named = name or directory.resolve().name
    config: Mapping[str, Any] = read_json(directory / _CONFIG)
    weight_map = optional_json(directory / _INDEX).get("weight_map")
    names = dict.fromkeys(weight_map) if isinstance(weight_map, dict) else {}
    try:
        return _from_config(named, config, str(directory / _CONFIG), names)
    except UnsupportedError as error:
        return UnknownModel(named, error.message)


def outline_of_hub(location: str) -> Outline | UnknownModel:
    """Of a hub id `org/name[@revision]`: its config is downloaded, and its list of tensors where there is one.

    Raises:
        SourceError: The repository is missing, gated, or can't be reached, or has no config.
    """
    repository = location.partition("@")[0]
    return outline_of_directory(fetch(location, [_CONFIG, _INDEX], []), name=repository)


def outline_of_gguf(path: str | Path) -> Outline | UnknownModel:
    """Of a GGUF file's header.

    Raises:
        SourceError: It is damaged.
    """
    path = Path(path)
    header = read_gguf_header(PositionalFile(path))
    architecture = str(header.metadata.get("general.architecture"))
    try:
        if is_described(header.metadata):
            config, tensors = config_and_tensors(path, header)
            described, parts, notes = described_parts(config, path.name, tensors)
            return Outline(path.name, anatomy_of(described), described, parts, _quantized(tensors), notes=notes)
        if architecture not in GGUF_ARCHITECTURES:
            raise UnsupportedError(f"the GGUF architecture {architecture[:40]!r} is not understood")
        stored = stored_tensors(path, header)
        anatomy, kept = describe_gguf(header.metadata, stored, path.name)
    except UnsupportedError as error:
        return UnknownModel(path.name, error.message)
    return Outline(path.name, anatomy, None, kept, _quantized(stored), obstacle=_not_converted(anatomy.model_type))


def _from_config(name: str, config: Mapping[str, Any], origin: str, names: Mapping[str, None]) -> Outline:
    obstacle = unread_method(config) or ""
    packed = bool(config.get("quantization_config")) and not obstacle
    kind = ConfigFields(config, origin).text("model_type")
    if kind in ARCHITECTURES or kind in MULTIMODAL:
        config, origin, names, notes = text_part(config, origin, names)
    elif kind in DESCRIBED:
        notes = ()
    else:
        config, origin, notes = _text_config(kind, config, origin)
        obstacle = _not_converted(kind)
    fields = ConfigFields(config, origin)
    model_type = fields.text("model_type")
    if model_type in ARCHITECTURES:
        described = load_attribute(ARCHITECTURES[model_type]).describe(fields)
        notes += (_PACKED,) if packed else ()
        return Outline(name, anatomy_of(described), described, notes=notes, obstacle=obstacle)
    return Outline(name, describe(fields), None, notes=notes, obstacle=_not_converted(kind))


def _text_config(kind: str, config: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """The text part of a multimodal model of any kind, where that part is understood."""
    inner = ConfigFields(config, origin).nested("text_config")
    model_type = inner.values.get("model_type", MULTIMODAL_TEXT.get(kind))
    if not isinstance(model_type, str) or (model_type not in ARCHITECTURES and model_type not in DESCRIBED):
        raise UnsupportedError(f"the architecture {kind[:40]!r} is not understood")
    values = {**inner.values, "model_type": model_type}
    if "tie_word_embeddings" in config and "tie_word_embeddings" not in values:
        values["tie_word_embeddings"] = config["tie_word_embeddings"]
    return values, inner.origin, (f"the text part of a {kind} checkpoint: images and sound are not counted",)


def _not_converted(model_type: str) -> str:
    return f"EdgeKit does not convert {model_type} yet"


def _quantized(tensors: Mapping[str, Any]) -> bool:
    return any(tensor.dtype not in {"F32", "F16", "BF16"} for tensor in tensors.values())
