"""Checked access to a manifest's JSON, which is untrusted: what is not of the right kind is an error that says where."""

from __future__ import annotations

import sys
from typing import TypeVar

from edgekit.errors import BundleError

__all__ = ["DAMAGED", "Fields"]

DAMAGED = "the bundle was changed or its copy is incomplete; convert the model again"
_T = TypeVar("_T")


class Fields:
    """A JSON object at a path, for messages."""

    def __init__(self, values: object, path: str) -> None:
        if not isinstance(values, dict):
            raise BundleError(f"{path} is not an object", hint=DAMAGED)
        self.values, self.path = values, path

    def get(self, key: str, kind: type[_T]) -> _T:
        """The value of a key.

        Raises:
            BundleError: It is missing or of another kind; so with all that follow.
        """
        value = self.values.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.wrong(key, kind.__name__)
        return value

    def optional(self, key: str, kind: type[_T]) -> _T | None:
        """The value of a key that may be missing or null."""
        return None if self.values.get(key) is None else self.get(key, kind)

    def size(self, key: str) -> int:
        """An integer of at least 0."""
        value = self.get(key, int)
        if value < 0:
            raise self.wrong(key, "a size")
        return value

    def quantity(self, key: str) -> float:
        """A finite number of at least 0."""
        value = self.values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
            raise self.wrong(key, "a number")
        return float(value)

    def nested(self, key: str) -> Fields:
        """An object."""
        return Fields(self.values.get(key), f"{self.path}: {key}")

    def objects(self, key: str) -> list[Fields]:
        """A list of objects."""
        return [Fields(item, f"{self.path}: {key}[{index}]") for index, item in enumerate(self.get(key, list))]

    def texts(self, key: str) -> dict[str, str]:
        """An object of texts."""
        values = self.get(key, dict)
        if not all(isinstance(name, str) and isinstance(value, str) for name, value in values.items()):
            raise self.wrong(key, "an object of texts")
        return values

    def counts(self, key: str) -> dict[str, int]:
        """An object of sizes."""
        values = self.nested(key)
        return {name: values.size(name) for name in values.values}

    def tables(self) -> dict[str, dict[str, int]]:
        """Every key's value as an object of sizes."""
        return {name: self.counts(name) for name in self.values}

    def listed(self, key: str, kind: type[_T]) -> tuple[_T, ...]:
        """A list of values of one kind."""
        values = self.get(key, list)
        if not all(isinstance(item, kind) and not isinstance(item, bool) for item in values):
            raise self.wrong(key, f"a list of {kind.__name__}")
        return tuple(values)

    def wrong(self, key: str, expected: str) -> BundleError:
        """The error that names the key and what was expected."""
        return BundleError(f"{self.path}: {key} is not {expected}", hint=DAMAGED)
