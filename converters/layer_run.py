"""One layer of a decoder in full precision, run by ONNX Runtime on hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.calibration import THREADS
from edgekit.config import ModelConfig
from edgekit.errors import ConversionError
from edgekit.plan import WeightPlan
from edgekit.quant import WeightFormat
from edgekit.source import Source, Tensor, part_shapes
from edgekit.staging import working_directory, writable

from .onnx_decoder import CHANGE, FIRST_POSITION, HIDDEN, INPUTS, ROPE_LENGTH, cache_layout, emit_layer
from .weight_writer import write_weights

__all__ = ["WITHOUT_CALIBRATION", "LayerOutputs", "LayerRun", "embed_tokens", "open_layer", "told_as_conversion_errors"]

WITHOUT_CALIBRATION = "use --quant int4, which needs none"
_DATA = "layer.data"
_QUIET = 3
_ROWS_AT_ONCE = 4096

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LayerOutputs:
    """What a layer computes of one text.

    Attributes:
        residual: float32 [tokens, hidden]: the hidden states after it.
        normed: Those, normed for what follows.
        factors: For each matrix, by role, what it is multiplied with: float32 [tokens, columns].
    """

    residual: Floats
    normed: Floats
    factors: Mapping[str, Floats]


@dataclass(slots=True)
class LayerRun:
    """A loaded layer; `factors`: the roles of its matrices, and the values they are multiplied with. Its session is None once
    it is closed.
    """

    config: ModelConfig
    index: int
    session: Any
    factors: Mapping[str, str]
    residual: str
    normed: str

    def run(
        self, state: Floats, *, keep: frozenset[str] = frozenset(), changes: Mapping[str, Floats] | None = None
    ) -> LayerOutputs:
        """Run the layer on the hidden states of one text.

        Args:
            state: float32 [tokens, hidden].
            keep: Roles whose factors are wanted.
            changes: By role, what is added to its product: float32 [tokens, rows]. Only of a layer opened for changes.

        Raises:
            ConversionError: It does not run.
        """
        factors = {role: name for role, name in self.factors.items() if role in keep}
        names = list(dict.fromkeys([self.residual, self.normed, *factors.values()]))
        with told_as_conversion_errors(self.index):
            found = dict(zip(names, self.session.run(names, self._feeds(state, changes or {})), strict=True))
        kept = {role: found[name][0] for role, name in factors.items()}
        return LayerOutputs(found[self.residual][0], found[self.normed][0], kept)

    def _feeds(self, state: Floats, changes: Mapping[str, Floats]) -> dict[str, Any]:
        layout, length = cache_layout(self.config), len(state)
        empty = np.zeros((1, layout.kv_heads, length, layout.head_dim), np.float32)
        nothing = np.zeros((1, 1), np.float32)
        feeds = {
            INPUTS["tokens"]: np.zeros((1, length), np.int64),
            INPUTS["length"]: np.array(length, np.int32),
            INPUTS["logits_start"]: np.zeros(1, np.int64),
            ROPE_LENGTH: np.array(length, np.int64),
            FIRST_POSITION: np.array(0, np.int64),
            HIDDEN: state[None],
        } | {name.replace("{}", str(self.index)): empty for name in layout.past}
        feeds |= {CHANGE.format(role): changes.get(role, nothing)[None] for role in self.factors}
        declared = {value.name for value in self.session.get_inputs()}
        return {name: value for name, value in feeds.items() if name in declared}


@contextmanager
def open_layer(source: Source, index: int, place: Path, *, context: int, changes: bool = False) -> Iterator[LayerRun]:
    """Write a layer's program aside and load it.

    Args:
        place: A folder; what is written there is removed at the end.
        context: Tokens of the longest text.
        changes: Whether something is to be added to its matrices' products.

    Raises:
        SourceError: A weight can't be read or is not a finite number.
        ConversionError: The layer can't be written or loaded.
    """
    config = source.config
    plans = {role: WeightPlan(shape, WeightFormat(32)) for role, shape in part_shapes(config).items()}
    emitted, residual, normed = emit_layer(config, plans, index, context=context, data_file=_DATA, changes=changes)
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = THREADS
    with working_directory(writable(place)) as folder:
        write_weights(folder / _DATA, emitted, config, plans, source.parts)
        program = folder / "layer.onnx"
        program.write_bytes(emitted.builder.model(config.model_type).SerializeToString(deterministic=True))
        with told_as_conversion_errors(index):
            session = ort.InferenceSession(program, options, providers=["CPUExecutionProvider"])
        layer = LayerRun(config, index, session, emitted.factors, residual, normed)
        del session
        try:
            yield layer
        finally:
            layer.session = None  # the receiver still has the layer, and Windows removes no file that is mapped


@contextmanager
def told_as_conversion_errors(index: int, hint: str = WITHOUT_CALIBRATION) -> Iterator[None]:
    """What ONNX Runtime says of a layer, as an error of the conversion; what is one already, and want of memory, pass through."""
    try:
        yield
    except (ConversionError, MemoryError):
        raise
    except Exception as error:  # ONNX Runtime's errors share no base class but this
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(f"layer {index} does not run: {first_line}", hint=hint) from error


def embed_tokens(tensors: tuple[Tensor, ...], tokens: NDArray[np.int64], config: ModelConfig) -> Floats:
    """Hidden states before the first layer, float32 [tokens, hidden]; the embedding is read in parts."""
    (table,) = tensors
    found = np.empty((len(tokens), table.shape[1]), np.float32)
    for start in range(0, table.shape[0], _ROWS_AT_ONCE):
        here = np.flatnonzero((tokens >= start) & (tokens < start + _ROWS_AT_ONCE))
        if len(here):
            found[here] = table.read(start, min(start + _ROWS_AT_ONCE, table.shape[0]))[tokens[here] - start]
    return found * np.float32(config.embedding_scale)
