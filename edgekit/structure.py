"""What a reply must be an instance of, enforced token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Choice", "JsonSchema", "Lark", "Regex", "Structure"]


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A JSON document that a schema admits; the empty schema admits any."""

    schema: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Regex:
    """A text that the whole pattern matches (Rust's regex syntax, without look-around)."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Lark:
    """A text that a grammar in Lark's notation derives, from its rule `start`."""

    grammar: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these texts."""

    options: tuple[str, ...]


Structure: TypeAlias = JsonSchema | Regex | Lark | Choice
