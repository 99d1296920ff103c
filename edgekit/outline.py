"""Outline: what a plan needs to know of a model. It is made of a config or of headers alone, without weights or tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.anatomy import Anatomy, anatomy_of
from edgekit.registry import OUTLINE_READERS, load_attribute
from edgekit.source import Source, Tensor, locate_source

if TYPE_CHECKING:
    from edgekit.config import ModelConfig

__all__ = ["Outline", "UnknownModel", "open_outline", "outline_of"]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)  # compared by identity
class Outline:
    """A model by its sizes.

    Attributes:
        config: Its description; None where EdgeKit does not convert the architecture.
        parts: As in `Source`, where the tensors' headers were read; else empty.
        quantized: The checkpoint holds quantized blocks.
        notes: What is left out or read otherwise than the checkpoint says.
        obstacle: Why EdgeKit does not convert it; empty where it does.
    """

    name: str
    anatomy: Anatomy
    config: ModelConfig | None
    parts: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    quantized: bool = False
    notes: tuple[str, ...] = ()
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class UnknownModel:
    """A model whose config is not understood: nothing is said of it but why."""

    name: str
    reason: str


def outline_of(source: Source) -> Outline:
    """The outline of an open checkpoint."""
    name, config = source.provenance.name, source.config
    return Outline(name, anatomy_of(config), config, source.parts, source.quantized, notes=source.notes)


def open_outline(source: str | Path) -> Outline | UnknownModel:
    """Read the config of a directory or of a hub id (its weights are not needed), or the header of a .gguf file.

    Raises:
        SourceError: It is missing or broken.
        MissingExtraError: The conversion extra is not installed.
    """
    kind, location = locate_source(source)
    outline: Outline | UnknownModel = load_attribute(OUTLINE_READERS[kind])(location)
    return outline
