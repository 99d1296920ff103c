"""Tables of TOML and JSON bound to frozen dataclasses: every key known, every value of its kind and within its bounds.

A field's annotation says what is taken: int, float, str, bool, a Literal, another dataclass (or None), `tuple[kind, ...]` for
an array and `Mapping[str, kind]` for a table with free keys. A field without a default is required. `within` gives a number
bounds.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from edgekit.errors import EdgeKitError, first_line

__all__ = ["Binder", "read_toml", "within"]

T = TypeVar("T")
_DEEPEST = 16
_LONGEST_MESSAGE = 300
_LARGEST = 2**1023  # whole numbers up to here are floats
_BARE_KEY = re.compile("[A-Za-z0-9_-]+")
# Ends of names that are units, and what people write by mistake: below a thousand, and from there on.
_SCALES = {
    "_bytes_per_s": (("GB/s", 10**9), ("MB/s", 10**6)),
    "_ops_per_s": (("TOPS", 10**12), ("GOPS", 10**9)),
    "_bytes": (("GB", 10**9), ("MB", 10**6)),
    "_hz": (("GHz", 10**9), ("MHz", 10**6)),
}


def within(least: int, most: int, *, default: int | None = None) -> Any:
    """A dataclass field for a whole number from `least` to `most`; a default may lie outside of them, as 0 for unknown."""
    metadata = {"least": least, "most": most}
    return field(metadata=metadata) if default is None else field(default=default, metadata=metadata)


def read_toml(path: Path, error: type[EdgeKitError]) -> dict[str, Any]:
    """The tables of a file.

    Raises:
        EdgeKitError: Of the given kind: it can't be read, or is not valid TOML.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}") from reason
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} is not valid TOML: {first_line(reason)}") from reason
    if _depth(values) > _DEEPEST:
        raise error(f"{path} is not valid here: its tables are nested more than {_DEEPEST} deep")
    return values


class Binder:
    """Binds the tables of one file. Mistakes are raised as `error`, with the file and the dotted key.

    Args:
        file: Its name, for messages.
        error: What to raise.
        help: A hint where nothing better is known.
    """

    def __init__(self, file: str, error: type[EdgeKitError], *, help: str) -> None:  # noqa: A002 - for one line
        self._file, self._error, self._help = file, error, help

    def wrong(self, message: str, hint: str | None = None) -> EdgeKitError:
        """The error to raise for a mistake in this file: one line, whatever the file's keys and values hold."""
        line = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in message[:_LONGEST_MESSAGE])
        return self._error(f"{self._file}: {line}", hint=hint or self._help)

    def bind(self, kind: type[T], values: Mapping[str, Any], at: str = "") -> T:
        """Make a `kind` of a table; `at` is its dotted key."""
        hints = _hints(typing.cast(Any, kind))
        self.check_keys(kind, values, at)
        bound = {}
        for item in fields(kind):  # type: ignore[arg-type]  # a dataclass, which its type does not say
            where = _join(at, item.name)
            if item.name not in values:
                if item.default is MISSING and item.default_factory is MISSING:
                    raise self.wrong(f"{where} is missing")
                continue
            bound[item.name] = self._value(hints[item.name], values[item.name], where)
            if "least" in item.metadata and bound[item.name] != item.default:
                self._check_bounds(bound[item.name], where, item.metadata["least"], item.metadata["most"])
        return kind(**bound)

    def check_keys(self, kind: Any, values: Mapping[str, Any], at: str = "", *, without: tuple[str, ...] = ()) -> None:
        """Refuse keys that a `kind` does not have, or that it has `without` a file saying so; values are not looked at."""
        hints = _hints(kind)
        for key, value in values.items():
            if key not in hints or key in without:
                raise self._unknown(key, at, [name for name in hints if name not in without])
            if isinstance(value, dict):
                self._check_inner_keys(hints[key], value, _join(at, key))

    def _check_inner_keys(self, kind: Any, table: Mapping[str, Any], at: str) -> None:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is types.UnionType:
            self._check_inner_keys(next(item for item in arguments if item is not types.NoneType), table, at)
        elif is_dataclass(kind):
            self.check_keys(kind, table, at)
        elif origin is Mapping:
            for key, value in table.items():
                if isinstance(value, dict):
                    self._check_inner_keys(arguments[1], value, _join(at, key))

    def _value(self, kind: Any, value: Any, at: str) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is types.UnionType:  # a value or None, which JSON has and TOML has not
            if value is None:
                return None
            return self._value(next(item for item in arguments if item is not types.NoneType), value, at)
        if origin is Literal:
            return self._choice(arguments, value, at)
        if origin is tuple:
            self._require(isinstance(value, list), value, at, "a list")
            return tuple(self._value(arguments[0], item, f"{at}[{index}]") for index, item in enumerate(value))
        if is_dataclass(kind) or origin is Mapping:
            self._require(isinstance(value, dict), value, at, "a table")
            if origin is not Mapping:
                return self.bind(typing.cast(type[Any], kind), value, at)
            return {
                self._value(arguments[0], key, at): self._value(arguments[1], value[key], _join(at, key))
                for key in value
            }
        if kind is float:
            self._require(_is_finite(value), value, at, "a number")
            return float(value)
        named = {int: "a whole number", str: "a printable text", bool: "true or false"}[kind]
        self._require(type(value) is kind and (kind is not str or value.isprintable()), value, at, named)
        return value

    def _choice(self, known: tuple[str, ...], value: Any, at: str) -> Any:
        if value not in known:
            near = difflib.get_close_matches(str(value), known, n=1)
            raise self.wrong(f"{at} is {_short(value)}", f"{_did_you_mean(near)}known: {', '.join(map(repr, known))}")
        return value

    def _require(self, right: bool, value: Any, at: str, expected: str) -> None:
        if not right:
            raise self.wrong(f"{at} is {_short(value)}, expected {expected}")

    def _check_bounds(self, value: int, at: str, least: int, most: int) -> None:
        if least <= value <= most:
            return
        hint, scales = None, next((scales for end, scales in _SCALES.items() if at.endswith(end)), None)
        if scales and 0 < value < least:
            unit, scale = scales[value >= 1000]
            hint = f"were {value:,} {unit} meant? Write {value * scale:_}" if value * scale <= most else None
        raise self.wrong(f"{at} is {f'{value:_}'[:60]}, possible are {least:_} to {most:_}", hint)

    def _unknown(self, key: str, at: str, known: list[str]) -> EdgeKitError:
        for name in known:
            unit = next((end for end in _SCALES if name.endswith(end)), None)
            if unit and (key == name.removesuffix(unit) or key.startswith(f"{name.removesuffix(unit)}_")):
                in_words = unit.strip("_").replace("_per_s", " per second")
                return self.wrong(f"the key {_join(at, key)!r} is not known", f"write {_join(at, name)}, in {in_words}")
        near = difflib.get_close_matches(key, known, n=1)
        return self.wrong(f"the key {_join(at, key)!r} is not known", f"{_did_you_mean(near)}known: {', '.join(known)}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _is_finite(value: Any) -> bool:
    if type(value) is int:
        return -_LARGEST <= value <= _LARGEST
    return type(value) is float and math.isfinite(value)


def _depth(values: Any) -> int:
    """Levels of tables and lists, counted no further than matters; what recurses later would fail on thousands."""
    depth, level = 0, [values]
    while level and depth <= _DEEPEST:
        depth += 1
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _join(at: str, key: str) -> str:
    plain = key if _BARE_KEY.fullmatch(key) else repr(key)
    return f"{at}.{plain}" if at else plain


def _did_you_mean(near: list[str]) -> str:
    return f"did you mean {near[0]}? " if near else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
