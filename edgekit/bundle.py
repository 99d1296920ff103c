"""Bundle: a directory that holds a converted model, and its manifest `edgekit.json`, the contract with every runtime.

Manifests are untrusted: every field is checked, every file is checked against its size and SHA-256, no path leaves the bundle.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from edgekit.checked_fields import DAMAGED, Fields
from edgekit.errors import BundleError
from edgekit.graph import CACHE_ELEMENT_BYTES, CacheLayout, Graph, TensorReport
from edgekit.runtime_options import MOST_THREADS, RuntimeOptions

__all__ = ["MANIFEST", "SCHEMA_VERSION", "Bundle", "Manifest", "Program", "hash_file", "list_files", "open_bundle"]

MANIFEST, GOLDENS, TOKENIZER = "edgekit.json", "goldens.json", "tokenizer.json"
RECIPE = "recipe.toml"  # of a scheme that was searched for
SCHEMA_VERSION = 1
LARGEST_MANIFEST_BYTES = 64_000_000
HASHED_BYTES = 1 << 22
# What file managers and copies between systems leave in every folder that they see; nothing of it is read.
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}
_APPLE_DOUBLE = "._"
# All that a manifest may tell an NPU's tools: a vendor's other options name libraries to load and files to write.
_NPU_OPTIONS = {"htp_arch", "soc_model"}
# What programs must name besides their tokens and logits, where the runtime asks for more.
_INPUTS = {"onnx": {"length", "logits_start"}, "onnx-qdq": {"past_length", "logits_start"}}
_STATIC_GRAPHS = 4  # of onnx-qdq; see `Graph.chunk`


@dataclass(frozen=True, slots=True)
class Program:
    """One format's program and what is known of its quality.

    `quality` holds `status` (`ok`, `failed`, `not-executed`, `not-compared`), `executed` (what ran it, or null), and the
    figures: see `edgekit.verify`.
    """

    graph: Graph
    context: int
    quality: Mapping[str, Any]
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        return asdict(self.graph) | {
            "files": list(self.graph.files),
            "context": self.context,
            "quality": dict(self.quality),
            "runtime": asdict(self.runtime),
        }


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `edgekit.json` says. Keys are snake_case and mean the same in every language."""

    edgekit_version: str
    model: Mapping[str, Any]
    target: str
    plan: Mapping[str, Any]
    programs: tuple[Program, ...]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    special_tokens: Mapping[str, str]
    chat_template: str | None
    generation_defaults: Mapping[str, Any]
    provenance: Mapping[str, Any]
    licence: str | None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The manifest's JSON object."""
        return {
            "schema_version": SCHEMA_VERSION,
            "edgekit_version": self.edgekit_version,
            "model": dict(self.model),
            "target": self.target,
            "plan": dict(self.plan),
            "programs": [program.to_json() for program in self.programs],
            "tokenizer": {
                "file": TOKENIZER,
                "eos_token_ids": list(self.eos_token_ids),
                "bos_token_id": self.bos_token_id,
                "special_tokens": dict(self.special_tokens),
            },
            "chat_template": self.chat_template,
            "generation_defaults": dict(self.generation_defaults),
            "files": {name: dict(entry) for name, entry in self.files.items()},
            "provenance": dict(self.provenance),
            "licence": self.licence,
        }


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk."""

    directory: Path
    manifest: Manifest

    def program(self, format: str | None = None) -> Program:
        """The program of a format; None takes the first.

        Raises:
            BundleError: There is none.
        """
        formats = [program.graph.format for program in self.manifest.programs]
        for program in self.manifest.programs:
            if format in {None, program.graph.format}:
                return program
        raise BundleError(f"{self.directory} has no {format} program", hint=f"it has: {', '.join(formats)}")

    def plan_of(self, program: Program) -> Mapping[str, Any]:
        """What the manifest says of one program's plan: the first one's, or one of the `other_programs`."""
        others = self.manifest.plan.get("other_programs")
        other = others.get(program.graph.format) if isinstance(others, dict) else None
        return other if isinstance(other, dict) else self.manifest.plan


def open_bundle(directory: str | Path, *, check_hashes: bool = True) -> Bundle:
    """Open a bundle and check its files.

    Args:
        directory: The bundle.
        check_hashes: False compares sizes only, which takes no time.

    Raises:
        BundleError: It is missing, malformed, of a newer schema, or a file is changed, missing or extra.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BundleError(f"{directory} is not a bundle: no such directory", hint="make one with `edgekit convert`")
    manifest = _read_manifest(directory)
    _check_files(directory, manifest, check_hashes)
    return Bundle(directory, manifest)


def hash_file(path: Path, *, given_up: Callable[[], bool] = lambda: False) -> str:
    """SHA-256 of a file, in hexadecimal; `given_up` is asked for each block, and ends it with what was read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as handle:
        while (block := handle.read(HASHED_BYTES)) and not given_up():
            digest.update(block)
    return digest.hexdigest()


def list_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in a bundle but the manifest, by POSIX path."""
    names = sorted(name for name, path in _walk(directory) if path.is_file())
    return {
        name: {"size_bytes": (directory / name).stat().st_size, "sha256": hash_file(directory / name)}
        for name in names
        if name != MANIFEST
    }


def _walk(directory: Path) -> Iterator[tuple[str, Path]]:
    """POSIX path and place of everything in a bundle that EdgeKit put there, or could be mistaken for it."""
    for path in directory.rglob("*"):
        if path.name not in _LITTER and not path.name.startswith(_APPLE_DOUBLE):
            yield path.relative_to(directory).as_posix(), path


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        if path.stat().st_size > LARGEST_MANIFEST_BYTES:
            raise BundleError(f"{MANIFEST} is too large to be a manifest", hint=DAMAGED)
        values = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair is JSON but no text
    except FileNotFoundError as error:
        raise BundleError(f"{directory} is not a bundle: it has no {MANIFEST}", hint="use `edgekit convert`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST} can't be read as JSON", hint=DAMAGED) from error
    fields = Fields(values, MANIFEST)
    version = fields.get("schema_version", int)
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"the bundle has schema {version}, this EdgeKit reads up to {SCHEMA_VERSION}",
            hint="pip install --upgrade edgekit-toolkit",
        )
    return _manifest_from(fields)


def _manifest_from(fields: Fields) -> Manifest:
    tokenizer = fields.nested("tokenizer")
    programs = tuple(_program_from(item) for item in fields.objects("programs"))
    if not programs:
        raise BundleError(f"{MANIFEST} lists no program", hint=DAMAGED)
    fields.nested("model").optional("parameters", int)
    fields.nested("plan").listed("notes", str)
    files = fields.get("files", dict)
    for name in files:
        _check_path(name)
    for name in (
        TOKENIZER,
        *(file for program in programs for file in (*program.graph.files, *program.graph.contexts)),
    ):
        if name not in files:
            raise BundleError(f"{MANIFEST} does not list the file {name}", hint=DAMAGED)
    return Manifest(
        edgekit_version=fields.get("edgekit_version", str),
        model=fields.get("model", dict),
        target=fields.get("target", str),
        plan=fields.get("plan", dict),
        programs=programs,
        eos_token_ids=tokenizer.listed("eos_token_ids", int),
        bos_token_id=tokenizer.optional("bos_token_id", int),
        special_tokens=tokenizer.texts("special_tokens"),
        chat_template=fields.optional("chat_template", str),
        generation_defaults=fields.get("generation_defaults", dict),
        provenance=fields.get("provenance", dict),
        licence=fields.optional("licence", str),
        files=files,
    )


def _program_from(fields: Fields) -> Program:
    cache = fields.nested("cache")
    graph = Graph(
        format=fields.get("format", str),
        files=fields.listed("files", str),
        inputs=fields.texts("inputs"),
        outputs=fields.texts("outputs"),
        cache=CacheLayout(
            cache.size("layers"),
            cache.size("kv_heads"),
            cache.size("head_dim"),
            cache.get("dtype", str),
            cache.get("past_key", str),
            cache.get("past_value", str),
            cache.get("present_key", str),
            cache.get("present_value", str),
            keys_transposed=cache.get("keys_transposed", bool) if "keys_transposed" in cache.values else False,
        ),
        vocab_size=fields.size("vocab_size"),
        rope_switch=fields.size("rope_switch"),
        weights=tuple(_report_from(item) for item in fields.objects("weights")),
        window=fields.size("window") if "window" in fields.values else 0,
        positions=fields.size("positions") if "positions" in fields.values else 0,
        chunk=fields.size("chunk") if "chunk" in fields.values else 0,
        npu=fields.texts("npu") if "npu" in fields.values else {},
        contexts=fields.listed("contexts", str) if "contexts" in fields.values else (),
        operators=fields.nested("operators").tables() if "operators" in fields.values else {},
        delegated=fields.counts("delegated") if "delegated" in fields.values else {},
        kept_in_floats=fields.texts("kept_in_floats") if "kept_in_floats" in fields.values else {},
    )
    context = fields.size("context")
    _check_graph(fields, graph, context)
    quality = fields.nested("quality")
    for key in ("kl_mean", "kl_bound"):
        value = quality.values.get(key, 0.0)
        if not isinstance(value, float) and not (isinstance(value, int) and abs(value) <= sys.float_info.max):
            raise quality.wrong(key, "a number")
    if "kl_mean_interval" in quality.values and len(quality.listed("kl_mean_interval", float)) != 2:
        raise quality.wrong("kl_mean_interval", "two numbers")
    runtime = _runtime_from(fields.nested("runtime")) if "runtime" in fields.values else RuntimeOptions()
    return Program(graph, context, quality.values, runtime)


def _check_graph(fields: Fields, graph: Graph, context: int) -> None:
    if not graph.files or not context or graph.cache.dtype not in CACHE_ELEMENT_BYTES:
        raise BundleError(f"{fields.path} lacks files, a context or a known cache type", hint=DAMAGED)
    wanted = {"tokens"} | _INPUTS.get(graph.format, set())
    if not wanted <= set(graph.inputs) or "logits" not in graph.outputs:
        raise BundleError(f"{fields.path} does not name its inputs and outputs", hint=DAMAGED)
    if graph.format == "onnx-qdq" and not (graph.chunk and len(graph.files) >= _STATIC_GRAPHS):
        raise BundleError(f"{fields.path} is not described as {graph.format} programs are", hint=DAMAGED)
    if ("first_position" in graph.inputs) != bool(graph.positions) or (
        graph.positions and not 0 < graph.window < context
    ):
        raise BundleError(f"{fields.path} slides over a window that it does not have", hint=DAMAGED)
    if not set(graph.npu) <= _NPU_OPTIONS:
        raise fields.wrong("npu", f"an object of {' and '.join(sorted(_NPU_OPTIONS))} alone")
    if len(graph.contexts) == 1:
        raise fields.wrong("contexts", "a list with a file for each of two graphs")


def _runtime_from(fields: Fields) -> RuntimeOptions:
    switches = ("spinning", "arena", "prepacking", "mapped_weights")
    threads = fields.size("threads")
    if threads > MOST_THREADS:
        raise fields.wrong("threads", f"a number up to {MOST_THREADS}")
    return RuntimeOptions(threads, **{name: fields.get(name, bool) for name in switches})


def _report_from(fields: Fields) -> TensorReport:
    return TensorReport(
        role=fields.get("role", str),
        stored=fields.get("stored", str),
        bits=fields.size("bits"),
        block_size=fields.size("block_size"),
        size_bytes=fields.size("size_bytes"),
        source_bytes=fields.size("source_bytes"),
        relative_error=fields.quantity("relative_error"),
        peak=fields.quantity("peak") if "peak" in fields.values else 0.0,
    )


def _check_path(name: object) -> None:
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath()
    plain = isinstance(name, str) and path.parts and path.as_posix() == name and not path.is_absolute()
    if not plain or ".." in path.parts or "\\" in str(name) or ":" in str(name) or "\0" in str(name):
        raise BundleError(
            f"{MANIFEST} lists the file {str(name)[:80]!r}, which is not a path in the bundle", hint=DAMAGED
        )


def _check_files(directory: Path, manifest: Manifest, check_hashes: bool) -> None:
    present = {name for name, path in _walk(directory) if not path.is_dir()}
    missing = sorted(set(manifest.files) - present)
    extra = sorted(present - set(manifest.files) - {MANIFEST})
    if missing:
        raise BundleError(f"{directory}: the file {missing[0]} is missing", hint=DAMAGED)
    if extra:
        raise BundleError(
            f"{directory}: the file {extra[0]} is not part of the bundle", hint="move it elsewhere, or convert again"
        )
    for name, values in manifest.files.items():
        entry, path = Fields(values, f"{MANIFEST}: {name}"), directory / name
        if not path.is_file():  # a pipe or a device would never end
            raise BundleError(f"{directory}: {name} is not a plain file", hint=DAMAGED)
        size, stored = entry.size("size_bytes"), path.stat().st_size
        if path.is_symlink() and directory.resolve() not in path.resolve().parents:
            raise BundleError(f"{directory}: {name} links to a place outside the bundle", hint=DAMAGED)
        if stored != size:
            raise BundleError(f"{directory}: {name} has {stored:,} bytes, the manifest says {size:,}", hint=DAMAGED)
        if check_hashes and hash_file(path) != entry.get("sha256", str):
            raise BundleError(f"{directory}: {name} was changed: its SHA-256 is not the manifest's", hint=DAMAGED)
