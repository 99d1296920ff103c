"""Checked reading of a Hugging Face config: a wrong or missing value is an error that names its key."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from edgekit.errors import SourceError

__all__ = ["ConfigFields"]

DAMAGED = "the file is damaged or not a model config"
LARGEST_SIZE = 1 << 31  # no real model has a dimension or context that needs more than 31 bits
# Numbers become float32 and are multiplied and divided; real ones lie between 1e-12 and 1e10.
SMALLEST_NUMBER, LARGEST_NUMBER = 1e-15, 1e15


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """A config mapping and the file it came from. A key that holds null counts as absent."""

    values: Mapping[str, object]
    origin: str

    def with_defaults(self, defaults: Mapping[str, object]) -> ConfigFields:
        """Values for keys that are absent; one that is there and null stays null, as in transformers."""
        return ConfigFields({**defaults, **self.values}, self.origin)

    def has(self, key: str) -> bool:
        """True where the key is there and not null."""
        return self.values.get(key) is not None

    def size(self, key: str, default: int | None = None, *, most: int = LARGEST_SIZE) -> int:
        """A whole number over zero."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.wrong(key, value, "a whole number over zero")
        if value > most:
            raise self.wrong(key, value, f"at most {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number that float32 can compute with."""
        value = self._get(key, default)
        if not _is_number(value):
            raise self.wrong(key, value, "a number of usual size")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number over zero."""
        value = self.number(key, default)
        if value <= 0:
            raise self.wrong(key, value, "a number over zero")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a text")
        return value

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` numbers over zero."""
        value = self._get(key, None)
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != length:
            raise self.wrong(key, value, f"a list of {length} numbers")
        if not all(_is_number(item) and item > 0 for item in value):
            raise self.wrong(key, value, "numbers over zero")
        return tuple(float(item) for item in value)

    def items(self, key: str, length: int) -> tuple[object, ...]:
        """A list of at least `length` items, cut to that length."""
        value = self._get(key, None)
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) < length:
            raise self.wrong(key, value, f"a list of {length} items")
        return tuple(value[:length])

    def nested(self, key: str) -> ConfigFields:
        """The mapping under a key; empty where it is absent."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.wrong(key, value, "an object")
        return ConfigFields(value, f"{self.origin}: {key}")

    def _get(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise SourceError(f"{self.origin} has no {key!r}", hint="the file is incomplete; download it again")
        return default

    def wrong(self, key: str, value: object, expected: str) -> SourceError:
        """The error for a value that is not what it should be."""
        shown = reprlib.repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return SourceError(f"{self.origin}: {key} is {shown}, expected {expected}", hint=DAMAGED)


def _is_number(value: object) -> TypeGuard[int | float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == 0 or SMALLEST_NUMBER <= abs(value) <= LARGEST_NUMBER
