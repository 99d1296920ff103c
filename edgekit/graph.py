"""Graph: a format's program with its declared inputs, outputs and key-value cache layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgekit.quant import CacheFormat

__all__ = ["CACHE_ELEMENT_BYTES", "EMPTY_UINT8", "CacheLayout", "Graph", "TensorReport"]

CACHE_ELEMENT_BYTES: Mapping[str, int] = {form.value: form.element_bytes for form in CacheFormat} | {"uint8": 1}
EMPTY_UINT8 = 128  # the zero point of keys and values in uint8


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The key-value cache: for each layer one key and one value tensor [1, kv_heads, capacity, head_dim].

    `dtype` is a `CacheFormat`, or uint8 in programs of static shape; the scales of integers are in the program. A program reads
    the tensors named `past_key` and `past_value` (with the layer's number for `{}`) and writes the same-numbered `present_key`
    and `present_value`; the runtime binds one buffer as both.

    Programs of static shape (`Graph.chunk`) have no first axis of 1, and write the new tokens' keys and values only, which the
    runtime puts behind those it has. Places without a token must hold zeros, in uint8 `EMPTY_UINT8`: they are hidden by a number
    that is added to their scores, and other keys might score higher than it hides. With `keys_transposed` a key tensor is
    [kv_heads, head_dim, capacity].
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    past_key: str = "past_key.{}"
    past_value: str = "past_value.{}"
    present_key: str = "present_key.{}"
    present_value: str = "present_value.{}"
    keys_transposed: bool = False

    @property
    def token_bytes(self) -> int:
        """Size of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * CACHE_ELEMENT_BYTES[self.dtype]

    @property
    def past(self) -> tuple[str, str]:
        """The names read, key first."""
        return self.past_key, self.past_value

    @property
    def present(self) -> tuple[str, str]:
        """The names written, key first."""
        return self.present_key, self.present_value


@dataclass(frozen=True, slots=True)
class TensorReport:
    """How one weight was stored; one kept in several matrices (see `WeightPlan.pieces`) has a report for each.

    Attributes:
        relative_error: The root of squared error over squared weight; 0 is exact.
        peak: The largest magnitude divided by the root mean square; 0 where it is not known, as of blocks carried over.
    """

    role: str
    stored: str
    bits: int
    block_size: int
    size_bytes: int
    source_bytes: int
    relative_error: float
    peak: float = 0.0


@dataclass(frozen=True, slots=True)
class Graph:
    """A program on disk and what a runtime must know to call it.

    Attributes:
        format: A format's name, as in `--format`.
        files: Its files relative to the bundle, the program first.
        inputs, outputs: Names by meaning: `tokens`, `length`, `logits_start`, optionally `rope_length` and
            `first_position` (of the oldest token in the cache); `logits`.
        cache: The key-value cache.
        vocab_size: Columns of the logits.
        rope_switch: Sequence length above which the long rotary factors apply; 0 where there are none.
        weights: How each weight was stored.
        window: Tokens that every layer sees, the newest among them; 0 where a layer sees all.
        positions: Tokens that a sequence may reach when those outside of the window leave the cache; 0 where the program
            can't do that. Such a program has the input `first_position`.
        chunk: Tokens that a program of static shape takes at a time, beside its graph for one; 0 for others. Its cache holds
            exactly the context. Of `onnx-qdq` such a program has four graphs, the first of `files`: `embedding` and `head`
            for the CPU, which take any number of tokens, and between them `prefill` and `decode` for the NPU.
        npu: What the NPU's tools must be told of the chip, by their own names: `htp_arch`, `soc_model`.
        contexts: Files of the NPU's graphs compiled for that chip: one for `prefill`, one for `decode`, then binaries that
            these name. Empty where they were not compiled.
        operators: For each of the program's functions how often it has each operator; empty where that is not known.
        delegated: Operators by the delegate that takes them; those in none are counted under the empty name.
        kept_in_floats: Roles of weights, or kinds of values, that a quantized program computes in floats, each with why.
    """

    format: str
    files: tuple[str, ...]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    cache: CacheLayout
    vocab_size: int
    rope_switch: int
    weights: tuple[TensorReport, ...]
    window: int = 0
    positions: int = 0
    chunk: int = 0
    npu: Mapping[str, str] = field(default_factory=dict)
    contexts: tuple[str, ...] = ()
    operators: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    delegated: Mapping[str, int] = field(default_factory=dict)
    kept_in_floats: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights_bytes(self) -> int:
        """Stored size of all weights."""
        return sum(report.size_bytes for report in self.weights)
