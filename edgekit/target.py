"""Target: a device profile, read from targets/*.toml or from a user's own file."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import edgekit.targets
from edgekit.errors import TargetError

__all__ = ["Target", "list_targets", "load_target"]

_DIRECTORY = Path(edgekit.targets.__file__).parent


@dataclass(frozen=True, slots=True)
class Target:
    """A device. Sizes are in bytes, rates per second.

    Attributes:
        id: Kebab-case, equal to the file's name.
        memory_bytes: Installed memory.
        app_memory_bytes: What one app may use of it.
        bandwidth_bytes_per_s: Memory read bandwidth that the processor cores reach.
        threads: Cores worth using for generation.
        int8_ops_per_s: Of those cores together, with integer dot products; for the prefill estimate.
        formats: In order of preference; EdgeKit takes the first one it can convert to.
        int8_activations: True where the runtime should multiply in int8 (`accuracy_level` 4 of MatMulNBits).
        sources: Where each figure comes from, and its date.
    """

    id: str
    name: str
    memory_bytes: int
    app_memory_bytes: int
    bandwidth_bytes_per_s: int
    threads: int
    int8_ops_per_s: int
    formats: tuple[str, ...]
    int8_activations: bool
    sources: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """For `edgekit targets --json`."""
        return asdict(self) | {"formats": list(self.formats)}


def list_targets() -> tuple[Target, ...]:
    """All built-in profiles, by id."""
    return tuple(load_target(path.stem) for path in sorted(_DIRECTORY.glob("*.toml")))


def load_target(name: str | Path) -> Target:
    """A built-in profile by id, or a user's own file.

    Raises:
        TargetError: No such profile, an unknown or missing key, or a value of the wrong kind.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = _DIRECTORY / f"{name}.toml"
        if not path.is_file() or path.parent != _DIRECTORY:
            known = [file.stem for file in sorted(_DIRECTORY.glob("*.toml"))]
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise TargetError(f"target {str(name)!r} is not known", hint=f"{hint}known: {', '.join(known)}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise TargetError(f"{path} is not valid TOML: {error}") from error
    return _checked(values | {"id": path.stem}, path)


def _checked(values: dict[str, Any], path: Path) -> Target:
    kinds: dict[str, tuple[type, str]] = {
        "id": (str, "a text"),
        "name": (str, "a text"),
        "formats": (list, "a list of format names"),
        "int8_activations": (bool, "true or false"),
        "sources": (dict, "a table of texts"),
    }
    names = [field.name for field in fields(Target)]
    for key in values:
        if key not in names:
            raise TargetError(f"{path.name}: the key {key!r} is not known", hint=f"known: {', '.join(names)}")
    for name in names:
        if name not in values:
            raise TargetError(f"{path.name} has no {name}", hint="see targets/README.md")
        kind, expected = kinds.get(name, (int, "a whole number over zero"))
        value = values[name]
        if type(value) is not kind or (type(value) is int and value <= 0):
            raise TargetError(f"{path.name}: {name} is {value!r}, expected {expected}")
    if not values["formats"] or not all(isinstance(item, str) for item in values["formats"]):
        raise TargetError(f"{path.name}: formats is {values['formats']!r}, expected a list of format names")
    if not all(isinstance(item, str) for item in values["sources"].values()):
        raise TargetError(f"{path.name}: sources is not {kinds['sources'][1]}")
    if values["app_memory_bytes"] > values["memory_bytes"]:
        raise TargetError(f"{path.name}: an app may use more memory than the device has")
    return Target(**(values | {"formats": tuple(values["formats"])}))
