"""Target: a device profile, read from targets/*.toml or from a user's own file. targets/README.md explains every key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import edgekit.targets
from edgekit.errors import TargetError
from edgekit.quant import RECIPES
from edgekit.runtime_options import RuntimeOptions
from edgekit.tables import Binder, read_toml, within

__all__ = [
    "CoreGroup",
    "Cpu",
    "Gpu",
    "Npu",
    "Packaging",
    "RuntimeOptions",
    "Target",
    "TargetMemory",
    "list_targets",
    "load_target",
]

Format: TypeAlias = Literal["onnx", "onnx-qdq", "executorch", "litert", "coreml", "coreai"]
InstructionSet: TypeAlias = Literal[
    "neon", "fp16", "dotprod", "i8mm", "bf16", "sve2", "sme", "sme2",
    "avx2", "avx-vnni", "avx512", "avx512-vnni", "amx-int8", "wasm-simd", "wasm-relaxed-simd", "rvv",
]  # fmt: skip
# Of these, one is enough for ONNX Runtime's MatMulNBits to multiply int4 and int8 weights with int8 activations at full speed.
_INT8_DOT_PRODUCTS = {"dotprod", "i8mm", "avx2", "avx-vnni", "avx512", "avx512-vnni"}
NpuKind: TypeAlias = Literal["hexagon", "neural-engine", "intel-npu", "xdna", "tensor", "apu"]
NpuType: TypeAlias = Literal["int4", "int8", "int16", "fp8", "fp16", "bf16"]
Provider: TypeAlias = Literal["", "qnn", "openvino"]

_DIRECTORY = Path(edgekit.targets.__file__).parent
_FAMILIES = _DIRECTORY / "families"
_HELP = "see targets/README.md"
_SOURCE = re.compile(
    r"(published|measured|modelled|estimate), 20[0-9]{2}(-(0[1-9]|1[0-2])(-(0[1-9]|[12][0-9]|3[01]))?)?: \S.*"
)
_SYSTEM = re.compile(r"[A-Za-z][A-Za-z ]* [0-9]{1,4}(\.[0-9]{1,4})*")
_SOURCED = ("memory", "cpu", "gpu", "npu", "packaging", "runtime")  # tables whose every value needs a source


@dataclass(frozen=True, slots=True)
class TargetMemory:
    """Memory: installed, what one app may use of it, and the read bandwidth that the CPU cores reach together."""

    installed_bytes: int = within(64_000_000, 10**13)
    app_bytes: int = within(16_000_000, 10**13)
    bandwidth_bytes_per_s: int = within(200_000_000, 10**13)


@dataclass(frozen=True, slots=True)
class CoreGroup:
    """Cores of one kind. `big`: worth using for generation; small ones slow a step down that waits for all of them."""

    name: str
    count: int = within(1, 1024)
    clock_hz: int = within(100_000_000, 10_000_000_000)
    big: bool = True


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor. `int8_ops_per_s`: multiplications and additions of int8 a second that the big cores reach together."""

    cores: tuple[CoreGroup, ...]
    instruction_sets: tuple[InstructionSet, ...]
    int8_ops_per_s: int = within(100_000_000, 10**17)

    @property
    def big_cores(self) -> int:
        """Cores worth using for generation."""
        return sum(group.count for group in self.cores if group.big)

    @property
    def int8_activations(self) -> bool:
        """True where the runtime should multiply in int8 (`accuracy_level` 4 of MatMulNBits)."""
        return not _INT8_DOT_PRODUCTS.isdisjoint(self.instruction_sets)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A graphics processor. Zeros: it shares the system's memory, and its bandwidth is that of the memory bus."""

    name: str
    apis: tuple[Literal["metal", "vulkan", "opencl", "cuda", "directx", "webgpu"], ...]
    memory_bytes: int = within(64_000_000, 10**13, default=0)
    bandwidth_bytes_per_s: int = within(200_000_000, 10**14, default=0)


@dataclass(frozen=True, slots=True)
class Npu:
    """A neural processor and its rules for a graph.

    Attributes:
        architecture: The vendor's version, such as v73 of Hexagon.
        soc_model: QNN's number of the chip, which a context binary is made for; 0 elsewhere.
        dtypes: What it computes in or takes as weights.
        int8_ops_per_s: As published; 0 unknown.
        max_context: Longest context that its tools take; 0 unknown.
        static_shapes: True where every dimension must be fixed.
        dimension_multiple: What sizes of state and hidden dimensions must be multiples of.
        provider: ONNX Runtime's execution provider for it, or "".
    """

    kind: NpuKind
    architecture: str
    dtypes: tuple[NpuType, ...]
    soc_model: int = within(1, 10_000, default=0)
    int8_ops_per_s: int = within(10**9, 10**16, default=0)
    max_context: int = within(128, 10**7, default=0)
    static_shapes: bool = True
    dimension_multiple: int = within(1, 1024, default=1)
    provider: Provider = ""


@dataclass(frozen=True, slots=True)
class Packaging:
    """What a bundle must keep to when it is shipped in an app; 0 and "" are no limit, or unknown.

    Attributes:
        minimum_os: The oldest system to run on, a name and a version: `iOS 18`.
        app_limit_bytes: Largest app with all that it brings.
        asset_limit_bytes: Largest single asset pack.
        storage_bytes: Of the smallest variant on sale.
    """

    minimum_os: str = ""
    app_limit_bytes: int = within(1_000_000, 10**13, default=0)
    asset_limit_bytes: int = within(1_000_000, 10**13, default=0)
    storage_bytes: int = within(1_000_000, 10**15, default=0)


@dataclass(frozen=True, slots=True)
class Target:
    """A device. Sizes are in bytes, rates per second.

    Attributes:
        id: Kebab-case, equal to the file's name.
        formats: In order of preference; EdgeKit takes the first one it can convert to.
        quant: The default recipe.
        runtime: Options by format.
        extends: The profile or family that it builds on, or "".
        sources: Dotted key of each figure to where it comes from and when.
    """

    id: str
    name: str
    memory: TargetMemory
    cpu: Cpu
    formats: tuple[Format, ...]
    sources: Mapping[str, str]
    gpu: Gpu | None = None
    npu: Npu | None = None
    packaging: Packaging = field(default_factory=Packaging)
    quant: str = "auto"
    runtime: Mapping[Format, RuntimeOptions] = field(default_factory=dict)
    extends: str = ""

    def options(self, format: str) -> RuntimeOptions:
        """Options of the runtime for a format, with the number of threads resolved."""
        options = self.runtime.get(cast(Format, format), RuntimeOptions())
        return replace(options, threads=options.threads or self.cpu.big_cores)

    def to_json(self) -> dict[str, Any]:
        """For `edgekit targets --json`."""
        return asdict(self)


def list_targets() -> tuple[Target, ...]:
    """All built-in profiles, by id."""
    return tuple(load_target(name) for name in _ids())


def load_target(name: str | Path) -> Target:
    """A built-in profile by id, or a user's own file (its name ends in .toml).

    Raises:
        TargetError: No such profile, an unknown or missing key, a value of the wrong kind or unit, a figure with no source.
    """
    path = Path(name) if Path(name).suffix.lower() == ".toml" else _built_in(str(name))
    binder = Binder(path.name, TargetError, help=_HELP)
    target = binder.bind(Target, _read(path, binder) | {"id": path.stem})
    _check(target, binder)
    return target


def _ids() -> list[str]:
    return sorted(path.stem for path in _DIRECTORY.glob("*.toml"))


def _built_in(name: str) -> Path:
    known = _ids()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise TargetError(f"target {name!r} is not known", hint=f"{hint}`edgekit targets` lists all")
    return _DIRECTORY / f"{name}.toml"


def _read(path: Path, binder: Binder) -> dict[str, Any]:
    """The values of a file over those of what it extends; `sources` by figure."""
    values = read_toml(path, TargetError)
    if "id" in values:
        raise binder.wrong("the key 'id' is not known", "a profile's id is its file's name")
    for table in ("sources", *_SOURCED):
        if not isinstance(values.get(table, {}), dict):
            raise binder.wrong(f"{table} is {values[table]!r}, expected a table")
    binder.check_keys(Target, values, without=("id",))  # a key that is not known needs no source
    values["sources"] = _sources(values, binder)
    if "extends" not in values:
        return values
    return _merged(_parent(values["extends"], binder), values)


def _parent(name: Any, binder: Binder) -> dict[str, Any]:
    families = {path.stem: path for path in _FAMILIES.glob("*.toml")}
    known = {profile: _DIRECTORY / f"{profile}.toml" for profile in _ids()} | families
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"families: {', '.join(sorted(families))}"
        raise binder.wrong(f"extends is {name!r}, which is no built-in profile or family", hint)
    return _read(known[name], Binder(known[name].name, TargetError, help=_HELP))


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are merged key by key, all else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both_tables else value
    return merged


def _leaves(table: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{at}{key}.")
        else:
            yield at + key, value


def _sources(values: Mapping[str, Any], binder: Binder) -> dict[str, str]:
    """The source of every figure that a file gives: its own entry in `sources`, or that of a table around it."""
    sources = dict(_leaves(values.get("sources", {})))
    for key, text in sources.items():
        if not isinstance(text, str) or not _SOURCE.fullmatch(text) or not text.isprintable():
            raise binder.wrong(
                f"the source of {key} is {str(text)[:60]!r}",
                'write "published, 2026-11: where", or measured, modelled or estimate instead of published',
            )
    found = {key: _around(key, sources) for key, _ in _leaves({table: values.get(table, {}) for table in _SOURCED})}
    for key, source in found.items():
        if not source:
            raise binder.wrong(f"{key} has no source", f'add {key} = "…" to [sources]: where it comes from, and when')
    unused = sources.keys() - found.values()
    if unused:
        raise binder.wrong(f"sources names {min(unused)!r}, which the file does not give")
    return {key: sources[source] for key, source in found.items()}


def _around(key: str, sources: Mapping[str, str]) -> str:
    """The key itself, or else the nearest table that holds it, if it is in `sources`."""
    while key and key not in sources:
        key = key.rpartition(".")[0]
    return key


def _check(target: Target, binder: Binder) -> None:
    """What no key shows by itself."""
    memory, system = target.memory, target.packaging.minimum_os
    if memory.app_bytes > memory.installed_bytes:
        raise binder.wrong(
            f"memory.app_bytes is {memory.app_bytes:_}: an app may use more memory than the device has "
            f"({memory.installed_bytes:_})"
        )
    if not target.cpu.big_cores:
        raise binder.wrong("cpu.cores has no big cores", "generation runs on them: set big = true for one group")
    if not target.formats or len(set(target.formats)) < len(target.formats):
        raise binder.wrong(f"formats is {list(target.formats)}, expected a list of different formats")
    if target.quant != "auto" and target.quant not in RECIPES:
        raise binder.wrong(f"quant is {target.quant!r}", f"known: auto, {', '.join(RECIPES)}")
    if system and not _SYSTEM.fullmatch(system):
        raise binder.wrong(f"packaging.minimum_os is {system!r}, expected a name and a version, such as iOS 18")
